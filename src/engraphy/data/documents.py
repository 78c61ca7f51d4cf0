"""Text for the reference model: documents, their split, and rows of tokens in an order that any
step can be found in.

A row never carries context over from another row or document: `starts` marks where attention, hash
and conv begin anew. Which tokens a step sees depends on the documents, the sizes and the seed
alone, so every arm of a comparison trains on the same tokens in the same order, and a resumed run
goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, DataUnavailable, InputError
from . import wiki

SUFFIXES = (".txt", ".md")


@dataclass(frozen=True)
class Documents:
    """Texts, none of them empty, with a name and the licence that they came with."""

    name: str
    licence: str
    texts: tuple[str, ...]


def load_documents(source: str) -> Documents:
    """Documents of a source.

    "wiki", "wiki:es", "wiki:fr": Wikipedia summaries, fetched once. "hf:NAME" or "hf:NAME:CONFIG":
    the `text` column of the train split, through the `datasets` package. Anything else: a UTF-8
    text file, or a folder of .txt and .md files, in the order of their paths; a form feed divides a
    file into documents. Raises DataUnavailable for what is not there or holds no text, InputError
    for a file that is not UTF-8.
    """
    kind, _, rest = source.partition(":")
    if kind == "wiki":
        language = rest or "en"
        name, licence, texts = f"wiki:{language}", wiki.LICENCE, wiki.wiki_texts(language)
    elif kind == "hf":
        name = source
        licence, texts = _from_datasets(*rest.partition(":")[::2])
    else:
        name, licence, texts = source, "not stated", _from_files(Path(source))
    texts = tuple(text for text in texts if text.strip())
    if not texts:
        raise DataUnavailable(f"{source}: expected documents, found no text")
    return Documents(name, licence, texts)


def split_documents(
    texts: Sequence[str], heldout: float = 0.05, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Texts to train on and texts held out, each in the order given.

    A share `heldout` of the distinct texts is held out, at least one: those whose seeded hash comes
    first, so neither order nor repetition matters, and no text is on both sides. Raises ConfigError
    for a share outside (0, 1), InputError for fewer than two distinct texts.
    """
    if not 0 < heldout < 1:
        raise ConfigError(f"heldout: expected a share between 0 and 1, found {heldout}")
    distinct = sorted(
        set(texts), key=lambda text: hashlib.sha256(f"{seed}:{text}".encode()).digest()
    )
    if len(distinct) < 2:
        raise InputError(
            f"expected at least two different documents to hold one out, found {len(distinct)}; "
            "a form feed divides a file into documents"
        )
    count = min(max(1, round(heldout * len(distinct))), len(distinct) - 1)
    unseen = set(distinct[:count])
    return [text for text in texts if text not in unseen], [
        text for text in texts if text in unseen
    ]


def _from_files(path: Path) -> list[str]:
    if not path.exists():
        raise DataUnavailable(
            f"{path}: expected a text file, a folder of {' and '.join(SUFFIXES)} files, wiki or "
            "hf:NAME, found no such path"
        )
    files = (
        sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
        if path.is_dir()
        else [path]
    )
    texts = []
    for file in files:
        try:
            texts += [
                text.strip("\r\n") for text in file.read_text(encoding="utf-8-sig").split("\f")
            ]
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: expected UTF-8 text, found {error}") from None
        except OSError as error:
            raise DataUnavailable(f"{file}: {error.strerror}") from None
    return texts


def _from_datasets(name: str, config: str) -> tuple[str, list[str]]:
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
        raise DataUnavailable(f"hf:{name}: expected a column text, found {data.column_names}")
    return data.info.license or "not stated", list(data["text"])
