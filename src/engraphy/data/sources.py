"""Sources of text that are read one document at a time: files, data sets of the hub, Wikipedia,
the standard library, and books."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..errors import DataUnavailable, InputError
from . import books, stdlib, wiki

SUFFIXES = (".txt", ".md")


class SplitText(NamedTuple):
    """A document.

    Attributes:
        text: Its text.
        heldout: Whether the source itself holds it out; None = the source has no split.
    """

    text: str
    heldout: bool | None = None


class LabelledText(NamedTuple):
    """A document beside others.

    Attributes:
        source: Name of its source.
        text: Its text.
        key: Its place among the documents of its source: they are sorted by it.
    """

    source: str
    text: str
    key: int


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    Attributes:
        name: Short name, by which results speak of its documents.
        origin: Package, version or path.
        licence: Licence of the texts, or "not stated".
        read: Gives all documents, one at a time and in the same order each time. It raises
            DataUnavailable or InputError if the source cannot be read.
    """

    name: str
    origin: str
    licence: str
    read: Callable[[], Iterator[SplitText]]


def wiki_source(language: str) -> Source:
    """Wikipedia summaries, as `wiki_texts` gives them; "en", "fr" or "es"."""

    def read() -> Iterator[SplitText]:
        return map(SplitText, wiki.wiki_texts(language))

    return Source(language, f"{wiki.REQUIREMENT}, {language}", wiki.LICENCE, read)


def code_source() -> Source:
    """The standard library of the running interpreter."""

    def read() -> Iterator[SplitText]:
        return map(SplitText, stdlib.stdlib_texts())

    return Source("code", f"standard library of {stdlib.version()}", stdlib.LICENCE, read)


def books_source(folder: str) -> Source:
    """The listed books of a folder, with the list's own split."""

    def read() -> Iterator[SplitText]:
        for book, text in books.stream_books(folder):
            yield SplitText(text, book.split == "heldout")

    origin = f"{books.SOURCE}, list {books.list_digest()[:16]}"
    return Source("books", origin, books.LICENCE, read)


def own_source(source: str) -> Source:
    """A text file, a folder or "hf:NAME", as `load_documents` takes them."""
    if source.startswith("hf:"):
        dataset, _, config = source.removeprefix("hf:").partition(":")
        licence, texts = dataset_texts(dataset, config)
        return Source(source, source, licence, lambda: map(SplitText, texts))
    return Source(source, source, "not stated", partial(_own_texts, source))


def _own_texts(source: str) -> Iterator[SplitText]:
    return map(SplitText, file_texts(Path(source)))


def file_texts(path: Path) -> Iterator[str]:
    """The documents of a text file, or of a folder of .txt and .md files in the order of their
    paths. A form feed divides a file into documents.

    Raises:
        DataUnavailable: There is no such path, or a file cannot be read.
        InputError: A file is not UTF-8.
    """
    if not path.exists():
        raise DataUnavailable(
            f"{path}: expected a text file, a folder of {' and '.join(SUFFIXES)} files, wiki, mix, "
            "books:FOLDER or hf:NAME, found no such path"
        )
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    for file in files:
        try:
            whole = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: expected UTF-8 text, found {error}") from None
        except OSError as error:
            raise DataUnavailable(f"{file}: {error.strerror}") from None
        yield from (text.strip("\r\n") for text in whole.split("\f"))


def dataset_texts(name: str, config: str) -> tuple[str, list[str]]:
    """Licence and texts of a data set of the hub.

    Args:
        name: Name of the data set.
        config: Its configuration; "" = the default one.

    Raises:
        DataUnavailable: `datasets` is not installed or cannot load it, or it has no column "text".
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise DataUnavailable(
            f"hf:{name}: expected the datasets package, which is not installed; "
            "pip install datasets, or give a text file or folder"
        ) from None
    try:
        data = datasets.load_dataset(name, config or None, split="train")
    except Exception as error:  # the hub's errors share no base
        raise DataUnavailable(
            f"hf:{name}: datasets could not load it ({type(error).__name__}: {error}); "
            "give a text file or folder instead"
        ) from error
    if "text" not in data.column_names:
        raise DataUnavailable(f'hf:{name}: expected a column "text", found {data.column_names}')
    return data.info.license or "not stated", list(data["text"])
