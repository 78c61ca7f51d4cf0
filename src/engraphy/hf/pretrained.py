"""Load a transformers model, its tokenizer and adapters, by folder or hub name.

What cannot be loaded is one DataUnavailable of one line. A model that was saved with its memory
loads with it, because the package registers its type.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ..errors import DataUnavailable, EngraphyError
from ..system.lfs import refuse_pointer
from ..train.dtype import AUTO, DtypeChoice, choose_dtype


def load_tokenizer(name: str) -> Any:
    """The tokenizer beside a model.

    Args:
        name: A folder, or a name on the hub.

    Raises:
        DataUnavailable: There is no such model, or no tokenizer beside it.
    """
    _load(name, "a model with a tokenizer", AutoConfig.from_pretrained)
    return _load(name, "a tokenizer beside the model", AutoTokenizer.from_pretrained)


def model_type(name: str) -> str:
    """The kind of a model, as transformers names it. Raises DataUnavailable if there is none."""
    return str(_load(name, "a model", AutoConfig.from_pretrained).model_type)


def decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """Token ids -> their text as it was, special tokens included."""
    return lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def load_model(name: str, dtype: str = AUTO) -> tuple[Any, DtypeChoice]:
    """A model in eval mode, on a GPU if there is one, and the dtype that was chosen for it.

    Args:
        name: A folder, or a name on the hub.
        dtype: As `choose_dtype` takes it. The dtype in the file does not count.

    Returns:
        The model, and the choice with its reason.

    Raises:
        DataUnavailable: There is no such model.
        ConfigError: There is no such dtype.
    """
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    choice = choose_dtype(dtype, device)

    def load(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(name, dtype=choice.torch)

    model = _load(name, "a model", load)
    return model.to(device), choice


def require_peft(what: str) -> Any:
    """The package peft, which `what` needs. Raises DataUnavailable if it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise DataUnavailable(
            f'{what}: expected the package peft, found {error}; pip install "peft>=0.21"'
        ) from None
    return peft


def load_adapter(model: Any, folder: Path) -> Any:
    """The PEFT model of `model` and the adapters in `folder`, in eval mode.

    Raises:
        DataUnavailable: There are no such adapters, or peft is not installed.
    """
    peft = require_peft(str(folder))

    def load(name: str) -> Any:
        return peft.PeftModel.from_pretrained(model, name)

    return _load(str(folder), "LoRA adapters", load).eval()


def _load(name: str, what: str, load: Callable[[str], Any]) -> Any:
    """`load(name)`. Raises DataUnavailable if transformers or peft cannot load `what`."""
    try:
        return load(name)
    except EngraphyError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        folder = Path(name)
        if folder.is_dir():
            for path in sorted(folder.iterdir()):
                refuse_pointer(path, DataUnavailable)
        reason = str(error).strip().partition("\n")[0]
        raise DataUnavailable(
            f"{name}: expected {what}, as a folder or a name on the hub, "
            f"found {type(error).__name__}: {reason}"
        ) from error
