"""Rows arrive as the store has them, in order, in memory that nothing else writes to, and nothing
is left behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch

from engraphy.errors import ConfigError, InputError, RowOutOfRange, StoreError
from engraphy.memory.buffers import BufferPool
from engraphy.memory.prefetch import Prefetcher
from engraphy.rows import RowFormat
from engraphy.store import RamStore, RowStore, StoreInfo
from engraphy.store.testing.tools import fork

FMT, ROWS = RowFormat("int8", 16), 500
LAYERS = (1, 14)


class Held(RowStore):
    """Rows that come when they are let go, from a store that is not mapped."""

    def __init__(self, records_NR: np.ndarray) -> None:
        super().__init__()
        self.records_NR, self.go_on, self.begun = records_NR, threading.Event(), threading.Event()
        self.order: list[int] = []
        self.fails: Exception | None = None

    @property
    def info(self) -> StoreInfo:
        return StoreInfo("held", *self.records_NR.shape, writable=True)

    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None:
        self.begun.set()
        assert self.go_on.wait(20)
        if self.fails is not None:
            raise self.fails
        self.order.append(int(ids_N[0]) if len(ids_N) else -1)
        out_NR[...] = self.records_NR[ids_N]

    def _scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        raise NotImplementedError


def values_of(layer: int) -> np.ndarray:
    return np.random.default_rng(layer).standard_normal((ROWS, FMT.d), np.float32)


def ram() -> dict[int, tuple[RowStore, RowFormat]]:
    stores = {layer: RamStore(ROWS, FMT.row_bytes, layer) for layer in LAYERS}
    for layer, store in stores.items():
        store.scatter(np.arange(ROWS), FMT.encode(values_of(layer)))
    return {layer: (store, FMT) for layer, store in stores.items()}


def held(open_at_once: bool = False) -> tuple[Held, dict[int, tuple[RowStore, RowFormat]]]:
    store = Held(FMT.encode(values_of(1)))
    if open_at_once:
        store.go_on.set()
    return store, {1: (store, FMT)}


def some_ids(seed: int, batch: int = 2, tokens: int = 3, columns: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, ROWS, (batch, tokens, columns))


def expected(layer: int, ids_BTC: np.ndarray) -> np.ndarray:
    decoded_Nd = FMT.decode(FMT.encode(values_of(layer)))[ids_BTC.reshape(-1)]
    batch, tokens, columns = ids_BTC.shape
    return decoded_Nd.reshape(batch, tokens, columns * FMT.d)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "engraphy-prefetch"]


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    if threads():
        gc.collect()
    until(lambda: not threads())


# Rows.


@pytest.mark.parametrize("in_memory", [True, False])
def test_rows_go_to_the_device_that_was_asked_for(in_memory, monkeypatch):
    """The meta device has no values, but every machine has it: shape, dtype and device arrive."""
    monkeypatch.setattr(RamStore, "in_memory", in_memory)
    ids = {layer: some_ids(layer, 1, 5) for layer in LAYERS}
    with Prefetcher(ram()) as prefetcher:
        rows = prefetcher.submit(ids, device="meta").wait()
        here = prefetcher.submit(ids).wait()
    with Prefetcher(ram(), device="meta") as elsewhere:
        assert elsewhere.submit(ids).wait()[LAYERS[0]].device.type == "meta"
        assert elsewhere.submit(ids, device="cpu").wait()[LAYERS[0]].device.type == "cpu"
    for layer in LAYERS:
        assert rows[layer].device.type == "meta" and here[layer].device.type == "cpu"
        assert rows[layer].shape == here[layer].shape and rows[layer].dtype == torch.float32
        np.testing.assert_array_equal(here[layer].numpy(), expected(layer, ids[layer]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")
@pytest.mark.parametrize("in_memory", [True, False])
def test_rows_on_a_gpu_are_those_of_the_stores_while_buffers_are_reused(in_memory, monkeypatch):
    monkeypatch.setattr(RamStore, "in_memory", in_memory)
    with Prefetcher(ram()) as prefetcher:
        for seed in range(50):
            ids = {layer: some_ids(seed + layer, 4, 200) for layer in LAYERS}
            rows = prefetcher.submit(ids, device="cuda").wait()
            for layer in LAYERS:
                assert rows[layer].is_cuda
                np.testing.assert_array_equal(rows[layer].cpu(), expected(layer, ids[layer]))


@pytest.mark.parametrize(
    "shape", [(1, 1, 4), (4, 1, 4), (1, 700, 4), (2, 300, 8), (3, 0, 4), (0, 5, 4), (2, 2, 1)]
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_rows_of_every_layer_are_those_of_the_stores_for_any_batch(shape, in_memory, monkeypatch):
    monkeypatch.setattr(RamStore, "in_memory", in_memory)
    ids = {layer: some_ids(layer, *shape) for layer in LAYERS}
    with Prefetcher(ram()) as prefetcher:
        rows = prefetcher.submit(ids).wait()
    assert list(rows) == list(LAYERS)
    for layer in LAYERS:
        assert rows[layer].dtype == torch.float32 and rows[layer].device.type == "cpu"
        np.testing.assert_array_equal(rows[layer].numpy(), expected(layer, ids[layer]))


def test_a_few_rows_of_memory_are_read_at_once_and_many_by_the_thread():
    with Prefetcher(ram()) as prefetcher:
        prefetcher.submit({1: some_ids(0)}).wait()
        assert not threads() and prefetcher.stats.inline == 1
        prefetcher.submit({1: some_ids(0, 2, 300, 4)}).wait()
        assert (
            len(threads()) == 1 and prefetcher.stats.inline == 1 and prefetcher.stats.tickets == 2
        )


def test_submit_does_not_wait_for_a_store_that_does():
    store, sources = held()
    with Prefetcher(sources) as prefetcher:
        ticket = prefetcher.submit({1: some_ids(3)})
        assert store.begun.wait(20) and prefetcher.stats.waiting == 1
        store.go_on.set()
        np.testing.assert_array_equal(ticket.wait()[1].numpy(), expected(1, some_ids(3)))
        assert prefetcher.stats.waiting == 0 and prefetcher.stats.waited.calls == 1


def test_tickets_are_read_first_in_first_out_by_one_thread_whoever_waits_first():
    store, sources = held()
    with Prefetcher(sources) as prefetcher:
        tickets = [prefetcher.submit({1: np.full((1, 1, 1), number)}) for number in range(20)]
        assert len(threads()) == 1
        store.go_on.set()
        for ticket in reversed(tickets):
            ticket.wait()
    assert store.order == list(range(20))


def test_ids_may_be_overwritten_once_they_are_submitted():
    store, sources = held()
    with Prefetcher(sources) as prefetcher:
        ids = some_ids(5)
        ticket = prefetcher.submit({1: ids})
        ids[...] = 0
        store.go_on.set()
        np.testing.assert_array_equal(ticket.wait()[1].numpy(), expected(1, some_ids(5)))


def test_waiting_again_gives_the_same_tensors():
    with Prefetcher(ram()) as prefetcher:
        ticket = prefetcher.submit({1: some_ids(0, 1, 400, 4)})
        first = ticket.wait()
        first.pop(1).mul_(1)
        assert ticket.wait()[1] is ticket.wait()[1]


def test_many_threads_submit_and_wait():
    wrong = []
    with Prefetcher(ram(), limit=50_000) as prefetcher:

        def work(seed: int) -> None:
            for step in range(15):
                ids = some_ids(seed * 100 + step, 1, 300, 4)
                if not np.array_equal(
                    prefetcher.submit({14: ids}).wait()[14].numpy(), expected(14, ids)
                ):
                    wrong.append(seed)

        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not wrong


# Buffers.


@pytest.mark.parametrize(
    "keep", ["tensor", "view", "array", "view of an array", "leaf saved for backward"]
)
def test_rows_that_are_still_used_stay_unchanged_through_a_hundred_later_tickets(keep):
    ids = some_ids(0, 2, 400, 4)
    with Prefetcher(ram()) as prefetcher:
        rows = prefetcher.submit({1: ids}).wait().pop(1)
        saved = {
            "tensor": lambda: rows,
            "view": lambda: rows.view(-1, 8)[3:],
            "array": lambda: rows.numpy(),
            "view of an array": lambda: rows.numpy().reshape(-1)[5:][2:],
            "leaf saved for backward": lambda: rows.requires_grad_() ** 2,
        }[keep]()
        before = (rows if keep.startswith("leaf") else torch.as_tensor(saved)).detach().clone()
        leaf = weakref.ref(rows) if keep.startswith("leaf") else None
        if leaf is None:
            del rows
        for seed in range(1, 101):
            prefetcher.submit({1: some_ids(seed, 2, 400, 4)}).wait()
        if keep.startswith("leaf"):
            saved.sum().backward()
            torch.testing.assert_close(rows.grad, 2 * before, rtol=0, atol=0)
        else:
            assert torch.equal(torch.as_tensor(saved), before)


def test_a_buffer_is_used_again_when_the_last_tensor_over_it_is_gone_and_not_before():
    pool = BufferPool(1 << 30)
    first = pool.take((1000, 2))
    address, tensor = first.ctypes.data, torch.from_numpy(first)
    del first
    part = tensor[5:7].numpy()
    del tensor
    assert pool.take((1000, 2)).ctypes.data != address
    del part
    assert pool.take((500, 3)).ctypes.data == address  # of the same size class


def test_an_idle_prefetcher_holds_no_rows():
    with Prefetcher(ram()) as prefetcher:
        ticket = prefetcher.submit({1: some_ids(0, 2, 400, 4)})
        rows = weakref.ref(ticket.wait()[1])
        del ticket
        until(lambda: rows() is None)


def test_memory_is_bounded_by_what_is_in_use_at_a_time():
    pool, addresses = BufferPool(1 << 30), set()
    for _ in range(100):
        addresses.add(pool.take((3000,)).ctypes.data)
    assert len(addresses) <= 2


def test_the_pool_keeps_no_more_than_its_limit():
    pool = BufferPool(100_000)
    in_use = [pool.take((5000,)) for _ in range(20)]
    watched = [weakref.ref(array.base) for array in in_use]
    del in_use
    kept = pool.take((1,))
    assert sum(memory().nbytes for memory in watched if memory() is not None) <= 100_000
    assert kept.shape == (1,)


def test_buffers_of_a_pool_that_is_gone_are_not_kept():
    pool = BufferPool(1 << 30)
    one, other = pool.take((5000,)), pool.take((5000,))
    memory = weakref.ref(one.base)
    del pool, one
    assert memory() is None and other.shape == (5000,)


def test_collecting_garbage_at_any_moment_neither_hangs_nor_spoils_rows():
    threshold = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        with Prefetcher(ram()) as prefetcher:
            for seed in range(30):
                ids = some_ids(seed, 1, 300, 4)
                rows = prefetcher.submit({1: ids}).wait()
                cycle: list = [rows]
                cycle.append(cycle)  # goes with the collector alone
                np.testing.assert_array_equal(rows[1].numpy(), expected(1, ids))
    finally:
        gc.set_threshold(*threshold)


# Limits, errors, giving up.


def test_submit_waits_while_the_limit_is_in_flight_and_goes_on_when_rows_are_read():
    store, sources = held()
    ticket_bytes = some_ids(0).size * FMT.d * 4
    with Prefetcher(sources, limit=2 * ticket_bytes) as prefetcher:
        tickets = [prefetcher.submit({1: some_ids(seed)}) for seed in range(2)]
        last: list = []
        blocked = threading.Thread(target=lambda: last.append(prefetcher.submit({1: some_ids(2)})))
        blocked.start()
        blocked.join(0.1)
        assert blocked.is_alive() and prefetcher.stats.bytes_in_flight == 2 * ticket_bytes
        store.go_on.set()
        blocked.join(20)
        for seed, ticket in enumerate([*tickets, *last]):
            np.testing.assert_array_equal(ticket.wait()[1].numpy(), expected(1, some_ids(seed)))
        until(lambda: prefetcher.stats.bytes_in_flight == 0)


def test_a_ticket_larger_than_the_limit_is_taken_when_nothing_else_is_under_way():
    _, sources = held(open_at_once=True)
    with Prefetcher(sources, limit=1) as prefetcher:
        for seed in range(3):
            ticket = prefetcher.submit({1: some_ids(seed)})
            np.testing.assert_array_equal(ticket.wait()[1].numpy(), expected(1, some_ids(seed)))


@pytest.mark.parametrize("inline", [True, False])
def test_ids_out_of_range_reach_the_waiter_each_time(inline):
    sources = ram() if inline else held(open_at_once=True)[1]
    with Prefetcher(sources) as prefetcher:
        wrong = prefetcher.submit({1: np.array([[[3, ROWS]]])})
        right = prefetcher.submit({1: some_ids(0)})
        for _ in range(2):
            with pytest.raises(RowOutOfRange, match=f"row id {ROWS}"):
                wrong.wait()
        np.testing.assert_array_equal(right.wait()[1].numpy(), expected(1, some_ids(0)))


def test_a_store_that_fails_or_is_closed_fails_its_ticket_and_no_other():
    store, sources = held(open_at_once=True)
    store.fails = OSError("the disk is gone")
    with Prefetcher(sources) as prefetcher:
        failing = prefetcher.submit({1: some_ids(0)})
        with pytest.raises(OSError, match="disk is gone"):
            failing.wait()
        store.fails = None
        prefetcher.submit({1: some_ids(1)}).wait()
        store.close()
        with pytest.raises(StoreError, match="closed"):
            prefetcher.submit({1: some_ids(1)}).wait()


def test_a_failed_ticket_holds_no_buffer():
    store, sources = held(open_at_once=True)
    store.fails = OSError("the disk is gone")
    seen: list[weakref.ref] = []
    with Prefetcher(sources) as prefetcher:
        pool = prefetcher._queue.transfer(torch.device("cpu")).pool
        take = pool.take
        pool.take = lambda shape, dtype: (
            seen.append(weakref.ref(made := take(shape, dtype))),
            made,
        )[1]
        ticket = prefetcher.submit({1: some_ids(0, 1, 300)})
        with pytest.raises(OSError):
            ticket.wait()
        until(lambda: seen and seen[0]() is None)


@pytest.mark.parametrize("moment", ["waiting", "being read", "read", "failed"])
def test_a_cancelled_ticket_never_gives_rows_and_frees_its_memory(moment):
    store, sources = held()
    with Prefetcher(sources) as prefetcher:
        other = prefetcher.submit({1: some_ids(1)})
        ticket = other if moment == "being read" else prefetcher.submit({1: some_ids(0)})
        assert store.begun.wait(20)
        if moment in ("read", "failed"):
            store.fails = OSError() if moment == "failed" else None
            store.go_on.set()
            until(lambda: ticket.state in ("done", "failed"))
        kept = [weakref.ref(rows) for rows in ticket._rows.values()]
        ticket.cancel()
        ticket.cancel()
        store.go_on.set()
        with pytest.raises(StoreError, match="cancelled"):
            ticket.wait()
        if moment == "waiting":
            other.wait()
            until(lambda: prefetcher.stats.waiting == 0)
            assert len(store.order) == 1  # it was not read at all
        until(lambda: prefetcher.stats.bytes_in_flight == 0)
        assert (
            not ticket._rows
            and all(rows() is None for rows in kept)
            and prefetcher.stats.cancelled == 1
        )


def test_a_cancelled_ticket_wakes_who_waits_for_it_and_lets_the_next_submit_in():
    store, sources = held()
    ticket_bytes = some_ids(0).size * FMT.d * 4
    with Prefetcher(sources, limit=2 * ticket_bytes) as prefetcher:
        first, second = (prefetcher.submit({1: some_ids(seed)}) for seed in range(2))
        assert store.begun.wait(20)
        errors: list = []

        def wait() -> None:
            try:
                second.wait()
            except StoreError as error:
                errors.append(error)

        waiter = threading.Thread(target=wait)
        more = threading.Thread(target=lambda: prefetcher.submit({1: some_ids(2)}))
        waiter.start()
        more.start()
        second.cancel()
        waiter.join(20)
        more.join(20)
        assert len(errors) == 1 and not more.is_alive()
        store.go_on.set()
        first.wait()


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ({2: some_ids(0)}, ConfigError, r"layers of \[1, 14\], found 2"),
        ({1: some_ids(0)[0]}, InputError, "B, T, C"),
        ({1: some_ids(0).astype(np.int32)}, InputError, "int32"),
        ({14: [[[1]]]}, InputError, "list"),
    ],
)
def test_what_cannot_be_row_ids_is_refused_at_once(ids, error, message):
    with Prefetcher(ram()) as prefetcher:
        with pytest.raises(error, match=message):
            prefetcher.submit(ids)
        assert prefetcher.stats.tickets == 0


def test_sources_and_limits_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="layer 1.*bytes"):
        Prefetcher({1: (RamStore(5, 7), FMT)})
    for limit in (0, -1, True, 1.5):
        with pytest.raises(ConfigError, match="limit"):
            Prefetcher(ram(), limit=limit)


# The end.


def test_closing_reads_what_was_submitted_and_ends_the_thread():
    store, sources = held(open_at_once=True)
    prefetcher = Prefetcher(sources)
    tickets = [prefetcher.submit({1: some_ids(seed)}) for seed in range(10)]
    prefetcher.close()
    prefetcher.close()
    assert not threads()
    for seed, ticket in enumerate(tickets):
        np.testing.assert_array_equal(ticket.wait()[1].numpy(), expected(1, some_ids(seed)))
    with pytest.raises(StoreError, match="closed"):
        prefetcher.submit({1: some_ids(0)})
    store.gather(np.array([1]))  # the stores are not the prefetcher's to close


def test_a_prefetcher_that_is_dropped_ends_its_thread_after_the_last_ticket():
    store, sources = held()
    ticket = Prefetcher(sources).submit({1: some_ids(4)})
    store.go_on.set()
    np.testing.assert_array_equal(ticket.wait()[1].numpy(), expected(1, some_ids(4)))
    del ticket
    until(lambda: not threads())


@pytest.mark.slow
def test_a_process_that_ends_while_rows_are_read_ends_in_peace():
    code = """
