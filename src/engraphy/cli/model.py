"""The command `engraphy model`: a transformers model and its memory."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from ..system.files import write_file
from .arguments import DTYPE, JSON, SEED, parse_layers, run_folder
from .terminal import errors

app = typer.Typer(no_args_is_help=True, help="A transformers model and its memory.")

MODEL = typer.Argument(help="Folder or hub name of a transformers model.")


@app.command()
def finetune(
    model: str = MODEL,
    data: str = typer.Option(
        help="A text file, a folder of them, a .jsonl file with text in each line, or a name: "
        "wiki, mix, mix+books:FOLDER, books:FOLDER, hf:NAME."
    ),
    out: Path | None = typer.Option(
        None, help="New folder of the memory; default: runs/finetune-1, -2, ..."
    ),
    tokens: int | None = typer.Option(None, help="Training tokens; default: the whole text once."),
    lr: float = typer.Option(
        1e-2, help="Learning rate of the dense layers; rows learn five times as fast."
    ),
    layers: str | None = typer.Option(
        None, help="Layers with a memory, counted from 0: 1,14; default: two."
    ),
    rows_per_head: int | None = typer.Option(
        None, help="Rows of a head; default: as the text and the model need."
    ),
    batch: int = typer.Option(4, help="Rows of a step."),
    length: int = typer.Option(256, help="Tokens of a row."),
    seed: int = SEED,
    lora: int | None = typer.Option(
        None, help="Rank of LoRA adapters to train with the memory; default: none."
    ),
    whole: bool = typer.Option(
        False, "--whole", help="Save the model with its memory, as vLLM and AutoModel load it."
    ),
    dtype: str = DTYPE,
) -> None:
    """Train a memory for a model that exists, on text of your own; the model stays as it is."""
    with errors("a training that had begun is saved"):
        from ..recipes import finetune as recipe

        config = recipe.FinetuneConfig(
            model,
            data,
            out or run_folder("finetune"),
            tokens,
            lr,
            parse_layers(layers),
            rows_per_head,
            batch,
            length,
            seed=seed,
            lora=lora,
            dtype=dtype,
            whole=whole,
        )
        recipe.finetune(config, Console())


@app.command()
def generate(
    model: str = MODEL,
    memory: str = typer.Argument(help="Folder of its memory."),
    prompt: str = typer.Argument(help="Text to continue."),
    show_gates: bool = typer.Option(
        False, "--show-gates", help="Colour each token by how far it opens the gates."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON: text, tokens and gates."),
    tokens: int = typer.Option(64, help="Most tokens to generate."),
    temperature: float = typer.Option(0.0, help="0 takes the likeliest token each time."),
    seed: int = typer.Option(0, help="Seed of the samples."),
    dtype: str = DTYPE,
) -> None:
    """Generate text from a model with its memory, and show what the memory's gates let in."""
    with errors("nothing was written"):
        from ..recipes import generate as recipe

        config = recipe.GenerateConfig(model, memory, prompt, tokens, temperature, seed, dtype)
        generated = recipe.generate(config, lambda line: typer.echo(line, err=True))
        if as_json:
            typer.echo(json.dumps(generated.to_json(), indent=1))
        else:
            recipe.show(generated, show_gates, Console())


