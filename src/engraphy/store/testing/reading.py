"""Tests of every store (`StoreTests`), and of read-only ones (`ReadOnlyStoreTests`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ...errors import InputError, RowOutOfRange, StoreError
from ...rows.format import RowFormat
from ...rows.read import read
from ..base import RowStore, copy_rows
from ..ram import RamStore
from .tools import check_parts, in_children, in_threads, random_ids, random_rows

# Invalid ids, the error that they raise, and a pattern of its message.
BAD_IDS: list[tuple[Any, type[Exception], str]] = [
    (np.array([3, 10**6, 4]), RowOutOfRange, "row id 1000000 at position 1: expected 0 to {last}"),
    (np.array([-1]), RowOutOfRange, "row id -1 at position 0: expected 0 to {last}"),
    (np.array([2**63 - 1, -(2**63)]), RowOutOfRange, "at position 0"),
    (np.array([1, 2], np.int32), InputError, r"row ids: expected int64 \[N\], found int32 \[2\]"),
    (np.array([1.0]), InputError, "float64"),
    (np.array([True]), InputError, "bool"),
    (np.array([[1, 2]]), InputError, r"found int64 \[1, 2\]"),
    (np.array(1), InputError, r"found int64 \[\]"),
    ([1, 2], InputError, "found list"),
    (None, InputError, "found NoneType"),
]
Filled = tuple[RowStore, np.ndarray]  # a store, and uint8 [rows, row_bytes], the rows in it


class StoreTests:
    """Tests of every store. Derive from `ReadOnlyStoreTests` or `WritableStoreTests` instead.

    Attributes:
        rows: how many rows `make_store` gets.
        row_format: format of these rows.
        mapped: whether `reading` gives memory.
        updatable: whether `updating` gives memory if it gets the ids.
        forks: whether a forked child can use the store.
    """

    rows: int = 84
    row_format: RowFormat = RowFormat("int8", 32)
    mapped: bool = False
    updatable: bool = False
    forks: bool = True

    def make_store(self, rows_NR: np.ndarray, folder: Path) -> RowStore:
        """Makes the store to test. Implement this.

        Args:
            rows_NR: uint8 [rows, row_bytes], the rows that the store has to hold.
            folder: an empty folder, for files of the store.
        """
        raise NotImplementedError(f"{type(self).__name__}: expected a method make_store")

    def make_filled(self, folder: Path) -> Filled:
        """A store and its rows. Override this if the store comes with rows of its own."""
        rows_NR = random_rows(self.row_format, self.rows)
        return self.make_store(rows_NR, folder), rows_NR

    @pytest.fixture
    def filled(self, tmp_path: Path) -> Iterator[Filled]:
        """A store and its rows; closed after the test."""
        store, expected = self.make_filled(tmp_path)
        yield store, expected
        store.close()

    def format_of(self, store: RowStore) -> RowFormat:
        """The format of a store's rows."""
        return store.info.format or self.row_format

    # Reading.

    @pytest.mark.parametrize("count", [0, 1, 500])
    def test_gather_gives_the_rows_in_the_order_of_the_ids_and_fills_a_poisoned_buffer(
        self, filled: Filled, count: int
    ) -> None:
        store, expected = filled
        ids = random_ids(len(expected), count)
        out = np.full((count, store.info.row_bytes), 0xA5, np.uint8)
        assert store.gather(ids, out=out) is out
        np.testing.assert_array_equal(out, expected[ids])
        np.testing.assert_array_equal(store.gather(ids), expected[ids])

    def test_gather_takes_ids_that_are_not_contiguous(self, filled: Filled) -> None:
        store, expected = filled
        ids = random_ids(len(expected))[::-3]
        np.testing.assert_array_equal(store.gather(ids), expected[ids])

    def test_a_batch_of_more_than_a_chunk_is_read_whole(self, filled: Filled) -> None:
        store, expected = filled
        fmt = self.format_of(store)
        ids = random_ids(len(expected), 20_011)
        out = np.full((len(ids), fmt.d), np.nan, np.float32)
        read(store, ids, fmt, out)
        np.testing.assert_array_equal(out, fmt.decode(expected[ids]))

    def test_eight_threads_read_every_row_at_once(self, filled: Filled) -> None:
        store, expected = filled
        in_threads(8, lambda seed: self.check_every_row(store, expected, seed))
        assert store.stats.gathers == 8 * 5 * 2
        assert store.stats.rows == 8 * 5 * 2 * len(expected)

    def test_a_forked_child_reads_the_same_rows(self, filled: Filled) -> None:
        store, expected = filled
        store.gather(random_ids(len(expected)))
        if self.forks:
            in_children([lambda: self.check_every_row(store, expected, 0)])
        self.check_every_row(store, expected, 1)

    def test_four_forked_children_and_their_parent_read_every_row_at_once(
        self, filled: Filled
    ) -> None:
        store, expected = filled
        store.gather(random_ids(len(expected)))
        count = 4 if self.forks else 0
        checks = [partial(self.check_every_row, store, expected, seed) for seed in range(count)]
        acts = [partial(in_children, checks), partial(self.check_every_row, store, expected, 9)]
        in_threads(2, lambda number: acts[number]())

    def test_stats_count_gathers_and_reads_alike(self, filled: Filled) -> None:
        store, _ = filled
        fmt = self.format_of(store)
        before = store.stats
        assert (before.gathers, before.rows, before.bytes, before.under_way) == (0, 0, 0, 0)
        store.gather(np.array([1, 2, 3]))
        read(store, np.array([[4, 5]]), fmt, np.empty((1, 2 * fmt.d), np.float32))
        stats = store.stats
        assert (stats.gathers, stats.rows, stats.bytes) == (2, 5, 5 * store.info.row_bytes)
        assert stats.latency.calls == 2

    # The scope of a read.

    def test_shards_are_the_rows_in_equal_parts_but_the_last_and_cannot_be_written(
        self, filled: Filled
    ) -> None:
        store, expected = filled
        with store.reading(7) as shards:
            assert (shards is not None) == self.mapped
            if shards is not None:
                check_parts(shards, expected)
                for shard in shards:
                    with pytest.raises(ValueError, match="read-only"):
                        shard[0, 0] = 1
        assert store.stats.rows == (7 if self.mapped else 0)

    def test_an_error_within_the_scope_of_a_read_is_passed_on_and_nothing_is_counted(
        self, filled: Filled
    ) -> None:
        store, _ = filled
        with pytest.raises(KeyError, match="mine"):
            with store.reading(3):
                raise KeyError("mine")
        assert store.stats.gathers == 0

    def test_memory_stays_within_the_scope_when_the_store_is_closed(self, filled: Filled) -> None:
        store, expected = filled
        with store.reading(len(expected)) as shards:
            store.close()
            if shards is not None:
                np.testing.assert_array_equal(np.concatenate(shards), expected)
        assert store.stats.gathers == self.mapped

    # Errors, raised before anything is written.

    def test_wrong_ids_are_refused(self, filled: Filled) -> None:
        store, expected = filled
        for ids, error, message in BAD_IDS:
            out = np.full((np.size(ids), store.info.row_bytes), 0xA5, np.uint8)
            with pytest.raises(error, match=message.format(last=len(expected) - 1)):
                store.gather(ids, out=out)
            assert (out == 0xA5).all()
            assert store.stats.gathers == 0

    def test_the_last_row_is_read_and_the_next_is_not(self, filled: Filled) -> None:
        store, expected = filled
        last = len(expected) - 1
        np.testing.assert_array_equal(store.gather(np.array([last]))[0], expected[-1])
        with pytest.raises(RowOutOfRange):
            store.gather(np.array([last + 1]))

    def test_a_buffer_that_does_not_fit_is_refused(self, filled: Filled) -> None:
        store, _ = filled
        width = store.info.row_bytes
        read_only = np.zeros((2, width), np.uint8)
        read_only.flags.writeable = False
        buffers: list[Any] = [
            np.zeros((3, width), np.uint8),
            np.zeros((2, width + 1), np.uint8),
            np.zeros((2, width), np.int8),
            np.zeros(2 * width, np.uint8),
            np.zeros((width, 2), np.uint8).T,
            read_only,
            b"x",
        ]
        for out in buffers:
            with pytest.raises(InputError, match="out: expected"):
                store.gather(np.array([0, 1]), out=out)

    def test_a_closed_store_says_so(self, filled: Filled) -> None:
        store, expected = filled
        with store.reading() as kept:
            pass
        store.close()
        store.close()
        uses: list[Callable[[], object]] = [
            lambda: store.gather(np.array([0])),
            lambda: store.scatter(np.array([0]), expected[:1]),
            lambda: store.reading().__enter__(),
            lambda: store.updating().__enter__(),
        ]
        for use in uses:
            with pytest.raises(StoreError, match="closed"):
                use()
        assert store.info.rows == len(expected)
        assert store.stats.gathers == self.mapped
        assert "closed" in repr(store)
        if kept is not None:  # memory that a reader still holds stays mapped
            np.testing.assert_array_equal(np.concatenate(kept), expected)

    # The whole store.

    def test_rows_are_copied_between_stores_whatever_the_chunk(self, filled: Filled) -> None:
        source, expected = filled
        for chunk in (7, 13, 10**6):
            target = RamStore(*expected.shape)
            copy_rows(source, target, chunk=chunk)
            np.testing.assert_array_equal(target.gather(np.arange(len(expected))), expected)

    def test_rows_are_not_copied_between_stores_of_different_sizes(self, filled: Filled) -> None:
        source, expected = filled
        rows, row_bytes = expected.shape
        for target in (RamStore(rows + 1, row_bytes), RamStore(rows, row_bytes + 1)):
            with pytest.raises(InputError, match="copy_rows"):
                copy_rows(source, target)

    def test_repr_says_what_the_store_holds(self, filled: Filled) -> None:
        store, expected = filled
        info = store.info
        words = [info.kind, f"{len(expected)} rows of {expected.shape[1]} bytes"]
        words.append("writable" if info.writable else "read-only")
        if info.layer is not None:
            words.append(f"layer {info.layer}")
        if info.path is not None:
            words.append(info.path)
        if info.format is not None:
            words.append(f"{info.format.kind}, d = {info.format.d}")
        for word in words:
            assert word in repr(store)

    def check_every_row(self, store: RowStore, expected: np.ndarray, seed: int) -> None:
        """Reads all rows in five random orders: gathered, and as numbers."""
        fmt = self.format_of(store)
        rng = np.random.default_rng(seed)
        for _ in range(5):
            ids = rng.permutation(len(expected))
            np.testing.assert_array_equal(store.gather(ids), expected[ids])
            values = np.full((len(ids), fmt.d), np.nan, np.float32)
            read(store, ids, fmt, values)
            np.testing.assert_array_equal(values, fmt.decode(expected[ids]))


class ReadOnlyStoreTests(StoreTests):
    """Tests of a read-only store."""

    def test_a_store_opened_for_reading_is_not_written(self, filled: Filled) -> None:
        store, expected = filled
        assert not store.info.writable
        uses: list[Callable[[], object]] = [
            lambda: store.scatter(np.array([0]), expected[1:2]),
            lambda: store.updating().__enter__(),
            lambda: store.updating(1, np.array([0])).__enter__(),
        ]
        for use in uses:
            with pytest.raises(StoreError, match="read-only"):
                use()
        np.testing.assert_array_equal(store.gather(np.arange(len(expected))), expected)
