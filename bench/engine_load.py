"""Open-loop load on vLLM's OpenAI server, with a memory and without one.

    python bench/engine_model.py DIR                                     # in the usual environment
    build/engines/vllm/bin/python bench/engine_load.py DIR [--rounds 4] [--ways NAME ...]

One server for each way to hold the rows, each measured in turn while the others are stopped, in an
order that is drawn each round. The client is vLLM's own benchmark: requests of 48 tokens arrive at
random (Poisson), so many a second, and ask for 32 tokens each; then 16 users ask as fast as they
get answers. Rows are requested before the forward, or, "in the block", when their block needs them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from claims import Claim, median_and_error, write
from probe import machine
from vllm.benchmarks.serve import add_cli_args
from vllm.benchmarks.serve import main as load
from vllm.utils.argparse_utils import FlexibleArgumentParser

RATES = (1, 4, 16)
"""Requests a second."""
USERS = 16
SECONDS = 6
"""Of each measurement."""
NEW_TOKENS = 32
PORT = 8200


@dataclass(frozen=True)
class Way:
    """How the rows are held.

    Attributes:
        name: In tables.
        model: "whole", or "bare": no memory.
        store: URL; "{}" is the folder of the work. "" = the folder's own table.
        delay: Milliseconds that each read takes longer.
        ahead: False = read in the block.
    """

    name: str
    model: str = "whole"
    store: str = ""
    delay: float = 0.0
    ahead: bool = True


WAYS = (
    Way("no memory", "bare"),
    Way("RAM", store="file:{table}?populate=1"),
    Way("RAM, in the block", store="file:{table}?populate=1", ahead=False),
    Way("file", store="file:{table}"),
    Way("pool", store="pool:{pool}?from={table}"),
    Way("pool + 0.1 ms", store="pool:{pool}?from={table}", delay=0.1),
    Way("pool + 0.1 ms, in the block", store="pool:{pool}?from={table}", delay=0.1, ahead=False),
    Way("pool + 1 ms", store="pool:{pool}?from={table}", delay=1.0),
    Way("pool + 1 ms, in the block", store="pool:{pool}?from={table}", delay=1.0, ahead=False),
)


@dataclass
class Server:
    """A server that is alive, and what was measured of it: measurement -> figure -> by round."""

    way: Way
    process: subprocess.Popen[bytes]
    port: int
    figures: dict[str, dict[str, list[float]]] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--ways", nargs="*", help="names of ways beside no memory; default: all")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ways = [WAYS[0], *(way for way in WAYS[1:] if way.name in (options.ways or [way.name]))]
    with tempfile.TemporaryDirectory() as work, servers(options.folder, Path(work), ways) as alive:
        order = random.Random(0)
        for server in alive:  # warms up
            with awake(server):
                measured(options.folder, server, measurements()[-1][1], Path(work))
        for round_ in range(options.rounds):
            for server in order.sample(alive, len(alive)):
                with awake(server):
                    for name, settings in measurements():
                        note(server, name, measured(options.folder, server, settings, Path(work)))
                print(f"round {round_ + 1}: {server.way.name}", file=sys.stderr, flush=True)
        counted = [counters(server) for server in alive[1:]]
        print(f"counters over HTTP while it served: {min(counted)} lines or more of each server\n")
    print("\n".join(table(alive)))
    write(options.json, "engine_load", machine(options.folder), claims(alive))


# --- servers --------------------------------------------------------------------------------------


@contextlib.contextmanager
def servers(folder: Path, work: Path, ways: list[Way]) -> Iterator[list[Server]]:
    """Starts all servers, one after the other, and ends them."""
    alive: list[Server] = []
    try:
        for number, way in enumerate(ways):
            server = start(folder, work, way, PORT + 2 * number)
            alive.append(server)
            wait_until_ready(server, work)
            os.killpg(process_group(server), signal.SIGSTOP)
            print(f"{way.name}: ready", file=sys.stderr, flush=True)
        yield alive
    finally:
        for server in alive:
            os.killpg(process_group(server), signal.SIGCONT)
            server.process.terminate()
        for server in alive:
            server.process.wait(60)


@contextlib.contextmanager
def awake(server: Server) -> Iterator[None]:
    """Lets a server run: an idle vLLM takes a share of the cores, so all others are stopped."""
    os.killpg(process_group(server), signal.SIGCONT)
    try:
        yield
    finally:
        os.killpg(process_group(server), signal.SIGSTOP)


def process_group(server: Server) -> int:
    return server.process.pid  # it began a session


def start(folder: Path, work: Path, way: Way, port: int) -> Server:
    """A server with its metrics on the next port."""
    settings = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "BENCH_DELAY_MS": str(way.delay),
        "BENCH_IN_BLOCK": "" if way.ahead else "1",
        "ENGRAPHY_METRICS": f"127.0.0.1:{port + 1}",
        "ENGRAPHY_STORE": way.store.format(
            table=folder / "whole" / "engraphy" / "table", pool=work / "pool"
        ),
    }
    arguments = ["--model", folder / way.model, "--tokenizer", folder / "bare"]
    arguments += ["--served-model-name", "model", "--dtype", "float32", "--enforce-eager"]
    arguments += ["--kv-cache-memory-bytes", 256 << 20, "--max-model-len", 512]
    arguments += ["--host", "127.0.0.1", "--port", port]
    script = Path(__file__).parent / "engine_server.py"
    log = (work / f"{port}.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, script, *map(str, arguments)],
        env={**os.environ, **settings},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    return Server(way, process, port)


def wait_until_ready(server: Server, work: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and server.process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health", timeout=2)
            return
        time.sleep(0.5)
    end = (work / f"{server.port}.log").read_text(errors="replace")[-2000:]
    raise SystemExit(f"{server.way.name}: expected a server, found none:\n{end}")


def counters(server: Server) -> int:
    """Lines of the memory's counters that a server gives."""
    with (
        awake(server),
        urllib.request.urlopen(f"http://127.0.0.1:{server.port + 1}/metrics") as text,
    ):
        return text.read().decode().count("engraphy_")


