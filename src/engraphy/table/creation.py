"""Steps of creating a table: `check_parts` compares its parts, `build` makes its files."""

from __future__ import annotations

from typing import Protocol

from ..addresses.hot import FILE_NAME, HotIndex
from ..errors import ConfigError
from ..rows.format import RowFormat
from ..spec.config import EngramConfig
from .hot import check_index
from .lock import WriterLock
from .manifest import Manifest


class Vocab(Protocol):
    """What a table needs of a vocabulary map (`addresses.vocab.VocabMap` is one)."""

    @property
    def digest(self) -> str: ...
    def __len__(self) -> int: ...


def check_parts(config: EngramConfig, fmt: RowFormat, vocab: Vocab, hot: HotIndex | None) -> None:
    """Checks that configuration, row format, vocabulary map and hot index fit each other.

    Raises:
        ConfigError: They do not.
        DigestMismatch: The index is not the one that the configuration names.
    """
    if fmt.d != config.dim:
        raise ConfigError(f"row format: expected d = {config.dim}, the config's dim, found {fmt.d}")
    if len(vocab) != config.hash.vocab_size:
        raise ConfigError(
            f"vocab: expected {config.hash.vocab_size} ids, the hash spec's vocab_size, "
            f"found {len(vocab)}"
        )
    check_index(config, hot, vocab.digest)


def build(manifest: Manifest, hot: HotIndex | None) -> WriterLock:
    """Makes the files of a new table in manifest.directory, and takes its writer's lock.

    Raises:
        TableError: engram.json cannot be read back. Better now than after hours of writing.
        WriteFailed: The system refuses.
    """
    for shard in manifest.all_shards():
        shard.create(manifest.table_id)
    if hot is not None:
        hot.save(manifest.directory / FILE_NAME)
    manifest.write()
    Manifest.read(manifest.directory)
    return WriterLock.take(manifest.directory)
