"""The command `engraphy study`: many training runs, compared. Without a name, the demo study."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import typer

from ..recipes.studies import COMPARISONS, STUDIES
from .arguments import BOOKS, DATA, SEEDS, parse_rates, split_rates, with_books
from .terminal import errors

app = typer.Typer(
    invoke_without_command=True,
    help="Many training runs, compared; without a name, the demo study. Each continues if stopped.",
)

OUT = typer.Option(Path("results/demo"), help="Folder of the result files.")
ADAPT_OUT = typer.Option(Path("results/adapt"), help="Folder of the result files.")
WORK = typer.Option(Path("runs/study"), help="Folder of corpora and checkpoints.")
COMPARISON_WORK = typer.Option(Path("runs/studies"), help="Folder of corpora and checkpoints.")
TOKENS = typer.Option(1_000_000, help="Training tokens of each run.")
WORKERS = typer.Option(
    os.cpu_count() or 1, help="Runs at a time, one thread each.", show_default="all CPUs"
)


@app.callback()
def main(
    context: typer.Context,
    out: Path = OUT,
    work: Path = WORK,
    data: str = DATA,
    seeds: int = SEEDS,
    tokens: int = TOKENS,
    workers: int = WORKERS,
) -> None:
    # No docstring: Typer would print it in place of the help above.
    if context.invoked_subcommand is None:
        demo(out, work, data, seeds, tokens, workers)
        return
    name = context.invoked_subcommand
    for parameter in context.params:
        source = context.get_parameter_source(parameter)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"expected --{parameter} after {name}, found it before")


@app.command(help=STUDIES["demo"].sentence)
def demo(
    out: Path = OUT,
    work: Path = WORK,
    data: str = DATA,
    seeds: int = SEEDS,
    tokens: int = TOKENS,
    workers: int = WORKERS,
) -> None:
    from ..recipes.studies import demo_study as recipe

    with errors("the same command continues"):
        config = recipe.StudyConfig(tuple(range(seeds)), tokens, data)
        recipe.study(config, out, work, workers, typer.echo)
        typer.echo(recipe.tables(config, out))


@app.command(help=STUDIES["adapt"].sentence)
def adapt(
    model: Path = typer.Argument(help="Folder of a transformers model."),
    general: Path = typer.Argument(
        help="Text that neither the model nor the domain holds: a file or a folder."
    ),
    out: Path = ADAPT_OUT,
    seeds: int = SEEDS,
    tokens: int = typer.Option(100_000, help="Training tokens of each run."),
    rate: list[str] = typer.Option(
        [],
        help="ARM=RATE: only this arm, at this learning rate; may be repeated. "
        "Without it all arms run and search their rates.",
    ),
    workers: int = WORKERS,
) -> None:
    with errors("the same command continues"):
        from ..recipes.studies import adapt as recipe

        config = recipe.AdaptConfig(
            model, general, tokens, seeds=tuple(range(seeds)), rates=parse_rates(rate)
        )
        recipe.adapt_study(config, out, workers, typer.echo)
        typer.echo(recipe.tables(config, out))


_BACKBONE = "Model that the arms change: smallest, demo, base, wide, deep, or Engram-27B/N."


def _comparison(name: str) -> Callable[..., None]:
    """The command of a comparison."""
    # Arms that need each other have one rate; pairs that are compared by layer need enough of them.
    usual_backbone = {"depth": "deep", "hot": "wide"}.get(name, "base")
    usual_rates = (4e-3,) if name in ("depth", "needles") else (4e-3, 6e-3, 8e-3)
    tried = ", ".join(f"{lr:g}" for lr in usual_rates)

    def run(
        out: Path | None = typer.Option(
            None, help="Folder of the result files.", show_default=f"results/{name}"
        ),
        work: Path = COMPARISON_WORK,
        seeds: int = SEEDS,
        tokens: int = typer.Option(4_000_000, help="Training tokens of each run."),
        data: str = typer.Option("mix", help=STUDIES[name].options["data"]),
        books: Path | None = BOOKS,
        backbone: str = typer.Option(usual_backbone, help=_BACKBONE),
        rate: list[str] = typer.Option(
            [],
            help=f"Learning rate to try; may be repeated. One is not searched. By default {tried}. "
            "ARM=RATE: this arm runs at it, without a search.",
        ),
        rho: float | None = typer.Option(
            None, help="Share of the experts that a memory leaves; by default 0.75."
        ),
        workers: int = WORKERS,
        smallest: bool = typer.Option(
            False, "--smallest", help="Run in seconds, to see that it works: no result."
        ),
        cost: bool = typer.Option(False, "--cost", help="Say what it would cost, and stop."),
    ) -> None:
        with errors("the same command continues"):
            from ..recipes.studies.study import run_study, study_cost, study_table

            study = STUDIES[name].load()
            if smallest:
                config = study.config.smallest()
            else:
                seed_list = tuple(range(seeds))
                rates, known = split_rates(rate)
                text = with_books(data, books)
                config = study.config(
                    seed_list, tokens, text, backbone, rates or usual_rates, rho, known
                )
            kind = "smallest/" if smallest else ""
            folder = Path(f"results/{kind}{name}") if out is None else out
            typer.echo(f"{name}: {study_cost(study, config, folder)}")
            if cost:
                return
            run_study(study, config, folder, workers, typer.echo, work)
            typer.echo(study_table(study, config, folder))

    return run


for _name in COMPARISONS:
    app.command(_name, help=STUDIES[_name].sentence)(_comparison(_name))
