"""Arguments that several commands share, and how their texts become values."""

from __future__ import annotations

from pathlib import Path

import typer

from ..errors import ConfigError

DATA = typer.Option(
    "wiki",
    help="wiki, mix, mix+books:FOLDER, books:FOLDER, hf:NAME, or a text file or folder.",
)
BOOKS = typer.Option(
    None, help="Folder of books that are added to --data mix; `engraphy data books` checks it."
)
DTYPE = typer.Option(
    "auto",
    help="float32, bfloat16, or auto: bfloat16 if this machine is fast at it, else float32.",
)
JSON = typer.Option(False, "--json", help="Print JSON.")
SEED = typer.Option(0, help="Seed of weights, order and split.")
SEEDS = typer.Option(3, help="Number of seeds: 0, 1, ... The first chooses the learning rates.")


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """Layers of a text such as "1,14". Raises ConfigError if it is anything else."""
    return None if text is None else parse_numbers("layers", text)


def parse_numbers(name: str, text: str) -> tuple[int, ...]:
    """Numbers of a text such as "2,3". Raises ConfigError, naming `name`, if it is another."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{name}: expected numbers divided by commas, found {text!r}") from None


def parse_rates(texts: list[str]) -> tuple[tuple[str, float], ...]:
    """(arm, rate) of texts such as "memory=0.01". Raises ConfigError if one is anything else."""
    try:
        pairs = [text.partition("=") for text in texts]
        return tuple((arm, float(rate)) for arm, _, rate in pairs)
    except ValueError:
        raise ConfigError(f"rate: expected ARM=RATE, found {', '.join(texts)!r}") from None


def split_rates(texts: list[str]) -> tuple[tuple[float, ...], tuple[tuple[str, float], ...]]:
    """Rates of all arms, ascending, and (arm, rate) of texts such as "0.004" and "memory=0.01".
    Raises ConfigError if one is anything else."""
    try:
        everywhere = tuple(sorted({float(text) for text in texts if "=" not in text}))
    except ValueError:
        raise ConfigError(f"rate: expected RATE or ARM=RATE, found {', '.join(texts)!r}") from None
    return everywhere, parse_rates([text for text in texts if "=" in text])


def with_books(data: str, books: Path | None) -> str:
    """The mix `data` with the books of a folder. Raises ConfigError if `data` is no mix."""
    if books is None:
        return data
    if data.split("+")[0] != "mix":
        raise ConfigError(f"books: expected --data mix to add them to, found --data {data}")
    return f"{data}+books:{books}"


def run_folder(kind: str, resume: bool = False) -> Path:
    """The newest of the folders runs/KIND-N if it is resumed, else the next one, which is free."""
    numbers = [path.name.removeprefix(f"{kind}-") for path in Path("runs").glob(f"{kind}-*")]
    taken = [int(number) for number in numbers if number.isdigit()]
    newest = max(taken, default=0)
    return Path("runs") / f"{kind}-{newest if resume and taken else newest + 1}"
