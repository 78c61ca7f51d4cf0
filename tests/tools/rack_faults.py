"""Part of `make test-rack`: each fault by itself, as `make test` has it; then a million requests
while servers of rows are restarted, killed and stalled; idle connections and large requests; what
it costs in memory.

    python -m tests.tools.rack_faults [--requests N]

Two parts of two replicas each, in processes of their own. Four threads in two client processes ask
for 48 rows at a time and compare every row. Meanwhile one server after the other is drained and
started, killed and started, or stalled and woken, and now and then both replicas of a part are
killed. A request that raises is lost, one with another row is wrong; neither may happen.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from engraphy.store import open_store
from engraphy.store import remote_wire as wire
from engraphy.store.remote import RemoteStore
from engraphy.store.remote_arrow import flight
from engraphy.table import Table
from tests.tools.paths import ROOT
from tests.tools.row_servers import ServerProcess
from tests.tools.store_builders import LAYER, sealed

REQUESTS = 1_000_000
ROWS = 48
CLIENTS, THREADS = 2, 2
STALL = 1.5  # seconds
PAUSE = 4.0  # seconds between two acts: starting a server takes a core for one
IDLE = 1000
LARGE = 8 << 20  # row ids of one request: 64 MiB
GROWTH = 64 << 20  # bytes that a process may grow by
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0" + bytes(4)  # preface and settings


def missing() -> list[str]:
    """Nothing but pyarrow, without which this module is not imported."""
    return []


def run(requests: int = REQUESTS) -> dict[str, object]:
    """Returns what was counted. Raises AssertionError if a row was wrong or a request lost."""
    counted: dict[str, object] = {"each fault by itself": small()}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        table = Path(folder) / "table"
        sealed(table, rows=5000)
        parts = ("1/2", "1/2", "2/2", "2/2")
        servers = [stack.enter_context(ServerProcess(table, "--part", part)) for part in parts]
        counted |= under_restarts(table, servers, requests)
        counted |= limits(table, servers[0])
    return counted


def small() -> str:
    """Runs the tests of faults, and returns pytest's last line."""
    files = ["tests/store/test_remote.py", "tests/store/test_remote_faults.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def under_restarts(table: Path, servers: list[ServerProcess], requests: int) -> dict[str, object]:
    """A million requests through restarts."""
    url = "remote:" + ",".join(server.address for server in servers)
    share = requests // CLIENTS
    clients = [
        subprocess.Popen(
            [sys.executable, "-m", __spec__.name, "--client", url, str(table), str(share), str(n)],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
        )
        for n in range(CLIENTS)
    ]
    acts: Counter[str] = Counter()
    most = 0
    turn = itertools.cycle(range(4 * len(servers) + 1))
    while any(client.poll() is None for client in clients):
        number = next(turn)
        server = servers[number % len(servers)]
        if number == 4 * len(servers):
            acts["both replicas of a part killed and started"] += 1
            for replica in servers[:2]:
                replica.kill()
            for replica in servers[:2]:
                replica.start()
        elif number // len(servers) in (0, 2):
            acts["drained and started"] += 1
            server.drain()
            server.start()
        elif number // len(servers) == 1:
            acts["killed and started"] += 1
            server.kill()
            server.start()
        else:
            acts["stalled and woken"] += 1
            server.stall()
            time.sleep(STALL)
            server.wake()
        most = max(most, *(resident(one.process.pid) for one in servers))
        _wait(clients)
    results = [json.loads(client.communicate()[0]) for client in clients]
    assert not any(client.returncode for client in clients)
    return _checked(results, acts, most)


def _wait(clients: list[subprocess.Popen[str]]) -> None:
    """Waits for the next act, or for the end of all clients."""
    end = time.monotonic() + PAUSE
    while time.monotonic() < end and any(client.poll() is None for client in clients):
        time.sleep(0.1)


def _checked(results: list[dict[str, Any]], acts: Counter[str], most: int) -> dict[str, object]:
    def total(name: str) -> int:
        return sum(result[name] for result in results)

    counted: dict[str, object] = {
        "requests of 48 rows": total("requests"),
        "wrong": total("wrong"),
        "lost": total("lost"),
        **acts,
        "second servers asked": total("hedges"),
        "failed tries, hidden by another try": total("failures"),
        "slowest request, s": round(max(result["slowest"] for result in results), 2),
        "p99, ms": [round(1e3 * result["p99"], 2) for result in results],
        "growth of a client, MiB": [round(result["growth"] / 2**20, 1) for result in results],
        "largest server, MiB": round(most / 2**20, 1),
    }
    print(json.dumps(counted), flush=True)
    errors = [error for result in results for error in result["errors"]]
    assert not total("wrong") and not total("lost"), errors
    assert all(result["growth"] < GROWTH for result in results)
    return counted


def limits(table: Path, server: ServerProcess) -> dict[str, object]:
    """What one server holds back, and what that costs it in memory."""
    before = resident(server.process.pid)
    with contextlib.ExitStack() as stack:
        for _ in range(IDLE):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            sock.sendall(HTTP2)
        begun = time.monotonic()
        _ask(server, np.arange(ROWS))
        answered = time.monotonic() - begun
        idle = resident(server.process.pid) - before
    assert idle < GROWTH
    refused = ""
    try:
        _ask(server, np.zeros(LARGE, np.int64))
    except flight.FlightServerError as error:
        refused = str(error).partition(". Detail")[0]
    assert "expected at most 8192 row ids, found 8388608" in refused, refused
    _ask(server, np.arange(ROWS))
    large = resident(server.process.pid) - before
    assert large < 4 * GROWTH
    return {
        "idle connections": IDLE,
        "memory of the server for them, MiB": round(idle / 2**20, 1),
        "an answer among them, ms": round(1e3 * answered, 1),
        "a request of 64 MiB": refused.partition("message: ")[2] or refused,
        "memory of the server after it, MiB": round(large / 2**20, 1),
    }


def _ask(server: ServerProcess, ids: np.ndarray) -> None:
    client = flight.FlightClient(f"grpc://{server.address}")
    writer, reader = client.do_exchange(wire.descriptor(None, LAYER))
    try:
        writer.begin(wire.IDS)
        writer.write_batch(wire.id_batch(ids))
        assert reader.read_chunk().data.num_rows == len(ids)
    finally:
        reader.cancel()
        with contextlib.suppress(Exception):
            writer.close()
        client.close()


def resident(process: int) -> int:
    """Bytes of a process in memory; 0 if it has ended."""
    try:
        pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * 4096


def client(url: str, path: str, requests: int, seed: int) -> dict[str, Any]:
    """One client process: asks, compares, counts."""
    table = Table.open(path)
    expected = np.concatenate(table.shard_arrays(LAYER))
    store = open_store(url, layer=LAYER)
    assert isinstance(store, RemoteStore)
    taken: list[list[float]] = [[] for _ in range(THREADS)]
    counts: Counter[str] = Counter()
    errors: list[str] = []
    lock = threading.Lock()

    def read(number: int) -> None:
        rng = np.random.default_rng((seed, number))
        out = np.empty((ROWS, expected.shape[1]), np.uint8)
        for _ in range(requests // THREADS):
            ids = rng.integers(0, len(expected), ROWS)
            begun = time.perf_counter()
            try:
                store.gather(ids, out=out)
                is_right = np.array_equal(out, expected[ids])
            except Exception as error:
                with lock:
                    counts["lost"] += 1
                    errors.append(str(error)[:500])
                continue
            finally:
                taken[number].append(time.perf_counter() - begun)
            if not is_right:
                with lock:
                    counts["wrong"] += 1

    for _ in range(2000):
        store.gather(np.arange(ROWS))
    before = resident_now()
    readers = [threading.Thread(target=read, args=(number,)) for number in range(THREADS)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    times = np.concatenate([np.array(one) for one in taken])
    kept = times.nbytes + 32 * len(times)  # this list is the test's own
    return {
        "requests": len(times),
        "wrong": counts["wrong"],
        "lost": counts["lost"],
        "hedges": sum(server.hedges for server in store.servers),
        "failures": sum(server.failures for server in store.servers),
        "slowest": float(times.max()),
        "p99": float(np.quantile(times, 0.99)),
        "growth": max(0, resident_now() - before - kept),
        "errors": errors[:5],
    }


def resident_now() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--client", nargs=4, metavar=("URL", "TABLE", "REQUESTS", "SEED"))
    arguments = parser.parse_args()
    if arguments.client:
        url, path, requests, seed = arguments.client
        print(json.dumps(client(url, path, int(requests), int(seed))))
    else:
        print(json.dumps(run(arguments.requests), indent=1))


if __name__ == "__main__":
    main()
