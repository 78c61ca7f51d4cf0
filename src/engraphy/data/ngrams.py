"""N-grams of texts or of token ids in files, counted for a hot tier.

A text is encoded once, into a folder beside the result; a count that was stopped goes on there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ..addresses.addresser import Addresser
from ..addresses.counting import count_ngrams
from ..addresses.ngrams import Ngrams
from ..errors import ConfigError, DataUnavailable
from ..system.files import make_folder, publish_folder, write_errors
from .encoded import Encoded
from .sources import file_texts
from .tokens import encode_each

Progress = Callable[[str, int, int], None]

_STEP = 1 << 22  # ids of a file that are looked at together


@dataclass(frozen=True)
class Tokens:
    """Token ids of a corpus.

    Attributes:
        ids: integers [T], mapped from a file.
        begins: int64, places at which documents begin.
    """

    ids: np.ndarray
    begins: np.ndarray


def count_file(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    addresser: Addresser,
    top: int,
    *,
    tokenizer: Tokenizer | None = None,
    document_end: int | None = None,
    memory: int = 1 << 30,
    progress: Progress | None = None,
) -> Ngrams:
    """Counts the n-grams of a file exactly, and writes the most frequent ones.

    What is done is kept in the folder `out`.work, which is removed at the end: the same call
    continues. Text files are read whole, one at a time; token ids are mapped.

    Args:
        source: A text file, or a folder of .txt and .md files, whose form feeds divide documents;
            or an .npy file of raw ids, integers [T].
        out: The file to write (`Ngrams.save`).
        addresser: Says what an n-gram is; its orders are counted.
        top: How many n-grams of each order to keep.
        tokenizer: Encodes a text.
        document_end: The raw id that ends a document in an .npy file; None = one document.
        memory: As in `count_ngrams`.
        progress: Called with the stage, bytes done, and bytes in all.

    Returns:
        What was written.

    Raises:
        DataUnavailable: There is no such source, or no text in it.
        ConfigError: A text has no tokenizer, `out`.work is that of another count, or an argument is
            invalid.
        InputError: A file is not UTF-8, or an id is out of range.
        WriteFailed: The system refuses.
    """
    source = Path(source)
    out = Path(out)
    work = out.with_name(f"{out.name}.work")
    if source.suffix == ".npy":
        tokens = _mapped_ids(source, document_end)
    elif tokenizer is None:
        raise ConfigError(f"{source}: expected a tokenizer for a text (or ids as .npy), found none")
    elif document_end is not None:
        raise ConfigError(f"{source}: expected no end of documents for a text, found one")
    else:
        tokens = _encoded_text(source, work, tokenizer, progress)
    make_folder(work)
    found = count_ngrams(
        addresser,
        tokens.ids,
        top,
        begins=tokens.begins,
        memory=memory,
        state=work,
        progress=progress,
    )
    found.save(out)
    with write_errors(work):
        shutil.rmtree(work)
    return found


def _mapped_ids(path: Path, document_end: int | None) -> Tokens:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataUnavailable(f"{path}: expected token ids, found {error}") from None
    begins = [np.zeros(1 if len(ids) else 0, np.int64)]
    if document_end is not None:
        for first in range(0, len(ids), _STEP):
            ends = np.flatnonzero(ids[first : first + _STEP] == document_end)
            begins.append(ends + first + 1)
    return Tokens(ids, np.concatenate(begins))


def _encoded_text(
    path: Path, work: Path, tokenizer: Tokenizer, progress: Progress | None
) -> Tokens:
    """The tokens of a text, from the folder `work` if they are there already."""
    name = hashlib.sha256(f"{_described(path)}{tokenizer.to_str()}".encode()).hexdigest()[:16]
    folder = work / f"tokens-{name}"
    if not folder.exists():
        make_folder(work)
        with publish_folder(folder) as part:
            _encode(path, part, tokenizer, progress)
    encoded = Encoded.load(folder, "text")
    if not encoded.tokens:
        raise DataUnavailable(f"{path}: expected text, found none")
    return Tokens(encoded.ids, encoded.begins)


def _described(path: Path) -> str:
    """Names, sizes and times of the files of a text."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    status = [file.stat() for file in files if file.is_file()]
    return "".join(f"{path.resolve()} {one.st_size} {one.st_mtime_ns};" for one in status)


def _encode(path: Path, folder: Path, tokenizer: Tokenizer, progress: Progress | None) -> None:
    """Writes what `Encoded.load` reads."""
    size = 0

    def texts() -> Iterator[str]:
        nonlocal size
        for text in file_texts(path):
            size += len(text.encode())
            yield text

    lengths: list[int] = []
    with (folder / "text.ids").open("wb") as file:
        for ids in encode_each(tokenizer, texts()):
            lengths.append(len(ids))
            file.write(ids.astype("<i4").tobytes())
            if progress:
                progress("encoding", size, 0)
    sources = np.zeros(len(lengths), np.int64)
    np.savez(folder / "text.npz", lengths=lengths, sources=sources, names=np.array(["text"]))
