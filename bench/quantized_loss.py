"""The cost of rows of fewer bits in a trained model: held-out loss with the table as trained, and
quantised.

    python bench/quantized_loss.py [--tokens 1000000] [--dims 16 32 64] [--out
    results/quantized/loss.json]

Trains the memory arm of `engraphy demo` (its sizes, text and rates; f32 rows), writes the table,
quantises it to each kind that d allows, and serves all tables to the same model: only rows differ.
Losses are of all held-out documents. Differences to the f32 rows are paired token by token; their
standard error is over documents. q8_0 and q4_0 are also paired with int8 and int4. d = 16 is the
demo's; d = 32, with half as many rows, is the least that fp8, q8_0 and q4_0 can have; at d = 64 a
row has two of their scales. Controls: the f32 table from disk has to give the loss of the rows in
memory, and `zero rows` shows how much the table contributes. About eight minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from engraphy.data.corpus import Corpus, CorpusConfig, prepare
from engraphy.eval import losses as measure
from engraphy.eval.bands import NgramCounts
from engraphy.lm import LM, demo_config, three_arms
from engraphy.lm.loop import Run, TrainConfig
from engraphy.memory import EngramMemory
from engraphy.recipes.studies.demo_arms import MALLOC, ArmConfig
from engraphy.rows.codecs import CODECS
from engraphy.system import cpu, provenance
from engraphy.table import Table
from engraphy.table.quantize import Difference, quantize

KINDS = ("bf16", "fp8", "int8", "q8_0", "int4", "q4_0")
# A kind with a scale for each 32 values, and the one of as many bits with a scale for each row.
BESIDE = {"q8_0": "int8", "q4_0": "int4"}


def trained(corpus: Corpus, dim: int, config: ArmConfig) -> LM:
    """Trains the demo's model with a memory whose rows have `dim` values."""
    arm = three_arms(
        demo_config(corpus.vocab_size), len(corpus.vocab), corpus.end_id, rho=config.rho, dim=dim
    ).memory
    assert arm.memory is not None
    torch.manual_seed(config.seed)
    memory = EngramMemory(arm.memory, corpus.vocab)
    memory.init_rows(config.row_std, config.seed)
    run = Run(LM(arm.model, memory), corpus.batches(), config.train)
    begun = time.monotonic()
    while not run.done:
        loss, _ = run.step()
        if run.step_index % 50 == 0 or run.done:
            speed = run.step_index * run.batches.tokens_per_step / (time.monotonic() - begun)
            step = f"step {run.step_index} of {run.steps}"
            line = f"d = {dim}: {step}, loss {loss:.3f}, {speed:,.0f} tokens/s"
            print(line, file=sys.stderr, flush=True)
    return run.model.eval()


def measured(model: LM, corpus: Corpus, counts: NgramCounts, table: Path | None) -> measure.Losses:
    """Losses with the rows of a table, or with those that the model has in memory (None)."""
    own = model.memory
    assert own is not None
    if table is not None:
        model.memory = EngramMemory(own.config, own.vocab, Path(table)).eval()
        model.memory.blocks.load_state_dict(own.blocks.state_dict())
    try:
        return measure.Losses(model, corpus.heldout_batches(), counts, "float32")
    finally:
        model.memory = own


