"""The mix: text of several sources in stated shares, read one document at a time.

`mix` is Wikipedia summaries in English, French and Spanish, and the Python source of the standard
library. `mix+books:FOLDER` adds classic books, and `mix+FOLDER` any text: parts are divided by "+".
Nothing but the hashes and the sizes of the documents is kept in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import ConfigError, DataUnavailable, InputError
from .sources import (
    LabelledText,
    Source,
    books_source,
    code_source,
    own_source,
    wiki_source,
)

SHARES: Mapping[str, float] = {"en": 0.35, "fr": 0.20, "es": 0.20, "code": 0.25}
"""Shares of the sources in the characters of the mix, without books."""
BOOKS = 0.75
"""Share of the books, if they are added. The others divide the rest as SHARES says."""
HELDOUT_CHARACTERS = 2_000_000
"""Most characters to hold out. More would be measured for longer, and would show nothing new."""
EXCERPT = 75_000
"""Characters of a document that are held out: a long book counts by its beginning alone."""
SMALL = 5_000_000
"""Tokens that the mix without books is enough for."""
_KEY_BITS = 64


@dataclass(frozen=True)
class Part:
    """What a mix took from a source.

    Attributes:
        source: Name of the source.
        origin: Package, version or path.
        licence: Licence of the texts.
        digest: SHA-256 over all documents of the source, in whatever order they came, as hex.
        share: Stated share of the characters to train on; None = all of its text, on top.
        documents: Documents to train on.
        characters: Their characters.
        heldout_documents: Documents held out.
        heldout_characters: Their characters.
    """

    source: str
    origin: str
    licence: str
    digest: str
    share: float | None
    documents: int
    characters: int
    heldout_documents: int
    heldout_characters: int


class _Entry(NamedTuple):
    """What is kept of a document: a seeded hash of its text, a hash without a seed, and its size in
    characters."""

    key: int
    identity: bytes
    size: int


class Mix:
    """Documents of several sources in shares of their characters.

    A document's side depends on its text and the seed alone, or on the source's own split. So
    adding a source moves no document of another one to the other side. Of a text that comes twice
    the first is taken. A source with too much text gives the documents whose hashes come first.

    Args:
        sources: Where documents come from, each under a name of its own.
        shares: Share of each source in the characters, by name. A source without one gives all of
            its text, on top.
        heldout: Share of the documents that is held out, if a source has no split of its own.
        seed: Seed of the hash.

    Attributes:
        parts: What was taken, in the order of the sources.

    Raises:
        ConfigError: heldout is not between 0 and 1, or a name comes twice.
        DataUnavailable: A source cannot be read, or has no text.
        InputError: A file is not UTF-8, or nothing is held out.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        shares: Mapping[str, float],
        heldout: float = 0.05,
        seed: int = 0,
    ):
        names = [source.name for source in sources]
        if len(set(names)) < len(names):
            raise ConfigError(f"mix: expected each source once, found {', '.join(names)}")
        if not 0 < heldout < 1:
            raise ConfigError(f"heldout: expected a share between 0 and 1, found {heldout}")
        self.sources = tuple(sources)
        self.heldout_share = heldout
        self.seed = seed
        seen: set[int] = set()
        read = [self._index(source, seen) for source in sources]
        sides = dict(zip(names, read, strict=True))
        chosen = _chosen(sides, shares, heldout)
        self._keys = [{entry.key for part in chosen.values() for entry in part[i]} for i in (0, 1)]
        if not self._keys[1]:
            raise InputError(
                f"mix of {', '.join(names)}: expected documents to hold out, found none; "
                "give more documents, or a larger share"
            )
        self.parts = tuple(
            _part(source, sides[source.name], chosen[source.name], shares.get(source.name))
            for source in sources
        )

    @property
    def digest(self) -> str:
        """SHA-256 over the parts, the held-out share and the seed: equal digests, equal mixes."""
        lines = [f"{part.source} {part.share} {part.digest}" for part in self.parts]
        text = "\n".join([f"{self.heldout_share} {self.seed}", *lines])
        return hashlib.sha256(text.encode()).hexdigest()

    def training(self) -> Iterator[LabelledText]:
        """Documents to train on, one at a time, source by source."""
        return self._texts(0)

    def heldout(self) -> Iterator[LabelledText]:
        """Documents held out, one at a time, each with its first EXCERPT characters at most."""
        return self._texts(1)

    def _index(self, source: Source, seen: set[int]) -> tuple[list[_Entry], list[_Entry]]:
        """The entries to train on and those held out, by key. Adds to the keys that were seen."""
        sides: tuple[list[_Entry], list[_Entry]] = ([], [])
        for _, entry, heldout in self._documents(source):
            if entry.key not in seen:
                seen.add(entry.key)
                sides[heldout].append(entry)
        if not sides[0]:
            raise DataUnavailable(f"{source.origin}: expected documents to train on, found none")
        return sorted(sides[0]), sorted(sides[1])

    def _texts(self, side: int) -> Iterator[LabelledText]:
        given: set[int] = set()
        for source in self.sources:
            for text, (key, _, _), heldout in self._documents(source):
                if heldout == side and key in self._keys[side] and key not in given:
                    given.add(key)
                    yield LabelledText(source.name, text, key)

    def _documents(self, source: Source) -> Iterator[tuple[str, _Entry, bool]]:
        """Text, entry and side of each document that is not blank."""
        for text, heldout in source.read():
            if not text.strip():
                continue
            identity = hashlib.sha256(text.encode()).digest()
            seeded = hashlib.sha256(f"{self.seed}:".encode() + identity).digest()
            key = int.from_bytes(seeded[: _KEY_BITS // 8], "big")
            if heldout is None:
                heldout = key < self.heldout_share * 2**_KEY_BITS
            if heldout:
                text = _excerpt(text)
            yield text, _Entry(key, identity, len(text)), heldout


def open_mix(data: str, heldout: float = 0.05, seed: int = 0) -> Mix:
    """Reads the sources of a mix once, and chooses their documents.

    Args:
        data: "mix", and after it "+" and a part any number of times: "books:FOLDER", or a file, a
            folder or "hf:NAME".
        heldout: As in `Mix`.
        seed: As in `Mix`.

    Raises:
        ConfigError, DataUnavailable, InputError: As `Mix` raises them.
    """
    sources = [wiki_source("en"), wiki_source("fr"), wiki_source("es"), code_source()]
    shares = dict(SHARES)
    for part in data.split("+")[1:]:
        if part.startswith("books:"):
            sources.append(books_source(part.removeprefix("books:")))
            shares = {name: share * (1 - BOOKS) for name, share in SHARES.items()}
            shares["books"] = BOOKS
        else:
            sources.append(own_source(part))
    return Mix(sources, shares, heldout, seed)


def is_mix(data: str) -> bool:
    """Whether the name of a text is that of a mix."""
    return data.split("+")[0] == "mix"


def require_books(data: str, tokens: int) -> None:
    """Checks that a mix is large enough for a run.

    Args:
        data: As `load_documents` takes it.
        tokens: Training tokens of the run.

    Raises:
        ConfigError: The run is longer than SMALL and the mix has no books.
    """
    if is_mix(data) and "+books:" not in data and tokens > SMALL:
        raise ConfigError(
            f"{data}: expected at most {SMALL:,} training tokens without books, found {tokens:,}; "
            "add books: mix+books:FOLDER (engraphy data books says which)"
        )


def described(parts: Iterable[Part]) -> list[str]:
    """A line for each part: its stated share and what it gave."""
    parts = list(parts)
    whole = sum(part.characters for part in parts)
    lines = []
    for part in parts:
        stated = "all of it" if part.share is None else f"share {part.share:.4g}"
        lines.append(
            f"{part.source} ({part.origin}; {part.digest[:16]}): {stated}, "
            f"{part.characters / whole:.3f} of the characters, {part.documents:,} documents, "
            f"{part.heldout_documents:,} held out. {part.licence}"
        )
    return lines


def _excerpt(text: str) -> str:
    """The first EXCERPT characters, up to the end of a line if there is one."""
    if len(text) <= EXCERPT:
        return text
    return text[:EXCERPT].rpartition("\n")[0] or text[:EXCERPT]


_Sides = tuple[list[_Entry], list[_Entry]]


def _chosen(
    sides: Mapping[str, _Sides], shares: Mapping[str, float], heldout: float
) -> dict[str, _Sides]:
    """The entries that keep the shares, by source."""
    shared = {name: share for name, share in shares.items() if name in sides}
    sizes = {name: _size(part[0]) for name, part in sides.items()}
    # The source that has least for its share gives all of its text.
    whole = min((sizes[name] / share for name, share in shared.items()), default=0.0)
    unseen = min(HELDOUT_CHARACTERS, whole * heldout / (1 - heldout))
    chosen = {}
    for name, (training, held) in sides.items():
        if name in shared:
            training = _first(training, round(shared[name] * whole))
            held = _first(held, round(shared[name] * unseen)) or held[:1]
        else:
            held = _first(held, HELDOUT_CHARACTERS)
        chosen[name] = (training, held)
    return chosen


def _first(entries: Sequence[_Entry], budget: int) -> list[_Entry]:
    """The first entries that fit into a budget of characters; what is too long is left out."""
    kept = []
    for entry in entries:
        if entry.size <= budget:
            kept.append(entry)
            budget -= entry.size
    return kept


def _size(entries: Iterable[_Entry]) -> int:
    return sum(entry.size for entry in entries)


def _part(source: Source, sides: _Sides, chosen: _Sides, share: float | None) -> Part:
    digest = hashlib.sha256()
    for identity in sorted(entry.identity for entries in sides for entry in entries):
        digest.update(identity)
    training, held = chosen
    return Part(
        source.name,
        source.origin,
        source.licence,
        digest.hexdigest(),
        share,
        len(training),
        _size(training),
        len(held),
        _size(held),
    )
