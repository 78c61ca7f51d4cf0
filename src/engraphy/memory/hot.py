"""The hot index of a memory: the one that was handed in, or the one in the table's folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..addresses.hot import HotIndex
from ..addresses.vocab import VocabMap
from ..errors import ConfigError, DigestMismatch
from ..spec.config import EngramConfig
from ..store.base import StoreInfo
from ..table.hot import read_index


def naming(config: EngramConfig, hot: HotIndex | None) -> EngramConfig:
    """The config, naming this index.

    Raises:
        DigestMismatch: It names another one.
    """
    if hot is None or config.hot == hot.spec:
        return config
    if config.hot is not None:
        raise DigestMismatch(
            f"hot: expected the index that the config names, {config.hot}, found {hot}"
        )
    return dataclasses.replace(config, hot=hot.spec)


def index_of(config: EngramConfig, vocab: VocabMap, info: StoreInfo) -> HotIndex | None:
    """The index that a config names, from the folder of the table that stores serve.

    Args:
        config: Of the memory.
        vocab: Its vocabulary map.
        info: Of one of its stores.

    Raises:
        ConfigError: The stores serve no table in a folder.
        TableError: The index is missing or damaged.
    """
    if config.hot is None:
        return None
    if info.path is None or info.table_id is None:
        raise ConfigError(
            f"hot: expected the index of digest {config.hot.digest}, which the config names, for "
            f"{info.kind} stores without a table; give hot="
        )
    return read_index(Path(info.path), config, vocab.digest)
