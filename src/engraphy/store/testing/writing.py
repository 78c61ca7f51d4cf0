"""What holds for a store that can be written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ...errors import InputError, RowOutOfRange, StoreError
from ..names import names_of
from .reading import BAD_IDS, Filled, StoreTests
from .tools import check_changed, check_parts, in_threads, write_rows


class WritableStoreTests(StoreTests):
    """Tests of a store that can be written."""

    # Writing.

    def test_scattered_rows_are_gathered_and_the_others_stay(self, filled: Filled) -> None:
        store, expected = filled
        ids, new = self.other_rows(expected, 40)
        store.scatter(ids, new)
        check_changed(store, expected, ids, new)

    def test_of_an_id_given_twice_the_last_row_stays(self, filled: Filled) -> None:
        store, expected = filled
        _, new = self.other_rows(expected, 5)
        store.scatter(np.array([9, 30, 9, 2, 9]), new)
        np.testing.assert_array_equal(store.gather(np.array([9, 30, 2])), new[[4, 1, 3]])

    def test_a_wrong_scatter_writes_nothing(self, filled: Filled) -> None:
        store, expected = filled
        _, new = self.other_rows(expected, 2)
        good = np.array([0, 1])
        wrong: list[tuple[Any, Any, type[Exception]]] = [
            (np.array([0, len(expected)]), new, RowOutOfRange),
            (np.array([0, -1]), new, RowOutOfRange),
            (np.array([0]), new, InputError),
            (good.astype(np.int32), new, InputError),
            (good, new[:, 1:], InputError),
            (good, new.view(np.int8), InputError),
            (good, new.tolist(), InputError),
        ]
        for ids, rows, error in wrong:
            with pytest.raises(error):
                store.scatter(ids, rows)
        np.testing.assert_array_equal(store.gather(np.arange(len(expected))), expected)

    # Updating in place, or in the way that a caller takes if that is not possible.

    def test_updated_rows_are_gathered_and_the_others_stay(self, filled: Filled) -> None:
        store, expected = filled
        store.gather(np.arange(len(expected)))  # what a cache would keep
        ids, new = self.other_rows(expected, 40)
        with store.updating(40, ids) as shards:
            assert (shards is not None) == self.updatable
            write_rows(store, shards, ids, new)
        check_changed(store, expected, ids, new)

    def test_an_update_is_counted_like_a_gather(self, filled: Filled) -> None:
        store, _ = filled
        with store.updating(7, np.arange(7)):
            pass
        stats = store.stats
        assert (stats.gathers, stats.rows) == ((1, 7) if self.updatable else (0, 0))

    def test_memory_to_update_is_the_rows_in_equal_parts_but_the_last(self, filled: Filled) -> None:
        store, expected = filled
        with store.updating(ids=np.arange(len(expected))) as shards:
            assert (shards is not None) == self.updatable
            if shards is not None:
                check_parts(shards, expected)
                assert all(shard.flags.writeable for shard in shards)

    def test_updated_rows_have_other_names(self, filled: Filled) -> None:
        store, expected = filled
        ids, new = self.other_rows(expected, 3)
        before = names_of(store)
        with store.updating(3, ids) as shards:
            write_rows(store, shards, ids, new)
            meanwhile = names_of(store)
        after = names_of(store)
        assert not set(before) & {*meanwhile, *after}
        assert bool(set(meanwhile) & set(after)) == (not self.updatable)

    def test_an_error_within_an_update_is_passed_on_and_the_store_goes_on(
        self, filled: Filled
    ) -> None:
        store, expected = filled
        ids, new = self.other_rows(expected, 3)
        before = names_of(store)
        with pytest.raises(KeyError, match="mine"):
            with store.updating(3, ids) as shards:
                write_rows(store, shards, ids, new)
                raise KeyError("mine")
        assert store.stats.gathers == 0
        assert not set(before) & set(names_of(store))
        with store.updating(3, ids) as shards:
            write_rows(store, shards, ids, new)
        check_changed(store, expected, ids, new)

    def test_wrong_ids_are_not_updated(self, filled: Filled) -> None:
        store, expected = filled
        before = names_of(store)
        for ids, error, message in BAD_IDS:
            if ids is None:  # any row
                continue
            with pytest.raises(error, match=message.format(last=len(expected) - 1)):
                store.updating(1, ids).__enter__()
        assert names_of(store) == before
        assert store.stats.gathers == 0

    def test_memory_to_update_stays_within_the_scope_when_the_store_is_closed(
        self, filled: Filled
    ) -> None:
        store, expected = filled
        with store.updating(1, np.array([5])) as shards:
            store.close()
            if shards is not None:
                shards[0][5] = expected[6]
        with pytest.raises(StoreError, match="closed"):
            store.updating().__enter__()
        assert store.stats.gathers == self.updatable

    def test_four_threads_update_rows_of_their_own(self, filled: Filled) -> None:
        store, expected = filled
        ids, new = self.other_rows(expected, 40)

        def update(number: int) -> None:
            own = slice(number, None, 4)
            for id_, row in zip(ids[own], new[own], strict=True):
                only = np.array([id_])
                with store.updating(1, only) as shards:
                    write_rows(store, shards, only, row[None])

        in_threads(4, update)
        check_changed(store, expected, ids, new)

    def other_rows(self, expected: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Distinct ids, int64 [count], and rows that they do not have yet."""
        ids = np.random.default_rng(0).permutation(len(expected))[:count]
        return ids, expected[ids] ^ 0x11
