"""Tokens made visible: white space and control characters as signs."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

_WHITE = {" ": "\u2423", "\n": "\u21b5", "\r": "\u240d", "\t": "\u21e5"}
_HIDDEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"}  # categories of Unicode
_CARRIER = "\u25cc"  # what a lone combining mark stands on


@dataclass(frozen=True)
class Piece:
    """A part of a token.

    Attributes:
        text: What is shown.
        sign: True if `text` stands for characters that cannot be seen, as "U+200B" does.
    """

    text: str
    sign: bool


@dataclass(frozen=True)
class VisibleToken:
    """A token in pieces that can be seen.

    Attributes:
        pieces: At least one. Text that stands side by side is one piece, each sign is its own.
        before: True if a single space stood before the text.
        after: True if a single space stood after the text.
    """

    pieces: tuple[Piece, ...]
    before: bool
    after: bool


def visible(token: str) -> VisibleToken:
    """Makes a token visible.

    A single outer space becomes a gap between tokens. Other white space, control and format
    characters become signs or code points, and a lone combining mark gets a carrier.

    Args:
        token: The text of one token, of any characters.

    Returns:
        The pieces of the token, and where a single space stood.
    """
    before = len(token) > 1 and token[0] == " " and token[1] != " "
    if before:
        token = token[1:]
    after = len(token) > 1 and token[-1] == " " and token[-2] != " "
    if after:
        token = token[:-1]
    pieces = tuple(_joined(_characters(token))) or (Piece("empty", True),)
    return VisibleToken(pieces, before, after)


def _characters(token: str) -> Iterator[Piece]:
    """One piece for each character. A space between words stays a space."""
    spaces_are_signs = token.strip() != token
    for place, char in enumerate(token):
        if char == " " and not spaces_are_signs:
            yield Piece(char, False)
        elif char in _WHITE:
            yield Piece(_WHITE[char], True)
        elif unicodedata.category(char) in _HIDDEN:
            yield Piece(f"U+{ord(char):04X}", True)
        elif place == 0 and unicodedata.combining(char):
            yield Piece(_CARRIER + char, False)
        else:
            yield Piece(char, False)


def _joined(characters: Iterator[Piece]) -> Iterator[Piece]:
    """Text that stands side by side as one piece; signs stay apart."""
    for sign, pieces in groupby(characters, key=lambda piece: piece.sign):
        if sign:
            yield from pieces
        else:
            yield Piece("".join(piece.text for piece in pieces), False)
