"""The values of one token on the page of an inspection: predictions, gates, pushes and rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .markup import fixed, number, signed
from .tokens import Piece, visible

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Guess:
    """A candidate of a prediction; hit = it is the token that follows."""

    pieces: Sequence[Piece]
    probability: str
    width: str
    hit: bool


@dataclass(frozen=True)
class Shared:
    """An n-gram that reads the same row."""

    pieces: Sequence[Piece]
    count: str


@dataclass(frozen=True)
class RowLine:
    """A row of the table: who else reads it. others is empty if nothing was compared."""

    row: str
    others: str
    frequent: Sequence[Shared]
    more: str


@dataclass(frozen=True)
class NgramBlock:
    """An n-gram with the rows that are read for it."""

    order: str
    pieces: Sequence[Piece]
    count: str
    shared: str
    rows: Sequence[RowLine]


@dataclass(frozen=True)
class Meter:
    """A gate of one stream, and what it adds."""

    gate: str
    width: str
    size: str


@dataclass(frozen=True)
class LayerBlock:
    """The memory of a layer at a token."""

    layer: str
    meters: Sequence[Meter]
    towards: Sequence[Sequence[Piece]]
    away: Sequence[Sequence[Piece]]
    ngrams: Sequence[NgramBlock]


@dataclass(frozen=True)
class Details:
    """All that is known of a token.

    Attributes:
        pieces: Its text.
        id: Its id.
        following: The token that follows; empty at the end.
        on: Candidates with the memory.
        off: Candidates without it.
        loss: Loss of the following token with and without, and the difference; empty at the end.
        effect: "helps", "hurts" or "" for the difference.
        layers: One block a layer with a memory.
    """

    pieces: Sequence[Piece]
    id: str
    following: Sequence[Piece]
    on: Sequence[Guess]
    off: Sequence[Guess]
    loss: Sequence[str]
    effect: str
    layers: Sequence[LayerBlock]


def details(report: Report, place: int) -> Details:
    """Returns the values of a token.

    Args:
        report: An inspection in format "engraphy-inspection-1".
        place: Which token.
    """
    token = report["tokens"][place]
    last = place + 1 == len(report["tokens"])
    following = None if last else report["tokens"][place + 1]["text"]
    loss, effect = [], ""
    if token["on"]["loss"] is not None:
        on, off = token["on"]["loss"], token["off"]["loss"]
        loss = [fixed(on, 2), fixed(off, 2), signed(on - off, 2)]
        effect = "helps" if on < off else "hurts"
    return Details(
        _pieces(token["text"]),
        number(token["id"]),
        [] if following is None else _pieces(following),
        _guesses(token["on"], following),
        _guesses(token["off"], following),
        loss,
        effect,
        [_layer_block(view, token) for view in token["memory"]],
    )


def _guesses(prediction: Report, following: str | None) -> list[Guess]:
    guesses = []
    for one in prediction["candidates"]:
        share = one["probability"]
        guesses.append(
            Guess(
                _pieces(one["text"]),
                fixed(share, 2),
                f"{100 * share:.1f}",
                one["text"] == following,
            )
        )
    return guesses


def _layer_block(view: Report, token: Report) -> LayerBlock:
    meters = [
        Meter(fixed(gate, 2), f"{100 * gate:.0f}", short_percent(100 * size))
        for gate, size in zip(view["gates"], view["sizes"], strict=True)
    ]
    return LayerBlock(
        number(view["layer"]),
        meters,
        [_pieces(text) for text in view["towards"]],
        [_pieces(text) for text in view["away"]],
        [_ngram_block(ngram, view["rows"]) for ngram in token["ngrams"]],
    )


def _ngram_block(ngram: Report, rows: Sequence[Report]) -> NgramBlock:
    own = [row for row in rows if row["order"] == ngram["order"]]
    compared = all(row["others"] is not None for row in own)
    shared = ""
    if compared:
        several = sum(bool(row["others"]) for row in own)
        shared = f"{several} of {len(own)} rows shared"
    count = ""
    if ngram["count"] is not None:
        count = f"{number(ngram['count'])}\u00d7 in the text"
    return NgramBlock(
        f"{ngram['order']}-gram",
        _pieces(ngram["text"]),
        count,
        shared,
        [_row_line(row) for row in own],
    )


def _row_line(row: Report) -> RowLine:
    frequent = [Shared(_pieces(one["text"]), number(one["count"])) for one in row["frequent"]]
    others, more = "", ""
    if row["others"] is not None:
        others = "its own" if not row["others"] else f"{number(row['others'])} others"
        unnamed = row["others"] - len(frequent)
        if frequent and unnamed > 0:
            more = f"and {number(unnamed)} more"
        elif row["others"]:
            more = "" if frequent else f"each rare, {number(row['reads'])} reads together"
    return RowLine(number(row["row"]), others, frequent, more)


def _pieces(text: str) -> tuple[Piece, ...]:
    """Returns the pieces of a token or n-gram; an outer space is not shown."""
    return visible(text).pieces


def short_percent(value: float) -> str:
    """A number of percent: whole from 10 on, with one decimal below."""
    return f"{fixed(value, 0 if value >= 10 else 1)}\u00a0%"
