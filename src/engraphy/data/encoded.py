"""Encoded documents: token ids in one flat array, which may lie in a file, each document with the
name of its source."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload
from zipfile import BadZipFile

import numpy as np
from tokenizers import Tokenizer

from ..errors import ConfigError
from ..system.files import write_errors
from .sources import LabelledText
from .tokens import encode_each

IN_MEMORY = 2**20
"""Ids that a text may have without being written to a temporary file."""
_IDS = np.dtype("<i4")


@dataclass(frozen=True)
class Encoded(Sequence[np.ndarray]):
    """Documents as token ids, int32 each, none of them empty.

    Attributes:
        ids: int32, ids of all documents.
        begins: int64 [documents], where each document begins in `ids`.
        lengths: int64 [documents].
        sources: int64 [documents], indices into `names`.
        names: Names of the sources.
    """

    ids: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray
    sources: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.begins)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | Sequence[np.ndarray]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        begin = int(self.begins[index])
        return self.ids[begin : begin + int(self.lengths[index])]

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths.sum())

    def source(self, index: int) -> str:
        """Name of a document's source."""
        return self.names[self.sources[index]]

    def of_source(self, name: str) -> np.ndarray:
        """bool [documents], True for those of a source."""
        return self.sources == self.names.index(name)

    def save(self, folder: Path, name: str) -> None:
        """Writes `name`.ids, little-endian int32, and `name`.npz into a folder."""
        with (folder / f"{name}.ids").open("wb") as file:
            for ids in self:
                file.write(ids.astype(_IDS).tobytes())
        np.savez(
            folder / f"{name}.npz",
            lengths=self.lengths,
            sources=self.sources,
            names=np.array(self.names),
        )

    @classmethod
    def load(cls, folder: Path, name: str) -> Encoded:
        """Reads what `save` wrote. The ids stay in the file until they are used.

        Raises:
            ConfigError: The files are missing or damaged.
        """
        path = folder / f"{name}.ids"
        try:
            # An open file: numpy leaves one that it opened itself open if it is damaged.
            with (folder / f"{name}.npz").open("rb") as file, np.load(file) as data:
                lengths, sources, names = data["lengths"], data["sources"], data["names"]
            ids = _mapped(path, int(lengths.sum()))
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise ConfigError(
                f"{path}: expected token ids of a prepared corpus, "
                f"found {type(error).__name__}: {error}"
            ) from None
        return cls(ids, np.cumsum(lengths) - lengths, lengths, sources, tuple(names.tolist()))


def encode_documents(
    tokenizer: Tokenizer, texts: Iterable[LabelledText], names: Sequence[str]
) -> Encoded:
    """Encodes texts. More than IN_MEMORY ids go into a temporary file, which lives as long as the
    result; they are read from it when they are used.

    Texts without tokens are left out.

    Args:
        tokenizer: Its ids are written.
        texts: The texts, read once.
        names: Names of all sources.

    Raises:
        WriteFailed: The system refuses to write.
    """
    indices = {name: index for index, name in enumerate(names)}
    sources: list[int] = []
    keys: list[int] = []
    lengths: list[int] = []

    def noted() -> Iterable[str]:
        for text in texts:
            sources.append(indices[text.source])
            keys.append(text.key)
            yield text.text

    waiting: list[np.ndarray] = [np.empty(0, _IDS)]
    size = 0  # ids that wait
    with write_errors(Path(tempfile.gettempdir())), tempfile.TemporaryFile() as file:
        for ids in encode_each(tokenizer, noted()):
            lengths.append(len(ids))
            waiting.append(ids.astype(_IDS))
            size += len(ids)
            if size > IN_MEMORY:
                file.write(np.concatenate(waiting).tobytes())
                waiting = [np.empty(0, _IDS)]
                size = 0
        flat = np.concatenate(waiting)
        if size < sum(lengths):
            file.write(flat.tobytes())
            file.flush()
            flat = np.memmap(file, _IDS, "r")
    length = np.array(lengths, dtype=np.int64)
    begins = np.cumsum(length) - length
    # By source, then by key: so the order in which a source gives its texts does not matter.
    places = sorted(range(len(keys)), key=lambda place: (sources[place], keys[place]))
    kept = np.array([place for place in places if lengths[place]], dtype=np.int64)
    of_source = np.array(sources, dtype=np.int64)
    return Encoded(flat, begins[kept], length[kept], of_source[kept], tuple(names))


def _mapped(path: Path, count: int) -> np.ndarray:
    size = path.stat().st_size
    if size != count * _IDS.itemsize:
        raise ValueError(f"{size} bytes in place of {count * _IDS.itemsize}")
    return np.memmap(path, _IDS, "r") if count else np.empty(0, _IDS)
