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
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..errors import DataUnavailable, InputError

SOURCE = "the public repository mlschmitt/classic-books-markdown"
LICENCE = f"public domain, according to {SOURCE}"
PACKED = ".txt.xz"
_NAMED = 8  # books that a message names
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


def stream_books(folder: str | Path) -> Iterator[tuple[Listed, str]]:
    """The listed books of a folder, one at a time, each once, in the order in which they lie there.

    Args:
        folder: As in `read_books`.

    Raises:
        DataUnavailable: As `read_books` raises it; for missing books after the last one.
        InputError: A file is not UTF-8.
    """
    known = {book.digest: book for book in listed()}
    seen: set[str] = set()
    foreign: set[str] = set()  # titles
    for _, text in _texts(_checked(folder)):
        digest = _digest(text)
        if digest in known and digest not in seen:
            seen.add(digest)
            yield known[digest], text
        elif digest not in known:
            foreign.add(_title(text))
    _refuse_missing(folder, seen, foreign)


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
    known = {book.digest for book in listed()}
    texts: dict[str, str] = {}
    foreign: dict[str, str] = {}  # name: title
    for name, text in _texts(_checked(folder)):
        digest = _digest(text)
        if digest in known:
            texts[digest] = text
        else:
            foreign[name] = _title(text)
    if not partial:
        _refuse_missing(folder, texts, foreign.values())
    missing = tuple(book.title for book in listed() if book.digest not in texts)
    present = [book for book in listed() if book.digest in texts]
    return Books(
        tuple(texts[book.digest] for book in present if book.split == "train"),
        tuple(texts[book.digest] for book in present if book.split == "heldout"),
        missing,
        tuple(foreign),
    )


def list_digest() -> str:
    """SHA-256 over the digests and splits of the list, as hex."""
    lines = "".join(f"{book.digest} {book.split}\n" for book in listed())
    return _digest(lines)


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _checked(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise DataUnavailable(f"{folder}: expected a folder of books, found no such folder")
    return folder


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _title(text: str) -> str:
    title = _TITLE.match(text)
    return title[1].strip() if title else ""


def _refuse_missing(folder: str | Path, found: Collection[str], titles: Iterable[str]) -> None:
    """Raises DataUnavailable unless all listed books are found.

    Args:
        folder: Named by the message.
        found: Digests of the books that are there.
        titles: Titles of texts that are not listed.
    """
    missing = [book.title for book in listed() if book.digest not in found]
    if not missing:
        return
    changed = set(titles)
    names = [f"{name} (with another text)" if name in changed else name for name in missing]
    raise DataUnavailable(
        f"{folder}: expected {len(listed())} books of {SOURCE}, found {len(found)}; "
        f"missing: {some(names)}"
    )


def _texts(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and normalised text of each book of a folder, one at a time."""
    for file in sorted(folder.rglob("*")):
        is_packed = file.name.endswith(PACKED)
        if not file.is_file() or not (is_packed or file.suffix == ".md"):
            continue
        name = str(file.relative_to(folder))
        try:
            if not is_packed:
                yield name, normalised(file.read_text(encoding="utf-8-sig"))
                continue
            for book in _divided(file):
                yield f"{name}: {book.partition(chr(10))[0]}", book
        except OSError as error:
            raise DataUnavailable(f"{file}: {error.strerror}") from None
        except (lzma.LZMAError, EOFError) as error:
            raise DataUnavailable(f"{file}: expected a file packed by xz, found {error}") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: expected UTF-8 text, found {error}") from None


def _divided(file: Path) -> Iterator[str]:
    """The normalised books of a packed file. Not more than one is unpacked at a time."""
    lines: list[str] = []
    with lzma.open(file, "rt", encoding="utf-8-sig") as unpacked:
        for line in unpacked:
            if line.rstrip("\n") != "\f":
                lines.append(line)
                continue
            if book := normalised("".join(lines)):
                yield book
            lines = []
    if book := normalised("".join(lines)):
        yield book
