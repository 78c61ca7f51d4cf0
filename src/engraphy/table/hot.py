"""The hot index in a table's folder: written with the table, checked when it is opened."""

from __future__ import annotations

from pathlib import Path

from ..addresses.hot import FILE_NAME, HotIndex
from ..errors import (
    ConfigError,
    DigestMismatch,
    ShardCorrupt,
    ShardForeign,
    ShardMissing,
    ShardTruncated,
)
from ..spec.config import EngramConfig


def check_index(config: EngramConfig, hot: HotIndex | None, vocab_digest: str) -> None:
    """Checks that an index is the one that a config names.

    Raises:
        ConfigError: One of the two is missing.
        DigestMismatch: It is another index, or one of another vocabulary map.
    """
    if (hot is None) != (config.hot is None):
        raise ConfigError(
            f"hot: expected the index that the config names, {config.hot}, found {hot}"
        )
    if hot is None:
        return
    expected = (config.hot, vocab_digest)
    if (hot.spec, hot.vocab_digest) != expected:
        raise DigestMismatch(
            f"hot: expected an index of {config.hot} and vocabulary map {vocab_digest}, found "
            f"{hot.spec} and map {hot.vocab_digest}"
        )


def read_index(directory: Path, config: EngramConfig, vocab_digest: str) -> HotIndex | None:
    """The index of the table in a folder; None if the config names none.

    It is read into memory and hashed: an n-gram that a damaged index did not find, or one found in
    the place of another, would get wrong rows without a word.

    Raises:
        ShardMissing: There is no file.
        ShardForeign: It is another index.
        ShardTruncated: It cannot be read, or its header is damaged.
        ShardCorrupt: It is damaged.
    """
    index = check_file(directory, config, vocab_digest, mapped=False)
    if index is not None:
        try:
            index.verify()
        except DigestMismatch as error:
            raise ShardCorrupt(f"{directory / FILE_NAME}: {error}") from error
    return index


def check_file(
    directory: Path, config: EngramConfig, vocab_digest: str, mapped: bool = True
) -> HotIndex | None:
    """The index of the table in a folder, by its header; None if the config names none.

    Raises as `read_index`, but for damage of the content.
    """
    if config.hot is None:
        return None
    path = directory / FILE_NAME
    if not path.exists():
        raise ShardMissing(
            f"{path}: expected the table's hot index, digest {config.hot.digest}, found no file"
        )
    try:
        index = HotIndex.load(path, mapped)
    except ConfigError as error:
        raise ShardTruncated(str(error)) from error
    try:
        check_index(config, index, vocab_digest)
    except DigestMismatch as error:
        raise ShardForeign(f"{path}: {error}") from error
    return index
