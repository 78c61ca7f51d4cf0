"""attach, detach, load: a memory for an existing transformers model.

The model keeps its class and its parts: hooks.py says how the memory takes part in it.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from ..addresses.hot import HotIndex
from ..addresses.vocab import VocabMap
from ..errors import ConfigError, DigestMismatch
from ..memory.hot import naming
from ..memory.memory import EngramMemory
from ..rows.format import RowFormat
from ..spec.config import EngramConfig
from ..table.table import Table
from .backbone import find_backbone, find_dtype, unwrapped
from .costs import check_cost
from .hooks import Attachment, attachment_of
from .hub import find_memory, warn_without_adapter
from .joins import check_fits, check_free, check_joins, check_made_for
from .versions import check_version


def attach(
    model: nn.Module,
    config: EngramConfig | EngramMemory,
    vocab: VocabMap | None = None,
    store: str | os.PathLike[str] | Table = "ram:",
    *,
    row_format: RowFormat | str | None = None,
    std: float = 0.02,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    margin: int = 64,
    hot: HotIndex | None = None,
) -> EngramMemory:
    """Give a transformers model a memory. The memory is registered as `model.engraphy`.

    The value projections start at zero: a fresh memory changes no logit, and its rows learn from
    the second step. The model's own parameters stay trainable or frozen as they are. The model's
    `save_pretrained` leaves the memory out; use `memory.save`. If attaching fails, the model stays
    as it was.

    Args:
        model: The model, also inside PEFT, torch.compile or DistributedDataParallel.
        config: A config, such as `EngramConfig.for_model` returns, or an existing memory.
        vocab: The map of the model's tokenizer. None means ids as they are.
        store: "ram:" for a new table, or a table whose rows stay as they are: its URL, its folder
            as a Path, or an open Table.
        row_format: Row format of the new table. Default: f32.
        std: The new rows are drawn from N(0, std**2).
        seed: Seed of the new rows.
        dtype: Dtype of the dense layers. Default: the model's.
        margin: How many tokens a cache can take back (`cache.crop`, assisted decoding).
        hot: The index of n-grams that get rows of their own. An existing table has its own.

    Returns:
        The attached memory.

    Raises:
        ConfigError: This version of transformers was not tested; a memory cannot join the model;
            the model has a memory already, other sizes or no such layer; or the new table does not
            fit into the free RAM.
        DigestMismatch: The table has other addresses, or the memory was made for another model
            (`memory.made_for`).
    """
    check_version()
    backbone = find_backbone(model)
    check_free(model, backbone)
    check_fits(backbone, config if isinstance(config, EngramConfig) else config.config)
    check_joins(model, backbone)
    if isinstance(config, EngramMemory):
        if hot is not None:
            raise ConfigError("hot: expected none beside a memory, which has its own, found one")
        if attachment_of(config) is not None:
            raise ConfigError(
                "memory: expected one that is not attached, found it attached to a model; detach "
                "it there first"
            )
        check_made_for(backbone, config)
        memory = config.train(model.training)
    else:
        memory = _make(model, config, vocab, store, row_format, std, seed, dtype, hot)
    Attachment(memory, backbone, margin).install(unwrapped(model))
    return memory


def detach(model: nn.Module) -> EngramMemory:
    """Take the memory off a model. The model is then what it was before, bit for bit.

    Returns:
        The memory, which can be attached again.

    Raises:
        ConfigError: The model has no memory.
    """
    inner = unwrapped(model)
    memory = getattr(inner, "engraphy", None)
    attachment = attachment_of(memory)
    if not isinstance(memory, EngramMemory) or attachment is None:
        raise ConfigError(
            f"{type(model).__name__}: expected a model with an attached memory, found none"
        )
    attachment.remove(inner)
    return memory


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    store: str | os.PathLike[str] | None = None,
    *,
    tokenizer: Any = None,
    margin: int = 64,
    **hub: Any,
) -> EngramMemory:
    """Attach a memory that `memory.save` wrote. If that fails, nothing is left half attached.

    Args:
        model: As in `attach`.
        path: A folder, or "user/name" on the hub, with a memory or a model saved with its memory.
        store: The URL to serve the rows from, or the table's folder as a Path. Default: the saved
            table.
        tokenizer: The model's. If it is given, its vocabulary map must be the saved one.
        margin: As in `attach`.
        hub: Options of a download: revision, token, cache_dir, force_download, local_files_only.

    Raises:
        DigestMismatch: The tokenizer is another one.
        DataUnavailable: The repository, or this revision of it, cannot be downloaded.
        EngraphyError: Whatever `attach` and `EngramMemory.load` raise.
    """
    check_free(model, find_backbone(model))
    path = find_memory(path, **hub)
    warn_without_adapter(model, path)
    memory = EngramMemory.load(path, store)
    try:
        if tokenizer is not None and not memory.vocab.agrees_with(tokenizer):
            raise DigestMismatch(
                f"{path}: expected a tokenizer whose vocabulary map has digest "
                f"{memory.vocab.digest}, found {VocabMap.from_tokenizer(tokenizer).digest}"
            )
        return attach(model, memory, margin=margin)
    except BaseException:
        memory.close()
        raise


def _make(
    model: nn.Module,
    config: EngramConfig,
    vocab: VocabMap | None,
    store: str | os.PathLike[str] | Table,
    row_format: RowFormat | str | None,
    std: float,
    seed: int,
    dtype: torch.dtype | None,
    hot: HotIndex | None,
) -> EngramMemory:
    """A new memory for `model`, not yet attached."""
    if vocab is None:
        vocab = _identity(model, config.hash.vocab_size)
    if dtype is None:
        dtype = find_dtype(model)
    config = naming(config, hot)
    fresh = isinstance(store, str) and store.startswith("ram:")
    check_cost(config, row_format or "f32", dtype, in_ram=fresh)
    memory = EngramMemory(config, vocab, store, row_format, hot=hot)
    memory.to(dtype)
    for layer in memory.layers:
        memory.blocks[str(layer)].zero_value()  # pyright: ignore[reportCallIssue]
    if fresh:
        memory.init_rows(std, seed)
    return memory.train(model.training)


def _identity(model: nn.Module, size: int) -> VocabMap:
    """A map that keeps ids as they are.

    Raises ConfigError if the model has ids beyond `size`: they would all be dead.
    """
    ids = find_backbone(model).vocab_size
    if size < ids:
        raise ConfigError(
            f"vocab_size: expected the model's {ids} ids without a vocabulary map, the "
            f"hash spec says {size}; give vocab=, VocabMap.from_tokenizer(tokenizer, "
            f"raw_size={ids})"
        )
    return VocabMap.identity(size)
