"""The public suite: its docstring is enough to use it, and it finds stores that are wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import engraphy.store.testing
from engraphy.store import RamStore, StoreInfo
from engraphy.store.testing import WritableStoreTests
from tests.tools.store_builders import NotMapped

HEADER = """
import numpy as np
from engraphy.store import RowStore, StoreInfo

class MyStore(RowStore):
    def __init__(self, rows, row_bytes):
        super().__init__()
        self._rows_NR = np.zeros((rows, row_bytes), np.uint8)

    @property
    def info(self):
        return StoreInfo("mine", *self._rows_NR.shape, writable=True)

    def _gather(self, ids_N, out_NR):
        out_NR[...] = self._rows_NR[ids_N]

    def _scatter(self, ids_N, rows_NR):
        self._rows_NR[ids_N] = rows_NR
"""


def test_a_store_of_others_is_tested_as_the_docstring_says(tmp_path):
    doc = engraphy.store.testing.__doc__ or ""
    example = textwrap.dedent(doc[doc.index("    from") : doc.index("pytest finds")])
    (tmp_path / "test_mine.py").write_text(f"{HEADER}\n{example}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stdout + run.stderr
    expected = [name for name in dir(WritableStoreTests) if name.startswith("test_")]
    assert f"{len(expected) + 2} passed" in run.stdout  # one of them has three counts


def test_neither_engraphy_nor_its_stores_import_the_suite_or_pytest():
    code = "import sys, engraphy, engraphy.store, engraphy.store.wrapper; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"pytest", "engraphy.store.testing"} & set(run.stdout.split())
    assert "engraphy.store.base" in run.stdout


class Shuffled(NotMapped):
    def _gather(self, ids_N, out_NR):
        out_NR[...] = self._rows_NR[np.sort(ids_N)]


class Forgetful(NotMapped):
    def _scatter(self, ids_N, rows_NR):
        self._rows_NR[ids_N[1:]] = rows_NR[1:]


class FirstStays(NotMapped):
    def _scatter(self, ids_N, rows_NR):
        self._rows_NR[ids_N[::-1]] = rows_NR[::-1]


class Homebound(NotMapped):
    """Has no rows in a forked child."""

    def __init__(self, rows, row_bytes):
        super().__init__(rows, row_bytes)
        self._home = os.getpid()

    def _gather(self, ids_N, out_NR):
        super()._gather(ids_N, out_NR)
        if os.getpid() != self._home:
            out_NR[...] = 0


class Hasty(NotMapped):
    def _check_writable(self, ids_N):
        return self.info


class Uncounted(NotMapped):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        end = self._counters.end
        self._counters.end = lambda *_: end()  # as of a call that has raised


class Unnamed(RamStore):
    def _forget_names(self):
        pass


class OpenMemory(RamStore):
    def _begin_read(self):
        shards, _ = super()._begin_read()
        return [shard.copy() for shard in shards], None


class Stale(RamStore):
    """Gives memory for an update that is not the rows."""

    def _begin_update(self, ids_N):
        shards, scope = super()._begin_update(ids_N)
        return [shard.copy() for shard in shards or ()], scope


class Silent(NotMapped):
    """Its repr says nothing."""

    @property
    def info(self):
        return StoreInfo("silent", *self._rows_NR.shape, writable=True)

    def __repr__(self):
        return "silent"


WRONG = [
    (Homebound, "a_forked_child_reads_the_same_rows"),
    (Homebound, "four_forked_children_and_their_parent_read_every_row_at_once"),
    (Shuffled, "gather_gives_the_rows_in_the_order_of_the_ids_and_fills_a_poisoned_buffer", 500),
    (Forgetful, "scattered_rows_are_gathered_and_the_others_stay"),
    (FirstStays, "of_an_id_given_twice_the_last_row_stays"),
    (Hasty, "a_wrong_scatter_writes_nothing"),
    (Hasty, "wrong_ids_are_not_updated"),
    (Uncounted, "stats_count_gathers_and_reads_alike"),
    (Uncounted, "eight_threads_read_every_row_at_once"),
    (Unnamed, "updated_rows_have_other_names"),
    (Unnamed, "an_error_within_an_update_is_passed_on_and_the_store_goes_on"),
    (OpenMemory, "shards_are_the_rows_in_equal_parts_but_the_last_and_cannot_be_written"),
    (Stale, "updated_rows_are_gathered_and_the_others_stay"),
    (Silent, "repr_says_what_the_store_holds"),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: f"{case[0].__name__}-{case[1]}")
def test_a_store_that_is_wrong_fails_the_test_of_it(case, tmp_path):
    kind, name, *arguments = case

    class Suite(WritableStoreTests):
        mapped = updatable = issubclass(kind, RamStore)

        def make_store(self, rows_NR, folder):
            store = kind(*rows_NR.shape)
            if isinstance(store, RamStore):
                RamStore._scatter(store, np.arange(len(rows_NR)), rows_NR)
            else:
                store._rows_NR[...] = rows_NR
            return store

    suite = Suite()
    with pytest.raises((AssertionError, IndexError, TypeError, pytest.fail.Exception)):
        getattr(suite, f"test_{name}")(suite.make_filled(tmp_path), *arguments)


def test_a_suite_without_a_store_says_what_is_missing(tmp_path):
    class Suite(WritableStoreTests):
        pass

    with pytest.raises(NotImplementedError, match="Suite: expected a method make_store"):
        Suite().make_filled(tmp_path)
