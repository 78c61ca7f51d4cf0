"""`engraphy model inspect`: what a memory does at each token of a text, in the terminal and as a
page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..analysis.inspection import Inspection, LayerView, Prediction, Row, Source, TokenView
from ..analysis.inspection import inspect as inspect_text
from ..errors import ConfigError
from ..report import inspection as page
from ..train.dtype import check_dtype
from .inspected import open_model
from .painting import painted, pieces, shade

_COLUMNS = 12  # layers of LogitLens that a terminal shows


@dataclass(frozen=True)
class InspectConfig:
    """What to look into.

    Attributes:
        model: As `open_model` takes it.
        memory: As `open_model` takes it.
        text: The text.
        corpus: A text file, a folder of them, a .jsonl file or a named data set, with whose
            n-grams the rows of the text are compared. None = the training text of a demo run; no
            comparison for other models.
        page: Where to write the page; None = no page.
        dtype: As `choose_dtype` takes it.

    Raises:
        ConfigError: The text is empty, or there is no such dtype.
    """

    model: str
    memory: str | None
    text: str
    corpus: str | None = None
    page: Path | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if not self.text.strip():
            raise ConfigError(f"text: expected at least one word, found {self.text!r}")


def inspect(config: InspectConfig, say: Callable[[str], None] = lambda line: None) -> Inspection:
    """Reads what the memory does at each token, and writes the page if one is wanted.

    Args:
        config: Model, memory, text.
        say: Called with one line: the path of the page.

    Returns:
        What `analysis.inspection.inspect` returns.

    Raises:
        EngraphyError: What `open_model` and `load_texts` raise; WriteFailed if the page cannot be
            written.
    """
    opened = open_model(config.model, config.memory, config.dtype)
    documents, corpus = opened.training or [], None
    if config.corpus is not None:
        documents, corpus = opened.documents(config.corpus), config.corpus
    elif opened.training is not None:
        corpus = "its training text"
    ids = opened.encode(config.text)
    source = Source(
        _name(config.model),
        "" if config.memory is None else _name(config.memory),
        config.text,
        pieces(opened.decode, ids),
        corpus,
        documents,
    )
    found = inspect_text(opened.subject, ids, source, lambda few: opened.decode(list(few)))
    if config.page is not None:
        page.write(found.to_json(), config.page)
        say(f"page: {config.page}")
    return found


def _name(path: str) -> str:
    """The last name of a folder, or a hub name as it is."""
    return Path(path).resolve().name if Path(path).exists() else path


def show(found: Inspection, console: Console) -> None:
    """Prints everything: the text by gate, LogitLens, then each token.

    Args:
        found: What `inspect` returned.
        console: Where to print.
    """
    texts = [token.text for token in found.tokens]
    if console.color_system is not None:
        for place, layer in enumerate(found.layers):
            values = [_mean(token.memory[place].gates) for token in found.tokens]
            console.print(painted(f"layer {layer}  gate", texts, values), soft_wrap=True)
    console.print(_lens(found, console.color_system is not None))
    console.print("o: before the memory.  *: a memory is added before this layer.\n")
    for number, token in enumerate(found.tokens):
        console.print(_token(found, number, token), soft_wrap=True)


def _lens(found: Inspection, colours: bool) -> Table:
    """KL by layer and token, and the means with and without the memory."""
    layers = _chosen(len(found.before_memory))
    highest = max(token.lens_on[layer].kl for token in found.tokens for layer in layers)
    table = Table(box=None, title="LogitLens: KL(layer || final), nats", title_justify="left")
    table.add_column("after layer", no_wrap=True)
    for layer in layers:
        table.add_column(f"{layer}{_mark(found, layer)}", justify="right")
    for token in found.tokens:
        cells = []
        for layer in layers:
            kl = token.lens_on[layer].kl
            style = shade(kl / highest if highest > 0 else 0.0) if colours else ""
            cells.append(Text(f"{kl:.2f}", style))
        table.add_row(Text(repr(token.text)), *cells)
    for name in ("lens_on", "lens_off"):
        means = []
        for layer in layers:
            values = [getattr(token, name)[layer].kl for token in found.tokens]
            means.append(f"{_mean(values):.2f}")
        table.add_row("mean with" if name == "lens_on" else "mean without", *means)
    return table


def _chosen(depth: int) -> list[int]:
    """All layers, or as many as a terminal shows, the first and the last among them."""
    if depth <= _COLUMNS:
        return list(range(depth))
    return sorted({round(at * (depth - 1) / (_COLUMNS - 1)) for at in range(_COLUMNS)})


def _mark(found: Inspection, layer: int) -> str:
    if found.before_memory[layer]:
        return "o"
    return "*" if layer in found.layers else ""


def _token(found: Inspection, number: int, token: TokenView) -> Text:
    """All that is known of a token."""
    text = Text()
    text.append(f"{number} {token.text!r}", "bold")
    if token.on.loss is not None and token.off.loss is not None:
        following = found.tokens[number + 1].text
        text.append(
            f"  then {following!r}: {token.on.loss:.2f} nats with the memory, {token.off.loss:.2f} "
            f"without ({token.on.loss - token.off.loss:+.2f})"
        )
    text.append(f"\n  with     {_candidates(token.on)}\n  without  {_candidates(token.off)}\n")
    for view in token.memory:
        text.append_text(_layer(token, view))
    return text


def _candidates(prediction: Prediction) -> str:
    return "  ".join(f"{one.text!r} {one.probability:.2f}" for one in prediction.candidates)


def _layer(token: TokenView, view: LayerView) -> Text:
    gates = " ".join(f"{gate:.3f}" for gate in view.gates)
    sizes = " ".join(f"{100 * size:.0f} %" for size in view.sizes)
    text = Text(f"  layer {view.layer}: gate {gates}, adds {sizes} of the stream\n")
    if view.towards:
        text.append(f"    towards {' '.join(map(repr, view.towards))}\n")
        text.append(f"    away from {' '.join(map(repr, view.away))}\n")
    for ngram in token.ngrams:
        count = "" if ngram.count is None else f", {ngram.count:,} times in the text"
        text.append(f"    {ngram.order}-gram {ngram.text!r}{count}\n")
        for row in view.rows:
            if row.order == ngram.order:
                text.append(f"      row {row.row:,}{_sharers(row)}\n", "dim")
    return text


def _sharers(row: Row) -> str:
    if not row.others:
        return "" if row.others is None else ": its own"
    named = ", ".join(f"{one.text!r} ({one.count:,})" for one in row.frequent)
    more = f" others {row.others:,}, {row.reads:,} times"
    return f": {named};{more}" if named else f":{more}"


def _mean(values: tuple[float, ...] | list[float]) -> float:
    return sum(values) / len(values)
