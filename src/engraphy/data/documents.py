"""Documents: read from files, books, Wikipedia or the hub, and split into those to train on and
those held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, DataUnavailable, InputError
from . import books, wiki
from .mix import is_mix, open_mix
from .sources import dataset_texts, file_texts


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
            "books:FOLDER": the listed books of a folder, as `read_books` reads them. "mix",
            "mix+books:FOLDER" or "mix+FOLDER": the mix, as `open_mix` takes it.
            Anything else: a UTF-8 text file, or a folder of .txt and .md files in the order of
            their paths; a form feed divides a file into documents.

    Raises:
        DataUnavailable: The source does not exist or holds no text.
        InputError: A file is not UTF-8.
    """
    if is_mix(source):
        return _mixed(source)
    kind, _, rest = source.partition(":")
    if kind == "wiki":
        language = rest or "en"
        name = f"wiki:{language}"
        licence = wiki.LICENCE
        texts = wiki.wiki_texts(language)
    elif kind == "hf":
        dataset, _, config = rest.partition(":")
        name = source
        licence, texts = dataset_texts(dataset, config)
    elif kind == "books":
        found = books.read_books(rest)
        return Documents(source, books.LICENCE, found.train + found.heldout, found.heldout)
    else:
        name = source
        licence = "not stated"
        texts = file_texts(Path(source))
    texts = tuple(text for text in texts if text.strip())
    if not texts:
        raise DataUnavailable(f"{source}: expected documents, found no text")
    return Documents(name, licence, texts)


def _mixed(source: str) -> Documents:
    mix = open_mix(source)
    training = tuple(document.text for document in mix.training())
    unseen = tuple(document.text for document in mix.heldout())
    licences = dict.fromkeys(part.licence for part in mix.parts)
    return Documents(source, "; ".join(licences), training + unseen, unseen)


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
