"""A model, its tokenizer, its adapters and its memory, as several recipes need them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..hf import load
from ..hf.hub import adapter_of, find_memory
from ..hf.pretrained import load_adapter, load_model, load_tokenizer
from ..memory.memory import EngramMemory
from ..train.dtype import DtypeChoice


@dataclass(frozen=True)
class Loaded:
    """What `load_all` loads, in eval mode.

    Attributes:
        model: The model, with its memory.
        tokenizer: Its tokenizer.
        memory: The memory; None if there is none.
        dtype: The dtype that was chosen, and why.
    """

    model: Any
    tokenizer: Any
    memory: EngramMemory | None
    dtype: DtypeChoice


def load_all(model: str, memory: str | None, dtype: str) -> Loaded:
    """Loads a model with its memory.

    Args:
        model: Folder or hub name of a transformers model. One that was saved with its memory has
            it already.
        memory: Folder that `memory.save` or `finetune` wrote, or its name on the hub. Adapters in
            it are loaded too. None = what the model has.
        dtype: As `choose_dtype` takes it.

    Raises:
        DataUnavailable: The model, its tokenizer or the memory does not exist.
        DigestMismatch: The memory was made for another tokenizer.
    """
    tokenizer = load_tokenizer(model)
    loaded, choice = load_model(model, dtype)
    if memory is None:
        return Loaded(loaded, tokenizer, getattr(loaded, "engraphy", None), choice)
    folder = find_memory(memory)
    adapter = adapter_of(folder)
    if adapter is not None:
        loaded = load_adapter(loaded, adapter)
    return Loaded(loaded, tokenizer, load(loaded, folder, tokenizer=tokenizer).eval(), choice)
