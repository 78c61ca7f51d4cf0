"""Stores of rows, opened by URL or path."""

from __future__ import annotations

from ..system.moved import moved_names
from .base import RowStore, StoreInfo, StoreStats, copy_rows
from .cache import CacheStore
from .checkpoint import open_checkpoint
from .file import FileStore, write_layer
from .group import StoreGroup
from .mapped import MappedStore
from .names import follow, names_of
from .opening import open_store
from .pool import PoolStore, open_pool
from .pool_file import PoolFileStore, read_header, verify_pool
from .pool_header import PoolHeader
from .pread import PreadStore
from .publish import publish_pool
from .ram import RamStore
from .reload import ReloadableStore, reload_layers
from .warming import Warmed, warm
from .wrapper import WrapperStore

__all__ = [
    "CacheStore",
    "FileStore",
    "MappedStore",
    "PoolFileStore",
    "PoolHeader",
    "PoolStore",
    "PreadStore",
    "RamStore",
    "ReloadableStore",
    "RowStore",
    "StoreGroup",
    "StoreInfo",
    "StoreStats",
    "Warmed",
    "WrapperStore",
    "copy_rows",
    "follow",
    "names_of",
    "open_checkpoint",
    "open_pool",
    "open_store",
    "publish_pool",
    "read_header",
    "reload_layers",
    "verify_pool",
    "warm",
    "write_layer",
]

__getattr__ = moved_names(
    __name__,
    {
        "FileOptions": "store.options",
        "flag": "store.options",
        "open_layer": "store.file",
        "parse_size": "store.options",
        "split_options": "store.options",
    },
)
