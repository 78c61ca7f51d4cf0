"""A table of a hundred billion parameters on a small machine: what reading it costs a model.

    python bench/hundred_billion.py DIR [--json FILE]
    python bench/hundred_billion.py DIR --only decode-8 --ways fixed,ram,warm-10 --repeats 5
    python bench/hundred_billion.py DIR --clean

The table has the rows of DeepSeek-V4.1 (264 bytes, layers 1 and 14) and lies in DIR as sparse
files. Text is chosen first, and the rows that it addresses are really written, so no timed read
meets a hole. What the table takes is said before it is made. A Llama of 135 M parameters (random
weights, the shape of SmolLM2-135M) then reads the text, in the ways of hundred_ways.py, which take
turns for each prompt and each decoded token. The decoded tokens are those of the text.

Steps: table, probe, a step for each cell (prefill or decode, and its batch), memory, report. --only
chooses some. A step that is done is not done again, --repeats reads the text of a cell so often. A
run that was killed, or ended by --seconds, goes on where it was. Losses are medians over pairs of
one round with a standard error (bootstrap).

Rows in RAM and pages of the page cache are read between the rounds, every quarter of a minute. A
virtual machine may take memory that rests away from the guest, or page it out, and then charges the
next read some 40 us: that is no property of a table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hundred_memory
import hundred_report
import torch
from hundred_table import TABLE, check_open_files, clean, left, make_table, prepare
from hundred_ways import FIXED, NONE, WAYS, Served, Ways
from hundred_workload import SIZES, Cell, Workload

import engraphy

ROUNDS = "rounds.jsonl"
UNCOUNTED = 8  # tokens
REST = 15.0  # seconds: memory that is not read for longer may be taken away by a host


def measure(
    folder: Path,
    ways: Ways,
    workload: Workload,
    cell: Cell,
    options: argparse.Namespace,
    end: float,
) -> None:
    """Times a cell, and appends each round to rounds.jsonl."""
    names = options.ways
    rounds = min(options.rounds or cell.rounds, cell.rounds)
    missing = rounds * options.repeats
    missing -= hundred_report.rounds_of(folder, cell, options.threads, names)
    shuffle = random.Random(f"{cell.name} {missing}").shuffle
    with open(folder / ROUNDS, "a") as file:
        while missing > 0 and time.monotonic() < end:
            served = ways.serve(names)
            for timed in read_text(ways, workload, cell, served, min(rounds, missing), shuffle):
                line = {"cell": cell.name, "threads": options.threads, **timed}
                file.write(json.dumps(line) + "\n")
                file.flush()
                missing -= 1
                if time.monotonic() > end:
                    break
            for way in served.values():
                way.close()
    if missing > 0:
        print(f"{cell.name}: {missing} rounds are missing: run it again")


def read_text(
    ways: Ways,
    workload: Workload,
    cell: Cell,
    served: dict[str, Served],
    rounds: int,
    shuffle: Callable[[list[str]], None],
) -> Iterator[dict[str, Any]]:
    """Reads the text of a cell once, in all ways. Yields seconds and counts of each round."""
    texts = prompts(workload, cell, rounds)
    awake = -REST
    for ids_BT in itertools.islice(chunks(workload, cell, served), rounds):
        if time.monotonic() - awake > REST:
            ways.keep_awake(served, texts)
            awake = time.monotonic()
        order = list(served)
        shuffle(order)
        if cell.phase == "prefill":
            for name in order:
                served[name].restart()
        before = {name: way.counters() for name, way in served.items()}
        answers = {name: served[name].forward(ids_BT) for name in order}
        check_equal({name: logits for name, (_, logits) in answers.items()})
        counts = {
            name: {key: value - before[name][key] for key, value in way.counters().items()}
            for name, way in served.items()
        }
        yield {"seconds": {name: parts for name, (parts, _) in answers.items()}, "counts": counts}


def prompts(workload: Workload, cell: Cell, rounds: int) -> list[torch.Tensor]:
    """The ids [B, T] of all tokens that so many rounds read."""
    ids = torch.from_numpy(workload.tokens(cell))
    if cell.phase == "prefill":
        return list(ids[: rounds + 1])
    return [ids[0, :, : cell.prompt + rounds]]


def chunks(workload: Workload, cell: Cell, served: dict[str, Served]) -> Iterator[torch.Tensor]:
    """The ids [B, T] of each timed forward. What comes before it is read, and not counted: the
    prompt of a cell that decodes, the beginning of the first prompt of a prefill."""
    ids = torch.from_numpy(workload.tokens(cell))
    if cell.phase == "prefill":
        before, after = ids[0, :, :UNCOUNTED].contiguous(), list(ids[1:])
    else:
        before = ids[0, :, : cell.prompt].contiguous()
        after = [one.contiguous() for one in ids[0, :, cell.prompt :].split(1, 1)]
    for way in served.values():
        way.restart()
        way.forward(before)
    yield from after


def check_equal(logits: dict[str, torch.Tensor]) -> None:
    """Raises SystemExit unless all ways that read rows gave the same logits, bit for bit."""
    readers = [values for name, values in logits.items() if name not in (NONE, FIXED)]
    if not all(torch.equal(readers[0], values) for values in readers[1:]):
        raise SystemExit("expected the same logits of all ways that read rows, found others")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="new, or of an earlier run")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument(
        "--data", default="wiki", help="the text: wiki, a text file, or a folder of .txt and .md"
    )
    parser.add_argument("--only", help="steps, separated by commas")
    parser.add_argument("--ways", help="ways, separated by commas", default=",".join(WAYS))
    parser.add_argument("--threads", type=int, default=1, help="of the model")
    parser.add_argument("--rounds", type=int, help="of each cell, at most as many as it has text")
    parser.add_argument("--repeats", type=int, default=1, help="how often to read a cell's text")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no round after so long")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--clean", action="store_true", help="remove DIR, measure nothing")
    options = parser.parse_args()
    steps = ["table", "probe", *(cell.name for cell in SIZES[options.size].cells)]
    steps += ["memory", "report"]
    options.only = steps if options.only is None else options.only.split(",")
    options.ways = options.ways.split(",")
    for name, chosen, known in (("--only", options.only, steps), ("--ways", options.ways, WAYS)):
        if unknown := [one for one in chosen if one not in known]:
            parser.error(f"{name}: expected some of {', '.join(known)}, found {', '.join(unknown)}")
    return options


@torch.no_grad()
def run(options: argparse.Namespace) -> None:
    end = time.monotonic() + options.seconds
    folder = options.folder
    workload = prepare(folder, options.size, options.data)
    if "table" in options.only:
        make_table(folder, workload)
    check_open_files(len(list((folder / TABLE).glob("*.safetensors"))) * len(options.ways))
    if "probe" in options.only:
        hundred_memory.probe_disk(folder, workload)
    torch.set_num_threads(options.threads)
    engraphy.set_threads(options.threads)
    ways = Ways(folder, workload)
    for cell in workload.sizes.cells:
        if cell.name in options.only:
            measure(folder, ways, workload, cell, options, end)
    if "memory" in options.only:
        hundred_memory.measure_memory(folder, workload, options.threads)
    if "report" in options.only:
        hundred_report.report(folder, workload, options.json)


def main() -> None:
    options = arguments()
    if options.clean:
        print(f"{options.folder}: removed, {clean(options.folder)}")
        return
    try:
        run(options)
    finally:
        if options.folder.exists():
            print(f"{options.folder}: {left(options.folder)} left; --clean removes it")


if __name__ == "__main__":
    main()
