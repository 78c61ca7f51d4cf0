"""Servers of rows that fail: rows are right or an error names the cause, within the deadline.

`make test-rack` does the same with many servers, restarts and a million requests.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from engraphy.errors import DigestMismatch, StoreError
from engraphy.store import RamStore, open_store, publish_pool
from engraphy.store import remote_location as location_module
from engraphy.store import remote_wire as wire
from engraphy.store.remote_arrow import flight
from engraphy.store.remote_watch import Pace
from engraphy.store.testing import in_threads
from tests.tools.cut_proxy import CutProxy
from tests.tools.row_servers import ServerProcess, free_port, served, until
from tests.tools.store_builders import LAYER, sealed, some_ids

ROWS, WIDTH = 2000, 64


class Gated(RamStore):
    """Rows in memory whose reads wait while `gate` is closed.

    Attributes:
        waiting: reads that wait.
    """

    def __init__(self, rows_NR):
        super().__init__(*rows_NR.shape, LAYER)
        self.scatter(np.arange(len(rows_NR)), rows_NR)
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = 0

    def gather(self, ids_N, out=None):
        if not self.gate.is_set():
            self.waiting += 1
            self.gate.wait(20)
            self.waiting -= 1
        return super().gather(ids_N, out)


@pytest.fixture
def rows():
    return np.random.default_rng(3).integers(0, 256, (ROWS, WIDTH), np.uint8)


@contextmanager
def two(rows, options=""):
    """A client of two servers with the same rows, these two, and the rows behind each."""
    stores = [Gated(rows), Gated(rows)]
    with served({LAYER: stores[0]}) as first, served({LAYER: stores[1]}) as second:
        url = f"remote:127.0.0.1:{first.port},127.0.0.1:{second.port}{options}"
        client = open_store(url, layer=LAYER)
        try:
            yield client, (first, second), stores
        finally:
            for store in stores:
                store.gate.set()
            client.close()


def warmed(client, rows, calls=60):
    """Reads until the client knows how long a call takes."""
    for seed in range(calls):
        ids = some_ids(len(rows), 48, seed)
        np.testing.assert_array_equal(client.gather(ids), rows[ids])


# Late, or silent.


def test_a_stalled_server_is_hedged_and_then_left_alone(rows):
    with two(rows) as (client, _, stores):
        warmed(client, rows)
        stores[0].gate.clear()
        begun = time.monotonic()
        warmed(client, rows, 20)
        assert time.monotonic() - begun < 5
        stats = client.servers
        assert stats[0].hedges >= 1 and stats[1].requests > stats[0].requests
        stores[0].gate.set()
        time.sleep(0.6)  # its penalty
        before = client.servers[0].requests
        warmed(client, rows, 20)
        assert client.servers[0].requests > before


def test_only_the_caller_writes_into_its_buffer(rows):
    """The late answer of the first server must not reach a buffer that is used again."""
    with two(rows) as (client, _, stores):
        warmed(client, rows)
        out = np.empty((48, WIDTH), np.uint8)
        ids = some_ids(ROWS, 48, 1)
        for store in stores:
            store.gate.clear()
            until(lambda: client.servers[0].under_way == 0, 5)
            if store is stores[0]:
                continue
            threading.Timer(0.2, stores[1].gate.set).start()
            client.gather(ids, out=out)
            np.testing.assert_array_equal(out, rows[ids])
        out[...] = 0xA5
        stores[0].gate.set()
        until(lambda: not stores[0].waiting, 5)
        time.sleep(0.05)
        assert (out == 0xA5).all()


def test_a_server_that_accepts_connections_and_says_nothing_holds_no_call(rows):
    """Opening a stream cannot be cancelled, so nobody waits for it alone."""
    with served({LAYER: Gated(rows)}) as second:
        with served({LAYER: Gated(rows)}) as first:
            url = f"remote:127.0.0.1:{first.port},127.0.0.1:{second.port}"
            client = open_store(url, layer=LAYER)
            warmed(client, rows, 10)
        with socket.create_server(("127.0.0.1", first.port)):
            begun = time.monotonic()
            warmed(client, rows, 30)
            assert time.monotonic() - begun < 1.5
        client.close()


def test_without_another_server_the_deadline_ends_the_call_and_names_the_server(rows):
    store = Gated(rows)
    with served({LAYER: store}) as server:
        client = open_store(f"remote:127.0.0.1:{server.port}?deadline=0.4", layer=LAYER)
        warmed(client, rows, 3)
        store.gate.clear()
        begun = time.monotonic()
        message = rf"grpc://127.0.0.1:{server.port}: expected 48 rows within the deadline of 0.4 s"
        with pytest.raises(StoreError, match=message):
            client.gather(some_ids(ROWS, 48))
        assert 0.3 < time.monotonic() - begun < 3
        store.gate.set()
        warmed(client, rows, 3)
        client.close()


def test_closing_a_store_ends_the_calls_that_wait(rows):
    with two(rows, "?deadline=3") as (client, _, stores):
        warmed(client, rows, 2)
        for store in stores:
            store.gate.clear()
        errors = []

        def read():
            try:
                client.gather(some_ids(ROWS, 48))
            except StoreError as error:
                errors.append(str(error))

        reader = threading.Thread(target=read)
        reader.start()
        until(lambda: stores[0].waiting + stores[1].waiting)
        client.close()
        reader.join(10)
        assert len(errors) == 1 and "closed" in errors[0]


def test_a_slow_fleet_does_not_get_twice_the_work():
    pace = Pace()
    assert pace.late_after(48) == pytest.approx(0.05)
    for _ in range(100):
        pace.note(48, 0.001)
        pace.note(20_000, 0.04)
    assert pace.late_after(48) == pytest.approx(0.002)  # the least
    assert pace.late_after(20_000) == pytest.approx(0.04)
    hedges = sum(pace.may_hedge() for _ in range(1000))
    assert hedges == 16
    for _ in range(100):
        pace.note(48, 0.001)
    assert sum(pace.may_hedge() for _ in range(1000)) in (9, 10)
    assert pace.far_after(20_000) == pytest.approx(0.4)


# Cut.


def test_a_cut_stream_is_read_again_on_a_new_one(rows):
    with served({LAYER: Gated(rows)}) as server, CutProxy(server.port) as proxy:
        client = open_store(f"remote:127.0.0.1:{proxy.port}", layer=LAYER)
        warmed(client, rows, 3)
        ids = some_ids(ROWS, 1500)
        for allowed in (1, 9, 700, 5_000, 60_000):
            proxy.allow(allowed)
            np.testing.assert_array_equal(client.gather(ids), rows[ids])
        assert proxy.cuts == 5
        client.close()


def test_a_client_that_goes_away_in_the_middle_leaves_nothing_at_the_server(rows):
    store = Gated(rows)
    with served({LAYER: store}) as server:
        store.gate.clear()
        client = flight.FlightClient(f"grpc://127.0.0.1:{server.port}")
        streams = [client.do_exchange(wire.descriptor(None, LAYER)) for _ in range(3)]
        for writer, _ in streams:
            writer.begin(wire.IDS)
            writer.write_batch(wire.id_batch(np.arange(1000)))
        until(lambda: store.waiting == 3)
        for _, reader in streams:
            reader.cancel()
        client.close()
        store.gate.set()
        until(lambda: server.health()["streams"] == 0)
        other = open_store(f"remote:127.0.0.1:{server.port}", layer=LAYER)
        warmed(other, rows, 3)
        other.close()


def test_a_client_that_does_not_read_holds_back_its_own_stream_alone(rows):
    store = Gated(rows)
    ids = some_ids(ROWS, wire.MOST_IDS)
    with served({LAYER: store}) as server:
        client = flight.FlightClient(f"grpc://127.0.0.1:{server.port}")
        writer, reader = client.do_exchange(wire.descriptor(None, LAYER))
        writer.begin(wire.IDS)

        def send():
            with pytest.raises(Exception, match="[Cc]ancel"):
                for _ in range(400):  # 200 MB of answers
                    writer.write_batch(wire.id_batch(ids))

        sender = threading.Thread(target=send)
        sender.start()
        answered = -1
        while answered < store.stats.gathers:
            answered = store.stats.gathers
            time.sleep(0.3)
        assert 0 < answered < 40 and server.health()["streams"] == 1
        other = open_store(f"remote:127.0.0.1:{server.port}", layer=LAYER)
        warmed(other, rows, 5)
        other.close()
        reader.cancel()
        sender.join(10)
        client.close()


# Many.


def test_a_thousand_idle_connections_do_not_keep_others_out(rows):
    """Raw connections that begin to speak HTTP/2 and then say nothing."""
    settings = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0" + bytes(4)
    idle = []
    with served({LAYER: Gated(rows)}) as server:
        try:
            for _ in range(1000):
                sock = socket.create_connection(("127.0.0.1", server.port))
                sock.sendall(settings)
                idle.append(sock)
            client = open_store(f"remote:127.0.0.1:{server.port}", layer=LAYER)
            warmed(client, rows, 20)
            client.close()
        finally:
            for sock in idle:
                linger = struct.pack("ii", 1, 0)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                sock.close()


def test_a_full_server_says_that_it_is_busy_and_another_one_answers(rows):
    stores = [Gated(rows), Gated(rows)]
    with (
        served({LAYER: stores[0]}, streams=1) as first,
        served({LAYER: stores[1]}) as second,
    ):
        alone = open_store(f"remote:127.0.0.1:{first.port}?deadline=1", layer=LAYER)
        warmed(alone, rows, 1)  # holds the one stream
        with pytest.raises(StoreError, match="deadline.*busy: expected at most 1 streams"):
            other = open_store(f"remote:127.0.0.1:{first.port}?deadline=0.5", layer=LAYER)
            other.gather(np.arange(5))
        assert 'engraphy_server_refused_total{reason="streams"}' in first.metrics()
        url = f"remote:127.0.0.1:{first.port},127.0.0.1:{second.port}"
        both = open_store(url, layer=LAYER)
        warmed(both, rows, 10)
        for store in (alone, other, both):
            store.close()


def test_many_threads_share_streams_of_which_few_stay_open(rows):
    with two(rows) as (client, servers, _):
        in_threads(16, lambda seed: warmed(client, rows, 10))
        most = 2 * location_module._MOST_IDLE
        until(lambda: sum(server.health()["streams"] for server in servers) <= most)


# Restarts.


def test_draining_sends_clients_elsewhere_without_an_error(rows):
    with two(rows) as (client, servers, _):
        warmed(client, rows, 10)
        servers[0].drain()
        warmed(client, rows, 10)
        until(lambda: servers[0].health()["streams"] == 0)
        assert servers[0].health()["state"] == "draining" and servers[0].wait_idle(5)
        assert not any(server.failures for server in client.servers)
        before = client.servers[1].requests
        warmed(client, rows, 5)
        assert client.servers[1].requests == before + 5


def test_a_replica_with_another_table_is_passed_over(tmp_path):
    expected = sealed(tmp_path / "table")
    sealed(tmp_path / "newer")
    ports = [free_port(), free_port()]
    with served(tmp_path / "table", port=ports[1]):
        with served(tmp_path / "table", port=ports[0]):
            url = f"remote:127.0.0.1:{ports[0]},127.0.0.1:{ports[1]}?deadline=3"
            client = open_store(url, layer=LAYER)
        with served(tmp_path / "newer", port=ports[0]):
            warmed(client, expected, 20)
            assert client.servers[0].requests == 0 and client.servers[0].failures >= 1
    with served(tmp_path / "newer", port=ports[0]), served(tmp_path / "newer", port=ports[1]):
        with pytest.raises(DigestMismatch, match="expected table"):
            client.gather(np.arange(5))
    client.close()


def test_an_older_epoch_of_a_pool_is_not_read_beside_the_new_one(tmp_path):
    pool, stores, expected = tmp_path / "pool", [], []
    for name in ("old", "new"):
        expected.append(sealed(tmp_path / name))
        publish_pool(tmp_path / name, pool)
        stores.append({LAYER: open_store(f"pool:{pool}", layer=LAYER)})
    with served(stores[0]) as old, served(stores[1]) as new:
        for ports in ((old.port, new.port), (new.port, old.port)):
            with pytest.raises(DigestMismatch, match="expected the table of the other servers"):
                open_store("remote:" + ",".join(f"127.0.0.1:{p}" for p in ports), layer=LAYER)
        for server, rows in zip((old, new), expected, strict=True):
            client = open_store(f"remote:127.0.0.1:{server.port}", layer=LAYER)
            warmed(client, rows, 2)
            client.close()


def test_a_server_that_was_away_when_the_store_was_opened_is_used_later(rows):
    port = free_port()
    with served({LAYER: Gated(rows)}) as first:
        url = f"remote:127.0.0.1:{first.port},127.0.0.1:{port}"
        client = open_store(url, layer=LAYER)
        warmed(client, rows, 3)
        client._asked = 0.0
        first.drain()
        with served({LAYER: Gated(rows)}, port=port):
            warmed(client, rows, 5)
            assert [server.requests for server in client.servers][1] >= 4
            client.close()


@pytest.mark.slow
def test_killed_stalled_and_drained_processes_lose_no_request(tmp_path):
    expected = sealed(tmp_path / "table")
    with ServerProcess(tmp_path / "table") as first, ServerProcess(tmp_path / "table") as second:
        client = open_store(f"remote:{first.address},{second.address}", layer=LAYER)
        end = threading.Event()
        counts = [0, 0]

        def read(number):
            while not end.is_set():
                warmed(client, expected, 1)
                counts[number] += 1

        readers = [threading.Thread(target=read, args=(number,)) for number in (0, 1)]
        for reader in readers:
            reader.start()
        try:
            for act in (first.kill, second.stall):
                before = sum(counts)
                act()
                if act == first.kill:
                    first.start()
                until(lambda before=before: sum(counts) > before + 60, 20)
            second.wake()
            second.drain()
            assert second.said[-1] == "drained\n"
            before = sum(counts)
            until(lambda: sum(counts) > before + 60, 20)
        finally:
            end.set()
            for reader in readers:
                reader.join()
        assert all(counts)
        client.close()
