"""The counters of a served memory over HTTP, in Prometheus' text format."""

from __future__ import annotations

import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from ..errors import ConfigError
from ..memory.metrics import prometheus
from ..system.environment import METRICS
from .served import ServedMemory


def serve_metrics(address: str, served: ServedMemory) -> ThreadingHTTPServer:
    """Answers GET /metrics in a thread that ends with the process.

    Args:
        address: "HOST:PORT"; port 0 takes a free one.
        served: The memory whose stores and prefetcher are counted.

    Returns:
        The server; `server_port` is its port, `shutdown` and `server_close` end it.

    Raises:
        ConfigError: The address is invalid, or taken.
    """
    host, _, port = address.rpartition(":")
    try:
        if not host:
            raise ValueError("no host")  # an empty one would answer everybody
        server = ThreadingHTTPServer((host, int(port)), _handler(served))
    except (ValueError, OverflowError, OSError) as error:
        raise ConfigError(
            f"{METRICS.name}: expected HOST:PORT that is free, found {address!r}: {error}"
        ) from None
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="engraphy-metrics", daemon=True).start()
    logging.getLogger("engraphy").info("metrics at http://%s:%s/metrics", host, server.server_port)
    return server


def _handler(served: ServedMemory) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802, the name that http.server calls
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404)
                return
            memory = served.memory
            body = prometheus(memory.stores, memory.prefetcher.stats).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """A scrape is no news."""

    return Handler
