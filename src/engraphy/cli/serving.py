"""The commands `engraphy table serve` and `engraphy table ask`: a server of rows, and questions."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from ..errors import ConfigError
from ..store.opening import open_store
from ..store.pool_file import is_pool_file, read_header
from ..store.remote_options import RemoteOptions, is_loopback, read_bytes, split_address
from ..system.signals import stopping
from ..table.table import Table
from .arguments import parse_layers
from .terminal import errors

if TYPE_CHECKING:
    from ..store.server import Part

PORT = 8815
_LOOK = 0.5  # seconds between looks at signals


def serve(
    table: str = typer.Argument(help="Folder of a sealed table, or the URL of a pool."),
    host: str = typer.Option("127.0.0.1", help="Address to listen on; 0.0.0.0 = all."),
    port: int = typer.Option(PORT, help="Port to listen on; 0 = any free one."),
    layers: str | None = typer.Option(None, help="Layers to serve, as 1,14; default: all."),
    token_file: Path | None = typer.Option(
        None, help="File of the bearer tokens, one a line; read again when it changes."
    ),
    cert: Path | None = typer.Option(None, help="Certificate chain in PEM, for TLS."),
    key: Path | None = typer.Option(None, help="Its private key in PEM."),
    part: str = typer.Option("1/1", help="Part of each layer's rows to serve: 2/3 = the second."),
    fleet: str | None = typer.Option(
        None,
        help="Servers of each part, told to clients: HOST:PORT,HOST:PORT/HOST:PORT (two of the "
        "first part, one of the second).",
    ),
    streams: int = typer.Option(256, help="Most streams of clients that are open at a time."),
    metrics: str | None = typer.Option(
        None, help="HOST:PORT of /metrics (Prometheus) and /health over HTTP."
    ),
    grace: float = typer.Option(30.0, help="Seconds that requests under way may take at the end."),
    insecure: bool = typer.Option(
        False, "--insecure", help="With --trust-network: listen elsewhere without TLS or token."
    ),
    trust_network: bool = typer.Option(
        False, "--trust-network", help="With --insecure: whoever reaches the port may read."
    ),
) -> None:
    """Serve the rows of a table to other hosts, on Arrow Flight; Ctrl-C or SIGTERM drains it."""
    with errors("nothing was changed"):
        told_twice = insecure and trust_network
        _check_listening(host, cert is not None, token_file is not None, told_twice)
        if (cert is None) != (key is None):
            raise ConfigError("--cert and --key: expected both or neither, found one")
        if metrics is not None and not (is_loopback(split_address(metrics)[0]) or trust_network):
            raise ConfigError(
                f"--metrics {metrics}: expected an address of this machine, since counters need "
                "no token there, or --trust-network"
            )
        from ..store.server import RowServer
        from ..store.server_counters import serve_http
        from ..store.server_token import Tokens

        tokens = None if token_file is None else Tokens(token_file)
        certificate = None
        if cert is not None and key is not None:
            certificate = read_bytes("certificate", cert), read_bytes("key", key)
        url = table if table.startswith("pool:") else Path(table)
        stores = {
            layer: open_store(url, layer=layer)
            for layer in parse_layers(layers) or layers_of(table)
        }
        server = RowServer(
            stores, host, port, parse_part(part, fleet), streams, tokens, certificate
        )
        if metrics is not None:
            serve_http(*split_address(metrics), server.metrics, server.health)
        scheme = "grpc" if cert is None else "grpc+tls"
        some = next(iter(stores.values())).info
        console = Console(soft_wrap=True, highlight=False, markup=False)
        console.print(f"serving {table}, table {some.table_id}, layers {sorted(stores)}")
        if tokens is None:
            console.print("no token: whoever can connect may read, and drain the server")
        console.print(f"listening on {scheme}://{host}:{server.port}")
        sys.stdout.flush()
        with stopping() as stop:
            while not stop and not server.wait_drained(_LOOK):
                pass
        server.drain()
        is_idle = server.wait_idle(grace)
        console.print("drained" if is_idle else f"ended with requests under way after {grace:g} s")
        server.stop()
        sys.stdout.flush()
        # Streams that clients hold open would keep Flight, and so the process, waiting.
        os._exit(0)


def ask(
    url: str = typer.Argument(help="remote:HOST:PORT, with the options of a store's URL."),
    action: str = typer.Argument("health", help="health, metrics or drain."),
) -> None:
    """Ask a server of rows for its health or its counters, or to drain and end."""
    with errors("nothing was changed"):
        scheme, _, rest = url.partition(":")
        if scheme != "remote":
            raise ConfigError(f"{url}: expected remote:HOST:PORT, found another scheme")
        options, _ = RemoteOptions.parse(url, rest)
        from ..store.remote_location import ask_server

        for address in options.addresses:
            answer = ask_server(address, options, action)
            if action == "metrics":
                typer.echo(answer, nl=False)
            else:
                typer.echo(f"{address} {json.dumps(json.loads(answer))}")


def parse_part(text: str, fleet: str | None) -> Part:
    """The part of the rows that "2/3" names, with the fleet's addresses.

    Raises ConfigError if it is no part, or the fleet has another number of parts.
    """
    from ..store.server import Part

    number, slash, count = text.partition("/")
    is_part = slash and number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)
    if not is_part or int(count) > 10_000:
        raise ConfigError(f"--part: expected such as 2/3, found {text!r}")
    if fleet is None:
        return Part(int(number) - 1, int(count))
    parts = tuple(tuple(servers.split(",")) for servers in fleet.split("/"))
    if len(parts) != int(count):
        raise ConfigError(
            f"--fleet: expected servers of {count} parts divided by /, found {len(parts)} parts"
        )
    for servers in parts:
        for address in servers:
            split_address(address)
    return Part(int(number) - 1, int(count), parts)


def layers_of(table: str) -> tuple[int, ...]:
    """The layers of the table at a path, or of a pool."""
    if not table.startswith("pool:"):
        return Table.open(table).layers
    path, _, options = table.removeprefix("pool:").partition("?")
    if is_pool_file(path):
        return tuple(read_header(path).layers)
    if not os.path.exists(path):  # a folder that is filled when its first layer is opened
        sources = [pair[5:] for pair in options.split("&") if pair.startswith("from=")]
        path = sources[0] if sources else path
    return Table.open(path).layers


def _check_listening(host: str, has_tls: bool, has_token: bool, told_twice: bool) -> None:
    """Raises ConfigError if other machines could read without TLS and a token, unless told so."""
    if is_loopback(host) or (has_tls and has_token) or told_twice:
        return
    missing = [name for name, has in (("TLS", has_tls), ("token", has_token)) if not has]
    raise ConfigError(
        f"--host {host}: expected TLS and a token (--cert, --key, --token-file) to listen beyond "
        f"this machine, found no {' and no '.join(missing)}; in a network "
        "that you trust give both --insecure and --trust-network"
    )
