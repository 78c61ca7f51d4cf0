"""What a server of rows counts: Flight calls by middleware, refusals, and its stores' own counters.

`serve_http` gives the same text, and the state, to programs that speak HTTP alone.
"""

# pyarrow has no types.
# pyright: reportUnknownMemberType=false, reportUntypedBaseClass=false

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ..errors import ConfigError
from .base import RowStore
from .latency import BUCKETS, bucket_of, latency_of
from .prometheus import histogram, metric, store_metrics
from .remote_arrow import flight

_PATIENCE = 5.0  # seconds that an HTTP client may take to ask


class Calls:
    """Counts Flight calls by method and outcome. Safe for many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[str, int] = {}
        self._ended: dict[tuple[str, str], int] = {}
        self._buckets: dict[str, list[int]] = {}
        self._nanoseconds: dict[str, int] = {}
        self._refused: dict[str, int] = {}

    def begin(self, method: str) -> None:
        """Counts a call that begins."""
        with self._lock:
            self._under_way[method] = self._under_way.get(method, 0) + 1

    def end(self, method: str, outcome: str, begun: int) -> None:
        """Counts a call that began at `begun` (perf_counter_ns) and has ended."""
        taken = time.perf_counter_ns() - begun
        with self._lock:
            self._under_way[method] -= 1
            self._ended[method, outcome] = self._ended.get((method, outcome), 0) + 1
            self._buckets.setdefault(method, [0] * BUCKETS)[bucket_of(taken)] += 1
            self._nanoseconds[method] = self._nanoseconds.get(method, 0) + taken

    def refused(self, reason: str) -> None:
        """Counts a stream that was refused."""
        with self._lock:
            self._refused[reason] = self._refused.get(reason, 0) + 1

    def lines(self) -> list[str]:
        """The counters in Prometheus' text format."""
        with self._lock:
            under_way = [({"method": name}, count) for name, count in self._under_way.items()]
            ended = [
                ({"method": name, "outcome": outcome}, count)
                for (name, outcome), count in self._ended.items()
            ]
            times = [
                ({"method": name}, latency_of(buckets, self._nanoseconds[name]))
                for name, buckets in self._buckets.items()
            ]
            refused = [({"reason": reason}, count) for reason, count in self._refused.items()]
        name = "engraphy_server_calls"
        lines = metric(f"{name}_under_way", "gauge", "Flight calls, streams too.", under_way)
        lines += metric(f"{name}_total", "counter", "Flight calls that ended.", ended)
        lines += histogram(f"{name}_seconds", "How long Flight calls took.", times)
        return lines + metric("engraphy_server_refused_total", "counter", "Refusals.", refused)


class CountCalls(flight.ServerMiddlewareFactory):
    """Middleware that counts every call."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self._calls = calls

    def start_call(self, info: Any, headers: Mapping[str, list[str]]) -> Any:
        """Counts the call, and gives what counts its end."""
        return _Counted(self._calls, info.method.name.lower())


class _Counted(flight.ServerMiddleware):
    def __init__(self, calls: Calls, method: str) -> None:
        super().__init__()
        self._calls = calls
        self._method = method
        self._begun = time.perf_counter_ns()
        calls.begin(method)

    def call_completed(self, exception: Exception | None) -> None:
        outcome = "ok" if exception is None else type(exception).__name__
        self._calls.end(self._method, outcome, self._begun)


def render(
    stores: Mapping[int, RowStore], calls: Calls, gauges: Mapping[str, tuple[str, int]]
) -> str:
    """All counters of a server in Prometheus' text format."""
    lines = store_metrics(stores) + calls.lines()
    for name, (text, value) in gauges.items():
        lines += metric(f"engraphy_server_{name}", "gauge", text, [({}, value)])
    return "\n".join(lines) + "\n"


def serve_http(
    host: str, port: int, metrics: Callable[[], str], health: Callable[[], Mapping[str, Any]]
) -> ThreadingHTTPServer:
    """Answers GET /metrics, and GET /health with 200 while the state is "serving", else 503.

    Returns:
        The server, which runs in a thread; `shutdown()` ends it.

    Raises:
        ConfigError: if it cannot listen there.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = _PATIENCE

        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, metrics(), "text/plain; version=0.0.4")
            elif self.path == "/health":
                state = health()
                code = 200 if state["state"] == "serving" else 503
                self._answer(code, json.dumps(state) + "\n", "application/json")
            else:
                self._answer(404, "expected /metrics or /health\n", "text/plain")

        def _answer(self, code: int, text: str, kind: str) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: a scrape every few seconds is no news."""

    try:
        server = ThreadingHTTPServer((host.strip("[]"), port), Handler)
    except OSError as error:
        raise ConfigError(
            f"metrics: expected to listen on {host}:{port}, found {error.strerror or error}"
        ) from None
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
