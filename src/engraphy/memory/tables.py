"""The rows of a memory: drawn at random, copied to a new table, read from a table."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..addresses.ngrams import Ngrams
from ..errors import ConfigError, DigestMismatch
from ..rows.init import normal_rows
from ..store.extending import write_extended
from ..store.group import StoreGroup
from ..store.names import follow
from ..table.table import Table

if TYPE_CHECKING:
    from .memory import EngramMemory


def init_rows(memory: EngramMemory, std: float, seed: int, chunk: int) -> None:
    """`EngramMemory.init_rows`."""
    if not (math.isfinite(std) and std >= 0 and 0 <= seed < 2**64):
        raise ConfigError(
            f"init_rows: expected a finite std from 0 on and a seed of 64 bits, found {std}, {seed}"
        )
    for layer, store in memory.stores.items():
        rows = store.info.rows
        for first in range(0, rows, chunk):
            ids_N = np.arange(first, min(first + chunk, rows))
            values_Nd = normal_rows(seed, layer, ids_N, memory.config.dim, std)
            store.scatter(ids_N, memory.format.encode(values_Nd))
        follow(store).set([f"normal, std {std!r}, seed {seed}"])


def write_table(memory: EngramMemory, path: str | os.PathLike[str], parent: str | None) -> str:
    """`EngramMemory.write_table`."""
    table = Table.create(
        path, memory.config, memory.format, memory.vocab, parent=parent, hot=memory.hot
    )
    try:
        memory.stores.copy_to(table)
        table_id = table.seal()
    finally:
        table.close()
    memory.stores.add_name(table_id)
    return table_id


def extended(memory: EngramMemory, ngrams: Ngrams, path: str | os.PathLike[str]) -> EngramMemory:
    """`EngramMemory.extended`."""
    write_extended(memory.stores, memory.config, memory.addresser, ngrams, path)
    table = Table.open(path)
    config = table.config
    table.close()
    larger = type(memory)(config, memory.vocab, Path(path))
    try:
        larger.to(next(memory.blocks.parameters()))
        larger.blocks.load_state_dict(memory.blocks.state_dict())
    except BaseException:
        larger.close()
        raise
    larger.made_for = memory.made_for
    return larger.train(memory.training)


def read_table(memory: EngramMemory, path: str | os.PathLike[str], table_id: str | None) -> None:
    """`EngramMemory.read_table`."""
    table = Table.open(path)
    try:
        if table_id is not None and table.table_id != table_id:
            raise DigestMismatch(f"{path}: expected table {table_id}, found {table.table_id}")
        table.check_address(memory.address_digest)
        if table.fmt != memory.format:
            raise ConfigError(
                f"{path}: expected rows of format {memory.format.kind}, found {table.fmt.kind}"
            )
        with StoreGroup.of_table(table, memory.layers) as rows:
            rows.copy_to(memory.stores)
    finally:
        table.close()
