"""A TCP proxy whose connections can be cut in the middle of an answer."""

from __future__ import annotations

import contextlib
import socket
import threading


class CutProxy:
    """Forwards connections to a port of this machine. `allow(n)` cuts them after n more bytes.

    Attributes:
        port: where it listens.
        cuts: how many times it has cut all connections.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._left: int | None = None
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def allow(self, count: int) -> None:
        """Cuts all connections once so many bytes of answers have passed."""
        with self._lock:
            self._left = count

    def close(self) -> None:
        """Cuts all connections, and listens no more."""
        self._listener.close()
        self._cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                with self._lock:
                    self._sockets += [client, server]
                for source, sink, counts in ((client, server, False), (server, client, True)):
                    arguments = (source, sink, counts)
                    threading.Thread(target=self._forward, args=arguments, daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, counts: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                passed, cut = len(data), False
                if counts:
                    with self._lock:
                        if self._left is not None:
                            passed = min(passed, self._left)
                            self._left -= passed
                            cut = not self._left
                            self._left = None if cut else self._left
                sink.sendall(data[:passed])
                if cut:
                    self._cut()
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _cut(self) -> None:
        with self._lock:
            sockets = self._sockets
            self._sockets = []
            self.cuts += 1
        for end in sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def __enter__(self) -> CutProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
