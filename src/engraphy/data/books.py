"""Classic books whose texts are known by their digests, so that a command means the same text
everywhere.

They are 274 books of the public repository mlschmitt/classic-books-markdown. books.tsv lists the
SHA-256, the split and the title of each; the digests were checked against one copy alone, that of
the list's authors. A book's text is hashed as `normalised` gives it. So neither the line ends of a
checkout nor the way the books are packed change a digest.
"""

from __future__ import annotations

import hashlib
import lzma
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..errors import DataUnavailable, InputError

SOURCE = "the public repository mlschmitt/classic-books-markdown"
LICENCE = f"public domain, according to {SOURCE}"
PACKED = ".txt.xz"
_NAMED = 8  # books that a message names
_DIVIDER = re.compile(r"^\f$", re.MULTILINE)
_TITLE = re.compile(r"# Title: *(.*)")


@dataclass(frozen=True)
class Listed:
    """A book of the list.

    Attributes:
        digest: SHA-256 of its text, as hex.
        split: "train" or "heldout".
        title: As its first line has it.
    """

    digest: str
    split: str
    title: str


@dataclass(frozen=True)
class Books:
    """The books of a folder.

    Attributes:
        train: Texts to train on, in the order of the list.
        heldout: Texts held out, in the order of the list.
        missing: Titles of listed books that the folder does not have.
        foreign: What the folder has beside listed books, none of it in the texts: each named by its
            file, and by its first line if the file holds many.
    """

    train: tuple[str, ...]
    heldout: tuple[str, ...]
    missing: tuple[str, ...]
    foreign: tuple[str, ...]


@cache
def listed() -> tuple[Listed, ...]:
    """The list, in the order in which the texts are given."""
    lines = Path(__file__).with_name("books.tsv").read_text(encoding="utf-8").splitlines()
    return tuple(Listed(*line.split("\t")) for line in lines)


def normalised(text: str) -> str:
    """A text with line feeds as line ends, and no white space around it."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def read_books(folder: str | Path, partial: bool = False) -> Books:
    """Reads the listed books of a folder.

    Args:
        folder: A folder with, at any depth, books as .md files, or .txt.xz files in which lines
            with a form feed and nothing else divide books.
        partial: Go on if books are missing.

    Returns:
        The books. What is not listed is named, and left out.

    Raises:
        DataUnavailable: There is no such folder, a file cannot be read, or books are missing. The
            message names them.
        InputError: A file is not UTF-8.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataUnavailable(f"{folder}: expected a folder of books, found no such folder")
    known = {book.digest: book for book in listed()}
    texts: dict[str, str] = {}
    foreign: dict[str, str] = {}  # name: title
    for name, text in _texts(folder):
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest in known:
            texts[digest] = text
        else:
            title = _TITLE.match(text)
            foreign[name] = title[1].strip() if title else ""
    missing = tuple(book.title for book in listed() if book.digest not in texts)
    if missing and not partial:
        changed = set(foreign.values())
        names = [f"{name} (with another text)" if name in changed else name for name in missing]
        raise DataUnavailable(
            f"{folder}: expected {len(known)} books of {SOURCE}, found {len(texts)}; "
            f"missing: {some(names)}"
        )
    present = [book for book in listed() if book.digest in texts]
    return Books(
        tuple(texts[book.digest] for book in present if book.split == "train"),
        tuple(texts[book.digest] for book in present if book.split == "heldout"),
        missing,
        tuple(foreign),
    )


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _texts(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and normalised text of each book of a folder."""
    for file in sorted(folder.rglob("*")):
        is_packed = file.name.endswith(PACKED)
        if not file.is_file() or not (is_packed or file.suffix == ".md"):
            continue
        name = str(file.relative_to(folder))
        text = _decoded(file, is_packed)
        if not is_packed:
            yield name, normalised(text)
            continue
        lines = text.replace("\r\n", "\n").replace("\r", "\n")
        for book in map(normalised, _DIVIDER.split(lines)):
            if book:
                yield f"{name}: {book.partition(chr(10))[0]}", book


def _decoded(file: Path, is_packed: bool) -> str:
    try:
        data = file.read_bytes()
        if is_packed:
            data = lzma.decompress(data)
    except OSError as error:
        raise DataUnavailable(f"{file}: {error.strerror}") from None
    except lzma.LZMAError as error:
        raise DataUnavailable(f"{file}: expected a file packed by xz, found {error}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: expected UTF-8 text, found {error}") from None
