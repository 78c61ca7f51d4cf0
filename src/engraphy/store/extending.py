"""Rows of their own for more n-grams: a new table whose new rows are what their n-grams read
before."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from itertools import chain

import numpy as np

from ..addresses.addresser import Addresser
from ..addresses.hot import HotIndex
from ..addresses.ngrams import Ngrams
from ..spec.config import EngramConfig
from ..table.chunks import Progress
from ..table.table import Table
from .group import StoreGroup

_STEP = 1 << 14  # rows that are copied at a time


def write_extended(
    stores: StoreGroup,
    config: EngramConfig,
    addresser: Addresser,
    ngrams: Ngrams,
    path: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
) -> str:
    """Writes a table in which these n-grams have rows of their own, beside those that have some.

    Rows that exist keep their ids and their bytes, and the new rows are copies of those that their
    n-grams read before. So a model with the new table computes what it computed before, bit for
    bit.

    Args:
        stores: The rows.
        config: Of their memory.
        addresser: Of their memory.
        ngrams: Those that get rows. N-grams that have rows of their own are passed over.
        path: The folder of the new table; its parent is the table of the stores.
        progress: Called as rows are written.

    Returns:
        The table_id.

    Raises:
        TableError: `path` is taken.
        ConfigError: The memory's index keeps fingerprints, an order is not hashed, or there is no
            n-gram.
        DigestMismatch: The n-grams have ids of another vocabulary map.
        WriteFailed: The system refuses.
    """
    old = addresser.hot
    hot = HotIndex.build(ngrams) if old is None else old.extended(ngrams)
    first_slot = 0 if old is None else old.spec.slots
    Addresser(addresser.spec, addresser.vocab, hot)  # refuses another map and other orders
    larger = dataclasses.replace(config, hot=hot.spec)
    fmt = stores.format
    table = Table.create(path, larger, fmt, addresser.vocab, parent=stores.table_id, hot=hot)
    try:
        for layer, store in stores.items():
            rows_bytes = larger.row_count(layer) * fmt.row_bytes
            done = 0
            old_rows = _ranges(config.row_count(layer))
            for ids_N in chain(old_rows, _sources(addresser, hot, first_slot, layer)):
                table.write_rows(layer, done, store.gather(ids_N))
                done += len(ids_N)
                if progress:
                    progress(f"layer {layer}", done * fmt.row_bytes, rows_bytes)
        return table.seal()
    finally:
        table.close()


def _ranges(rows: int) -> Iterator[np.ndarray]:
    for first in range(0, rows, _STEP):
        yield np.arange(first, min(first + _STEP, rows), dtype=np.int64)


def _sources(
    addresser: Addresser, hot: HotIndex, first_slot: int, layer: int
) -> Iterator[np.ndarray]:
    """The rows that the n-grams of new slots read before, in the order of the slots."""
    firsts: dict[int, tuple[int, np.ndarray]] = {}
    for order in hot.orders:
        slots_N = hot.slots(order)
        new_N = np.flatnonzero(slots_N >= first_slot)
        if len(new_N):
            # The new slots of an order follow each other.
            sorted_N = new_N[np.argsort(slots_N[new_N])]
            firsts[int(slots_N[sorted_N[0]])] = (order, sorted_N)
    for first in sorted(firsts):
        order, places_N = firsts[first]
        ids_Nn = hot.ngrams(order)
        for begin in range(0, len(places_N), _STEP):
            part = ids_Nn[places_N[begin : begin + _STEP]]
            yield addresser.ngram_rows(part, layer).reshape(-1)
