"""The tables of a release as a source of rows, to be compared with another one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..addresses.vocab import VocabMap
from ..rows.format import RowFormat
from ..spec.config import EngramConfig
from ..table.chunks import RowSource
from ..table.manifest import FILE_NAME
from ..table.table import Table
from .checkpoint import Checkpoint, is_gguf


@dataclass(frozen=True)
class ReleasedRows:
    """The rows of a release with their addresses.

    Attributes:
        checkpoint: The release.
        vocab: Its vocabulary map.
    """

    checkpoint: Checkpoint
    vocab: VocabMap

    @property
    def table_id(self) -> str:
        """The identity of the source."""
        return self.checkpoint.source_id

    @property
    def parent(self) -> str | None:
        """None: it was made from no table."""
        return None

    @property
    def address_digest(self) -> str:
        """Identity of the addresses."""
        return self.config.address_digest(self.vocab.digest)

    @property
    def config(self) -> EngramConfig:
        """The memory that the rows belong to."""
        return self.checkpoint.config

    @property
    def fmt(self) -> RowFormat:
        """Format of the rows."""
        return self.checkpoint.fmt

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's layers that have rows."""
        return self.config.hash.layer_ids

    def rows(self, layer: int) -> int:
        """Number of rows of a layer."""
        return self.config.hash.row_count(layer)

    def read_rows(self, layer: int, first: int, out_nR: np.ndarray) -> None:
        """Reads rows from number `first` on into uint8 [n, row_bytes]."""
        self.checkpoint.read_rows(layer, first, out_nR)


def is_release(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a release: a GGUF file, or a folder with a config.json and no table."""
    path = Path(path)
    if is_gguf(path):
        return True
    return not (path / FILE_NAME).exists() and (path / "config.json").exists()


def open_rows(
    path: str | os.PathLike[str], vocab: str | os.PathLike[str] | None = None
) -> RowSource:
    """Opens a sealed table, or the tables of a release.

    Args:
        path: The table's folder, the folder of a checkpoint, or a GGUF file.
        vocab: A saved vocabulary map of a release; by default as `Checkpoint.vocab` finds it.

    Raises:
        EngraphyError: As `Table.open`, `Checkpoint.open` and `Checkpoint.vocab` raise it.
    """
    if not is_release(path):
        return Table.open(path)
    checkpoint = Checkpoint.open(path)
    return ReleasedRows(checkpoint, checkpoint.vocab(vocab))