# --- load -----------------------------------------------------------------------------------------


def measurements() -> list[tuple[str, list[str]]]:
    """Names of the measurements, and the client's settings."""
    open_loop = [
        (f"{rate} a second", ["--request-rate", str(rate), "--num-prompts", str(rate * SECONDS)])
        for rate in RATES
    ]
    closed = ["--max-concurrency", str(USERS), "--num-prompts", str(USERS * 8)]
    return [*open_loop, (f"{USERS} users", closed)]


def measured(folder: Path, server: Server, settings: list[str], work: Path) -> dict[str, Any]:
    """One run of the client. Ends the benchmark if a request failed."""
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    arguments = ["--base-url", f"http://127.0.0.1:{server.port}", "--endpoint", "/v1/completions"]
    arguments += ["--model", "model", "--tokenizer", str(folder / "bare"), "--ignore-eos"]
    arguments += ["--dataset-name", "custom", "--dataset-path", str(folder / "prompts.jsonl")]
    arguments += ["--custom-output-len", str(NEW_TOKENS), "--skip-chat-template", "--disable-tqdm"]
    arguments += ["--percentile-metrics", "ttft,tpot", "--metric-percentiles", "50,99"]
    with contextlib.redirect_stdout(io.StringIO()):
        result = load(parser.parse_args([*arguments, *settings]))
    if result["failed"]:
        raise SystemExit(f"{server.way.name}: {result['failed']} requests failed")
    return result


FIGURES = {
    "ttft": "p50_ttft_ms",
    "ttft99": "p99_ttft_ms",
    "tpot": "p50_tpot_ms",
    "tpot99": "p99_tpot_ms",
    "speed": "output_throughput",
}


def note(server: Server, name: str, result: dict[str, Any]) -> None:
    figures = server.figures.setdefault(name, {})
    for figure, key in FIGURES.items():
        figures.setdefault(figure, []).append(result[key])


# --- the page -------------------------------------------------------------------------------------


def middle(server: Server, measurement: str, figure: str) -> float:
    return median_and_error(server.figures[measurement][figure])[0]


def table(alive: list[Server]) -> Iterator[str]:
    """Medians over rounds."""
    names = [name for name, _ in measurements()]
    for name in names:
        closed = name == names[-1]
        yield f"**{name}**\n"
        yield "| rows | first token, ms | p99 | a token, ms | p99 | tokens/s | beside no memory |"
        yield "|---|---|---|---|---|---|---|"
        for server in alive:
            cells = [f"{middle(server, name, figure):.1f}" for figure in list(FIGURES)[:4]]
            speed = f"{middle(server, name, 'speed'):.0f}"
            loss = against(server, alive[0], name, "speed" if closed else "tpot")
            beside = "" if server is alive[0] else f"{100 * loss[0]:+.1f} ± {100 * loss[1]:.1f} %"
            yield f"| {server.way.name} | {' | '.join(cells)} | {speed} | {beside} |"
        yield ""
    yield "Beside no memory: time of a token; with 16 users tokens/s. Medians over rounds."


def against(server: Server, other: Server, name: str, figure: str) -> tuple[float, float]:
    """Relative difference of a figure, paired by round, and its error."""
    pairs = zip(server.figures[name][figure], other.figures[name][figure], strict=True)
    return median_and_error([mine / theirs - 1 for mine, theirs in pairs])


def claims(alive: list[Server]) -> list[Claim]:
    name = measurements()[-1][0]
    made = []
    by_name = {server.way.name: server for server in alive}
    for server in alive[1:]:
        for other in {"no memory", "RAM"} & by_name.keys() - {server.way.name}:
            loss, error = against(server, by_name[other], name, "speed")
            what = f"tokens/s lost, {name}, {server.way.name} beside {other}"
            made.append(Claim(what, -100 * loss, "%", error=100 * error))
    return made


if __name__ == "__main__":
    main()
