"""What is known of a release's tables before a row is read, whatever files they lie in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..addresses.vocab import VocabMap
from ..errors import TableError
from ..rows.format import RowFormat
from ..spec.config import EngramConfig
from ..table.safetensors import StoredTensor


@dataclass(frozen=True)
class TokenMap:
    """A vocabulary map that a release's files hold.

    Attributes:
        place: The file, and the map's name in it.
        vocab: The map.
    """

    place: str
    vocab: VocabMap


@dataclass(frozen=True)
class Found:
    """The tables of a release.

    Attributes:
        config: The memory.
        fmt: The format of the rows as records.
        weights: The tensors of each layer, in row order.
        scales: The block scales of each weight tensor, by layer; empty if the records hold them.
        raw_vocab: Size of the model's vocabulary.
        assumed: What the files do not say and was taken to be so, in words.
        token_map: The vocabulary map in the files; None if they hold none.
    """

    config: EngramConfig
    fmt: RowFormat
    weights: Mapping[int, tuple[StoredTensor, ...]]
    scales: Mapping[int, tuple[StoredTensor, ...]]
    raw_vocab: int
    assumed: tuple[str, ...] = ()
    token_map: TokenMap | None = None


def one_format(path: Path, formats: Iterable[RowFormat]) -> RowFormat:
    """The one format of all layers. Raises TableError if there are several."""
    distinct = set(formats)
    if len(distinct) > 1:
        raise TableError(f"{path}: expected rows of one format in all layers, found {distinct}")
    return distinct.pop()