import numpy as np
from engraphy import RowFormat
from engraphy.memory.prefetch import Prefetcher
from engraphy.store import RamStore
prefetcher = Prefetcher({1: (RamStore(50_000, 264), RowFormat("fp8", 256))})
rng = np.random.default_rng(0)
tickets = [prefetcher.submit({1: rng.integers(0, 50_000, (1, 4000, 24))}) for _ in range(5)]
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert run.returncode == 0 and not run.stderr


def hold(lock, locked: threading.Event, unlock: threading.Event) -> None:
    with lock:
        locked.set()
        unlock.wait(20)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_reads_its_own_tickets_and_those_that_its_parent_was_reading():
    store, sources = held()
    with Prefetcher(sources) as prefetcher:
        being_read, waiting = (prefetcher.submit({1: some_ids(seed)}) for seed in range(2))
        assert store.begun.wait(20)
        locked, unlock = threading.Event(), threading.Event()
        other = threading.Thread(target=hold, args=(prefetcher._queue._changed, locked, unlock))
        other.start()
        assert locked.wait(20)
        child = fork()
        if not child:
            signal.alarm(20)
            store.go_on = threading.Event()  # the parent's lock may be held by its thread
            store.go_on.set()
            tickets = [being_read, waiting, prefetcher.submit({1: some_ids(2)})]
            right = [
                np.array_equal(ticket.wait()[1].numpy(), expected(1, some_ids(seed)))
                for seed, ticket in enumerate(tickets)
            ]
            os._exit(0 if right == [True] * 3 and prefetcher.stats.bytes_in_flight == 0 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        unlock.set()
        other.join()
        store.go_on.set()
        assert being_read.wait() and waiting.wait()


def test_a_thread_that_the_system_does_not_start_is_a_store_error_and_the_next_ticket_is_read(
    monkeypatch,
):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    held = Held(FMT.encode(values_of(1)))
    held.go_on.set()
    prefetcher, ids = Prefetcher({1: (held, FMT)}), np.zeros((1, 2, 3), np.int64)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(2):
            with pytest.raises(StoreError, match="the system starts none .can't start new thread"):
                prefetcher.submit({1: ids})
    assert prefetcher.stats.waiting == prefetcher.stats.bytes_in_flight == 0
    assert prefetcher.submit({1: ids}).wait()[1].shape == (1, 2, 3 * FMT.d)
    prefetcher.close()