def compared(model: LM, corpus: Corpus, dim: int, folder: Path) -> list[dict[str, Any]]:
    """One entry for each kind of rows, f32 first, and the control without rows."""
    memory = model.memory
    assert memory is not None
    counts = NgramCounts(corpus.training, corpus.end_id, corpus.vocab_size)
    memory.write_table(folder / "f32")
    Table.create(folder / "zero rows", memory.config, memory.format, corpus.vocab).seal()
    reports = {
        kind: quantize(folder / "f32", folder / kind, kind)
        for kind in KINDS
        if dim % CODECS[kind].multiple == 0
    }
    before = measured(model, corpus, counts, None)
    all_losses: dict[str, measure.Losses] = {}
    entries = []
    for name in ("f32", *reports, "zero rows"):
        losses = all_losses[name] = measured(model, corpus, counts, folder / name)
        beside = BESIDE.get(name)
        row_error = {}
        if name in reports:
            differences = reports[name].difference
            row_error = {layer: asdict(difference) for layer, difference in differences.items()}
        row_bytes = Table.open(folder / name).row_bytes
        entries.append(
            {
                "d": dim,
                "rows": name,
                "row_bytes": row_bytes,
                "bytes": memory.config.table_bytes(row_bytes),
                **losses.mean(),
                "difference": measure.difference(losses, before),
                "beside": beside,
                "difference_beside": beside and measure.difference(losses, all_losses[beside]),
                "row_error": row_error,
            }
        )
    if entries[0]["difference"]["all"] != 0:
        raise SystemExit(
            "the f32 table on disk gives another loss than the rows in memory that it was "
            "written from"
        )
    return entries


def markdown(entries: list[dict[str, Any]]) -> str:
    lines = [
        "| d | rows | bytes a row | row error, rms | smallest cosine | held-out loss | "
        "difference to f32 | its error | difference beside |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        rms, cosine = row_errors([Difference(**error) for error in entry["row_error"].values()])
        gap = entry["difference"]
        lines.append(
            f"| {entry['d']} | {entry['rows']} | {entry['row_bytes']} | {rms} | {cosine} | "
            f"{entry['validation_loss']:.4f} | {gap['all']:+.5f} | "
            f"{gap.get('all_stderr', float('nan')):.5f} | {beside_text(entry)} |"
        )
    return "\n".join(lines)


def beside_text(entry: dict[str, Any]) -> str:
    """The difference to the kind of as many bits, with its error; empty for other kinds."""
    gap = entry["difference_beside"]
    if not gap:
        return ""
    return f"{entry['beside']}: {gap['all']:+.5f} +- {gap['all_stderr']:.5f}"


def row_errors(errors: list[Difference]) -> tuple[str, str]:
    """The largest error and the smallest cosine over the layers; empty without layers."""
    if not errors:
        return "", ""
    rms = max(error.relative_rms or 0.0 for error in errors)
    cosine = min(1.0 if error.min_cosine is None else error.min_cosine for error in errors)
    return f"{rms:.2%}", f"{cosine:.5f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="wiki", help="wiki, hf:NAME, or a text file or folder")
    parser.add_argument(
        "--vocab", type=int, default=CorpusConfig.vocab_size, help="of the BPE trained on it"
    )
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of training, for each d")
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 32, 64], help="values of a row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write what was measured as JSON")
    options = parser.parse_args()
    begun = time.monotonic()
    corpus = prepare(CorpusConfig(options.data, vocab_size=options.vocab, seed=options.seed))
    config = ArmConfig(TrainConfig(options.tokens), options.seed)
    entries = []
    with tempfile.TemporaryDirectory() as folder:
        for dim in options.dims:
            place = Path(folder) / str(dim)
            place.mkdir()
            entries += compared(trained(corpus, dim, config), corpus, dim, place)
    heldout = sum(map(len, corpus.heldout))
    seconds = time.monotonic() - begun
    print(
        f"{options.tokens:,} training tokens of {corpus.name}, {heldout:,} held-out tokens in "
        f"{len(corpus.heldout):,} documents, seed {options.seed}, {seconds:.0f} s\n\n"
        f"{markdown(entries)}"
    )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(
            json.dumps(
                {
                    "tokens": options.tokens,
                    "data": corpus.name,
                    "heldout_tokens": heldout,
                    "heldout_documents": len(corpus.heldout),
                    "seed": options.seed,
                    "cpu": cpu.name(),
                    "commit": provenance.commit(),
                    "torch": torch.__version__,
                    "tables": entries,
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    if missing := {name: value for name, value in MALLOC.items() if name not in os.environ}:
        # malloc reads them when a process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | missing)
    main()
