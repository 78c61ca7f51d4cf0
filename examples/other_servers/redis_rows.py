"""Bring your own Redis: rows of a table in a Redis that you run, as a store of Engraphy.

    python examples/other_servers/redis_rows.py TABLE LAYER [HOST:PORT]

copies a layer into Redis. After that:

    from redis_rows import RedisStore
    memory = EngramMemory(config, vocab, {1: RedisStore("127.0.0.1:6379", layer=1)})

A layer lies in strings of at most 256 MiB, row after row, so it takes no more memory than its
bytes; a row is one GETRANGE. The answers have a fixed length, so they are received into one array
and need no parser. Needs no package. Tested by `make test-rack` with redis-server 7.0.15. It
speaks neither TLS nor AUTH: add them here, or keep Redis in a network of its own.
"""

from __future__ import annotations

import json
import socket
import sys
import threading

import numpy as np

from engraphy import RowFormat
from engraphy.errors import StoreError
from engraphy.store import RowStore, StoreInfo, open_store

STRING_BYTES = 256 << 20
_BATCH = 1024  # commands under way: their answers have to fit into the sockets' buffers


class Connection:
    """A connection to Redis, for one thread at a time."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=10)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data: bytes) -> None:
        """Sends commands that are written already."""
        self._socket.sendall(data)

    def receive(self, out: memoryview) -> None:
        """Fills a buffer. Raises StoreError if the connection ends before."""
        filled = 0
        while filled < len(out):
            count = self._socket.recv_into(out[filled:])
            if not count:
                raise StoreError("redis: expected rows, found the connection closed")
            filled += count

    def line(self) -> bytes:
        """One line of an answer, without its end."""
        line = b""
        while not line.endswith(b"\r\n"):
            line += self._socket.recv(1)
        if line.startswith(b"-"):
            raise StoreError(f"redis: {line[1:-2].decode()}")
        return line[:-2]

    def close(self) -> None:
        """Ends the connection."""
        self._socket.close()


def command(*words: bytes) -> bytes:
    """A command in Redis' protocol."""
    parts = [b"*%d\r\n" % len(words)]
    parts += [b"$%d\r\n%s\r\n" % (len(word), word) for word in words]
    return b"".join(parts)


class RedisStore(RowStore):
    """One layer of a table that `copy_to_redis` has put into Redis.

    Args:
        address: HOST:PORT.
        layer: the model's layer, 0-based.
        prefix: how the keys begin.
    """

    def __init__(self, address: str, layer: int, prefix: str = "engraphy") -> None:
        super().__init__()
        self._address = address
        self._idle: list[Connection] = []
        self._lock = threading.Lock()
        self._prefix = b"%s:%d" % (prefix.encode(), layer)
        connection = self._take()
        connection.send(command(b"GET", self._prefix))
        size = int(connection.line()[1:])
        if size < 0:
            raise StoreError(f"redis {address}: expected layer {layer}, found no key of its name")
        text = bytearray(size + 2)
        connection.receive(memoryview(text))
        self._give(connection)
        facts = json.loads(text)
        fmt = facts.pop("format")
        self._info = StoreInfo(
            "redis",
            writable=False,
            layer=layer,
            path=address,
            format=None if fmt is None else RowFormat.from_json(fmt),
            **facts,
        )
        self._rows_a_key = STRING_BYTES // self._info.row_bytes

    @property
    def info(self) -> StoreInfo:
        return self._info

    def close(self) -> None:
        super().close()
        while self._idle:
            self._idle.pop().close()

    def _after_fork(self) -> None:
        super()._after_fork()
        self._lock = threading.Lock()
        self._idle = []  # the parent's connections stay the parent's

    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None:
        row_bytes = self._info.row_bytes
        head = b"$%d\r\n" % row_bytes
        answers = np.empty((_BATCH, len(head) + row_bytes + 2), np.uint8)
        wanted = np.frombuffer(head, np.uint8)
        connection = self._take()
        try:
            for first in range(0, len(ids_N), _BATCH):
                ids_n = ids_N[first : first + _BATCH]
                connection.send(self._commands(ids_n))
                part = answers[: len(ids_n)]
                connection.receive(memoryview(part).cast("B"))
                if not (part[:, : len(head)] == wanted).all():
                    raise StoreError(f"redis {self._address}: expected {row_bytes} bytes a row")
                out_NR[first : first + len(ids_n)] = part[:, len(head) : -2]
        except BaseException:
            connection.close()
            raise
        self._give(connection)

    def _commands(self, ids_n: np.ndarray) -> bytes:
        row_bytes = self._info.row_bytes
        keys_n, local_n = np.divmod(ids_n, self._rows_a_key)
        first_n = local_n * row_bytes
        pairs = zip(keys_n.tolist(), first_n.tolist(), strict=True)
        return b"".join(
            [
                command(
                    b"GETRANGE",
                    b"%s:%d" % (self._prefix, key),
                    b"%d" % first,
                    b"%d" % (first + row_bytes - 1),
                )
                for key, first in pairs
            ]
        )

    def _scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        raise AssertionError("not called: the store says that it is read-only")

    def _take(self) -> Connection:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        try:
            return Connection(self._address)
        except OSError as error:
            raise StoreError(f"redis {self._address}: {error}") from None

    def _give(self, connection: Connection) -> None:
        with self._lock:
            self._idle.append(connection)


def copy_to_redis(store: RowStore, address: str, layer: int, prefix: str = "engraphy") -> None:
    """Copies all rows of a store into Redis; what says that they are there comes last."""
    info = store.info
    key = b"%s:%d" % (prefix.encode(), layer)
    connection = Connection(address)
    connection.send(command(b"DEL", key))
    connection.line()
    rows_a_key = STRING_BYTES // info.row_bytes
    for number in range(-(-info.rows // rows_a_key)):
        connection.send(command(b"DEL", b"%s:%d" % (key, number)))
        connection.line()
    first = 0
    while first < info.rows:
        end_of_key = (first // rows_a_key + 1) * rows_a_key
        last = min(info.rows, first + 65_536, end_of_key)
        rows = store.gather(np.arange(first, last))
        name = b"%s:%d" % (key, first // rows_a_key)
        connection.send(command(b"APPEND", name, rows.tobytes()))
        connection.line()
        first = last
    facts = {
        "rows": info.rows,
        "row_bytes": info.row_bytes,
        "table_id": info.table_id,
        "address_digest": info.address_digest,
        "format": None if info.format is None else info.format.to_json(),
    }
    connection.send(command(b"SET", key, json.dumps(facts).encode()))
    connection.line()
    connection.close()


if __name__ == "__main__":
    table, layer, *rest = sys.argv[1:]
    address = rest[0] if rest else "127.0.0.1:6379"
    with_rows = open_store(f"file:{table}", layer=int(layer))
    copy_to_redis(with_rows, address, int(layer))
    print(RedisStore(address, int(layer)))
