"""Documents: read from files, books, Wikipedia or the hub, and split into those to train on and
those held out."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, DataUnavailable, InputError
from . import books, wiki

SUFFIXES = (".txt", ".md")


@dataclass(frozen=True)
class Documents:
    """Texts of one source.

    Attributes:
        name: Name of the source.
        licence: The licence that the texts came with, or "not stated".
        texts: The documents, none of them empty.
        heldout: Those of the texts that the source itself holds out; None = it has no split.
    """

    name: str
    licence: str
    texts: tuple[str, ...]
    heldout: tuple[str, ...] | None = None

    def split(self, heldout: float = 0.05, seed: int = 0) -> tuple[list[str], list[str]]:
        """The texts to train on and the texts held out: the source's own split if it has one.

        Args:
            heldout, seed: As `split_documents` takes them, for a source without a split.
        """
        if self.heldout is None:
            return split_documents(self.texts, heldout, seed)
        unseen = set(self.heldout)
        return [text for text in self.texts if text not in unseen], list(self.heldout)


def load_documents(source: str) -> Documents:
    """Reads the documents of a source.

    Args:
        source: "wiki", "wiki:es" or "wiki:fr": Wikipedia summaries, fetched once. "hf:NAME" or
            "hf:NAME:CONFIG": the `text` column of the train split, through the `datasets` package.
            "books:FOLDER": the listed books of a folder, as `read_books` reads them.
            Anything else: a UTF-8 text file, or a folder of .txt and .md files in the order of
            their paths; a form feed divides a file into documents.

    Raises:
        DataUnavailable: The source does not exist or holds no text.
        InputError: A file is not UTF-8.
    """
    kind, _, rest = source.partition(":")
    if kind == "wiki":
        language = rest or "en"
        name = f"wiki:{language}"
        licence = wiki.LICENCE
        texts = wiki.wiki_texts(language)
    elif kind == "hf":
        dataset, _, config = rest.partition(":")
        name = source
        licence, texts = _from_datasets(dataset, config)
    elif kind == "books":
        found = books.read_books(rest)
        return Documents(source, books.LICENCE, found.train + found.heldout, found.heldout)
    else:
        name = source
        licence = "not stated"
        texts = _from_files(Path(source))
    texts = tuple(text for text in texts if text.strip())
    if not texts:
        raise DataUnavailable(f"{source}: expected documents, found no text")
    return Documents(name, licence, texts)


def split_documents(
    texts: Sequence[str], heldout: float = 0.05, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Splits texts into those to train on and those held out.

    The texts whose seeded hash comes first are held out. So the split depends neither on order nor
    on repetition, and no text is on both sides.

    Args:
        texts: At least two distinct texts.
        heldout: Share of the distinct texts that is held out; at least one text is.
        seed: Seed of the hash.

    Returns:
        The texts to train on and the texts held out, both in the order of `texts`.

    Raises:
        ConfigError: heldout is not between 0 and 1.
        InputError: There are fewer than two distinct texts.
    """
    if not 0 < heldout < 1:
        raise ConfigError(f"heldout: expected a share between 0 and 1, found {heldout}")
    distinct = sorted(
        set(texts), key=lambda text: hashlib.sha256(f"{seed}:{text}".encode()).digest()
    )
    if len(distinct) < 2:
        raise InputError(
            f"texts: expected at least two different documents, to hold one out, found "
            f"{len(distinct)}; "
            "a form feed divides a file into documents"
        )
    count = min(max(1, round(heldout * len(distinct))), len(distinct) - 1)
    unseen = set(distinct[:count])
    training = [text for text in texts if text not in unseen]
    return training, [text for text in texts if text in unseen]


def _from_files(path: Path) -> list[str]:
    if not path.exists():
        raise DataUnavailable(
            f"{path}: expected a text file, a folder of {' and '.join(SUFFIXES)} files, wiki, "
            "books:FOLDER or hf:NAME, found no such path"
        )
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    texts = []
    for file in files:
        try:
            whole = file.read_text(encoding="utf-8-sig")
            texts += [text.strip("\r\n") for text in whole.split("\f")]
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: expected UTF-8 text, found {error}") from None
        except OSError as error:
            raise DataUnavailable(f"{file}: {error.strerror}") from None
    return texts


def _from_datasets(name: str, config: str) -> tuple[str, list[str]]:
    """Licence and texts of a data set of the hub. config: "" = the default one."""
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
