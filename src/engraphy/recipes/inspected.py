"""Opens what `engraphy model inspect` looks into: a demo run, a transformers model with an attached
memory, or Qwen4-Exp with the table of its release."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..analysis.subject import Subject
from ..data.corpus import Corpus
from ..data.tokens import encode
from ..errors import ConfigError
from ..lm import LM
from ..lm.loop import TrainConfig, checkpoints, described
from ..memory.lookup import Trace
from ..train.dtype import choose_dtype
from .studies.demo_arms import ArmConfig
from .studies.demo_arms import load as load_arm
from .texts import encode_texts, load_texts


@dataclass(frozen=True)
class Opened:
    """A model, and its way from text to tokens and back.

    Attributes:
        subject: The model as the analyses read it.
        encode: A text -> token ids, as the model takes them.
        decode: Token ids -> their text.
        encode_all: Documents -> token ids of each, without special tokens.
        training: The documents that the model was trained on, if the run has them.
    """

    subject: Subject
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    encode_all: Callable[[Sequence[str]], list[np.ndarray]]
    training: list[np.ndarray] | None = None

    def documents(self, source: str) -> list[np.ndarray]:
        """Token ids of a text file, a folder, a .jsonl file or a named data set.

        Raises:
            DataUnavailable, InputError: As `load_texts` raises them.
        """
        return self.encode_all(load_texts(source).texts)


def open_model(model: str, memory: str | None, dtype: str) -> Opened:
    """Opens a model and its memory.

    Args:
        model: Folder of a demo run; or folder or hub name of a transformers model.
        memory: Folder or hub name of an attached memory; for Qwen4-Exp the table to serve, a URL or
            a folder. None = the model has its memory inside.
        dtype: As `choose_dtype` takes it.

    Raises:
        ConfigError: There is no memory, or one was named for a demo run.
        DataUnavailable: There is no such model.
        DigestMismatch: The memory was made for another model or tokenizer.
    """
    if (Path(model) / "corpus" / "corpus.json").exists():
        if memory is not None:
            raise ConfigError(f"memory: expected none, since {model} is a run, found {memory}")
        return _open_run(Path(model), dtype)
    return _open_transformers(model, memory, dtype)


def _open_run(folder: Path, dtype: str) -> Opened:
    """The memory arm of a demo run."""
    saved = checkpoints(folder / "memory")
    if not saved:
        raise ConfigError(f"{folder}: expected a finished demo run, found no memory/checkpoint-*")
    run = described(saved[-1])
    origin = run["origin"]
    config = ArmConfig(
        TrainConfig(**run["config"]), origin["seed"], origin["rho"], origin["row_std"]
    )
    corpus = Corpus.load(folder / "corpus")
    model, _ = load_arm("memory", corpus, config, folder)
    tokenizer = corpus.tokenizer

    def encode_text(text: str) -> list[int]:
        # A document begins with the token that ends the one before it, as in training.
        return [corpus.end_id, *tokenizer.encode(text, add_special_tokens=False).ids]

    return Opened(
        reference_subject(model.to(choose_dtype(dtype).torch)),
        encode_text,
        lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        lambda texts: encode(tokenizer, texts),
        [np.concatenate([[corpus.end_id], ids]) for ids in corpus.training],
    )


def reference_subject(model: LM) -> Subject:
    """A reference model as the analyses read it.

    Args:
        model: A model with a memory, in eval mode.

    Raises:
        ConfigError: It has no memory.
    """
    memory = model.memory
    if memory is None:
        raise ConfigError("model: expected a reference model with a memory, found none")

    def forward(ids_BT: Tensor, trace: Trace | None) -> Tensor:
        return model(ids_BT, trace=trace)

    blocks: Any = model.blocks
    return Subject(blocks, memory.layers, memory.addresser, forward, memory.disabled)


def transformers_subject(model: nn.Module) -> Subject:
    """A transformers model as the analyses read it.

    Args:
        model: With an attached memory, or Qwen4-Exp with its table; in eval mode.

    Raises:
        ConfigError: It has no memory.
    """
    from ..hf.tracing import Reader

    reader = Reader(model)
    blocks: Any = reader.blocks
    return Subject(blocks, reader.layers, reader.addresser, reader.forward, reader.without)


def _open_transformers(name: str, memory: str | None, dtype: str) -> Opened:
    from ..hf.pretrained import decoder, load_tokenizer

    tokenizer = load_tokenizer(name)
    model = _load_transformers(name, memory, dtype)
    return Opened(
        transformers_subject(model),
        lambda text: tokenizer(text)["input_ids"],
        decoder(tokenizer),
        lambda texts: encode_texts(tokenizer, texts),
    )


def _load_transformers(name: str, memory: str | None, dtype: str) -> Any:
    from ..hf.pretrained import model_type
    from ..hf.qwen4 import load_without_table, serve_table
    from .loading import load_all

    if memory is not None and model_type(name).startswith("qwen4_exp"):
        from transformers import Qwen4ExpForCausalLM

        chosen = choose_dtype(dtype).torch
        model = load_without_table(Qwen4ExpForCausalLM, name, dtype=chosen)
        serve_table(model, Path(memory) if Path(memory).exists() else memory)
        return model.eval()
    return load_all(name, memory, dtype).model.eval()