@app.command()
def inspect(
    model: str = typer.Argument(
        help="Folder of a demo run, or folder or hub name of a transformers model."
    ),
    memory: str | None = typer.Argument(
        None,
        help="Folder of its memory; for Qwen4-Exp a table to serve. Default: what the model has.",
    ),
    text: str = typer.Option(help="The text to look at."),
    corpus: str | None = typer.Option(
        None,
        help="A text file, a folder of them, a .jsonl file, or wiki: name its n-grams that share "
        "rows with those of the text. Default for a demo run: its training text.",
    ),
    page: Path | None = typer.Option(None, help="Write a page, one HTML file, here."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
    dtype: str = typer.Option("float32", help="float32, bfloat16, or auto."),
) -> None:
    """Show what a memory does at each token: gates, rows, pushes, LogitLens, predictions."""
    with errors("nothing was written"):
        from ..recipes import inspect as recipe

        config = recipe.InspectConfig(model, memory, text, corpus, page, dtype)
        found = recipe.inspect(config, lambda line: typer.echo(line, err=True))
        if as_json:
            typer.echo(json.dumps(found.to_json(), indent=1))
        elif page is None:
            recipe.show(found, Console())


@app.command(name="eval")
def evaluate(
    model: str = MODEL,
    memory: str | None = typer.Argument(
        None, help="Folder of its memory; default: what the model was saved with."
    ),
    tasks: str = typer.Option(
        help="Tasks of lm-evaluation-harness, divided by commas; a folder of task files; "
        "humaneval; or paper: the benchmarks of the paper's table."
    ),
    include: Path | None = typer.Option(
        None, help="A folder of task files beside the harness's own."
    ),
    batch: int = typer.Option(8, help="Texts at a time."),
    shots: int | None = typer.Option(
        None, help="Examples before each item; default: as the task says."
    ),
    limit: int | None = typer.Option(None, help="The first items of each task only."),
    json_file: Path | None = typer.Option(
        None, "--json", help="A file for all of it: each item, each program, the versions."
    ),
    run_code: bool = typer.Option(
        False, "--run-code", help="Let HumanEval run what the model writes, in a sandbox."
    ),
    without: list[str] = typer.Option(
        [], help="A protection that the sandbox may lack: network, files, processes or user."
    ),
    seconds: float = typer.Option(3.0, help="What a program of HumanEval may take."),
    tokens: int = typer.Option(512, help="Most tokens of a completion of HumanEval."),
    dtype: str = DTYPE,
) -> None:
    """Evaluate a model on tasks, with its memory and without, side by side."""
    with errors("nothing was written"):
        from ..recipes import evaluate as recipe

        config = recipe.EvalConfig(
            model,
            memory,
            tuple(tasks.split(",")),
            include,
            batch,
            shots,
            limit,
            run_code,
            tuple(without),
            seconds,
            tokens,
            dtype,
        )
        evaluation = recipe.evaluate(config, lambda line: typer.echo(line, err=True))
        recipe.show(evaluation, Console())
        if json_file is not None:
            write_file(json_file, json.dumps(evaluation.to_json(), indent=1) + "\n")


@app.command()
def show(
    name: str = typer.Argument(
        help="Dense-4B, MoE-27B, Engram-27B, Engram-40B, DeepSeek-V4.1 (its memory), demo, or a "
        "JSON file with the fields of an LMConfig."
    ),
    scale: int = typer.Option(1, help="Shrink one of the paper's models by this factor."),
    vocab: int | None = typer.Option(None, help="Token ids of the model; default: as published."),
    as_json: bool = JSON,
) -> None:
    """Show the sizes of a model that can be trained from scratch, and its parameters by part."""
    with errors("nothing was written"):
        from ..lm import configs, tables

        shown = configs.backbone(name, scale, vocab_size=vocab)
        if as_json:
            typer.echo(json.dumps(tables.as_json(shown), indent=1))
            return
        console = Console()
        console.print(f"[bold]{escape(shown.name)}[/], {escape(shown.source)}", highlight=False)
        sizes = tables.model_sizes(shown) | tables.memory_sizes(shown)
        grid = Grid("size", "", box=None)
        notes = configs.notes(shown, scale)
        grid.add_column("by the rule" if scale > 1 else "")
        for what, value in sizes.items():
            grid.add_row(what, value, notes.get(what, ""))
        console.print(grid, highlight=False)
        counts = Grid("parameters", box=None)
        counts.add_column("all", justify="right")
        counts.add_column("a token uses", justify="right")
        for row in tables.parameter_rows(shown):
            counts.add_row(*row)
        console.print(counts, highlight=False)
