"""Stores of rows, opened by URL or path."""

from __future__ import annotations

import os

from ..errors import ConfigError
from ..table.table import Table
from .base import MappedStore, RowStore, StoreInfo, StoreStats, copy_rows
from .cache import CacheStore, parse_size
from .checkpoint import open_checkpoint
from .file import FileStore, open_layer, write_layer
from .names import follow, names_of
from .options import FileOptions, flag, split_options
from .pool import PoolStore, open_pool
from .pread import PreadStore
from .ram import RamStore
from .reload import ReloadableStore, reload_layers
from .warming import Warmed, warm

__all__ = [
    "CacheStore",
    "FileStore",
    "MappedStore",
    "PoolStore",
    "PreadStore",
    "RamStore",
    "ReloadableStore",
    "RowStore",
    "StoreInfo",
    "StoreStats",
    "Warmed",
    "copy_rows",
    "follow",
    "names_of",
    "open_checkpoint",
    "open_pool",
    "open_store",
    "reload_layers",
    "warm",
    "write_layer",
]


def open_store(
    url: str | os.PathLike[str],
    layer: int | None = None,
    rows: int | None = None,
    row_bytes: int | None = None,
    mode: str = "r",
) -> RowStore:
    """The store that a URL names; a path (`pathlib.Path`) is the folder of a table, as "file:DIR"
    without options.

    A URL is divided at its first "?": a folder whose name has one is given as a path, here or to
    `open_checkpoint` or `open_pool`. "ram:" holds `rows` rows of `row_bytes` bytes, zero at first,
    always writable. "file:DIR?read=auto" serves `layer` of the table at DIR (a path as it is, not
    percent-encoded); mode "w" opens the table for writing, `store.table.seal()` ends that, and
    closing the store closes the table. Options of file:, joined by "&": read=mmap|pread|auto,
    threads=128 and direct=0|1 (of pread), populate=0|1 (of mmap): see `FileOptions`, whose `choose`
    tells what "auto" does. `info.reads` says what it has come to. cache=2GiB: rows that are asked
    for often are kept in so much memory for this layer (KiB, MiB, GiB, or bytes).
    "checkpoint:DIR?vocab=FILE" serves `layer` of a released checkpoint from its own shards,
    read-only; FILE: a saved vocabulary map, by default its tokenizer's.
    "pool:PATH?from=DIR&populate=1" serves `layer` of a table that all processes of this host share
    at PATH, read-only; from=DIR: where there is none yet it is filled with the table at DIR, and it
    has to be that one (see `open_pool`). Raises ConfigError for an unknown scheme or option and for
    arguments that the scheme does not take, TableError for a table that cannot be used.
    """
    if not isinstance(url, (str, os.PathLike)):
        raise ConfigError(f"store: expected a URL or a path, found {url!r}")
    if mode not in ("r", "w"):
        raise ConfigError(f"store {url!r}: expected mode 'r' or 'w', found {mode!r}")
    if not isinstance(url, str):
        return _open_table(
            repr(url), os.fspath(url), layer, rows, row_bytes, mode, FileOptions(), None
        )
    scheme, colon, rest = url.partition(":")
    if scheme == "ram" and colon:
        return _open_ram(url, rest, layer, rows, row_bytes)
    if scheme == "file" and colon:
        return _open_file(url, rest, layer, rows, row_bytes, mode)
    if scheme == "checkpoint" and colon:
        if mode != "r" or rows is not None or row_bytes is not None:
            raise ConfigError(
                f"store {url!r}: expected mode 'r' and neither rows nor row_bytes, found mode={mode!r}, "
                f"rows={rows!r}, row_bytes={row_bytes!r}"
            )
        return _open_checkpoint(url, rest, layer)
    if scheme == "pool" and colon:
        return _open_pool(url, rest, layer, rows, row_bytes, mode)
    raise ConfigError(f"store {url!r}: expected ram:, file:DIR, checkpoint:DIR or pool:PATH")


def _open_ram(
    url: str, rest: str, layer: int | None, rows: int | None, row_bytes: int | None
) -> RowStore:
    if rest:
        raise ConfigError(f"store {url!r}: expected nothing after ram:")
    if rows is None or row_bytes is None:
        raise ConfigError(
            f"store {url!r}: expected rows and row_bytes, found rows={rows!r}, row_bytes={row_bytes!r}"
        )
    return RamStore(rows, row_bytes, layer)


def _open_file(
    url: str, rest: str, layer: int | None, rows: int | None, row_bytes: int | None, mode: str
) -> RowStore:
    path, _, text = rest.partition("?")
    given = split_options(url, text, ("read", "threads", "direct", "populate", "cache"))
    budget = None if "cache" not in given else parse_size(url, given.pop("cache"))
    options = FileOptions.parse(url, given)
    if not path:
        raise ConfigError(f"store {url!r}: expected the directory of a table after file:")
    return _open_table(repr(url), path, layer, rows, row_bytes, mode, options, budget)


def _open_table(
    name: str,
    path: str,
    layer: int | None,
    rows: int | None,
    row_bytes: int | None,
    mode: str,
    options: FileOptions,
    budget: int | None,
) -> RowStore:
    """A layer of the table at `path`; name: what messages call it."""
    if layer is None:
        raise ConfigError(f"store {name}: expected a layer")
    if rows is not None or row_bytes is not None:
        raise ConfigError(
            f"store {name}: the table tells rows and row_bytes, found rows={rows!r}, "
            f"row_bytes={row_bytes!r}"
        )
    table = Table.open(path, mode)
    try:
        store = open_layer(table, layer, options)
        return store if budget is None else CacheStore(store, budget)
    except BaseException:
        table.close()
        raise


def _open_checkpoint(url: str, rest: str, layer: int | None) -> RowStore:
    path, _, text = rest.partition("?")
    given = split_options(url, text, ("vocab",))
    if not path:
        raise ConfigError(f"store {url!r}: expected the folder of a checkpoint after checkpoint:")
    if layer is None:
        raise ConfigError(f"store {url!r}: expected a layer")
    return open_checkpoint(path, layer, given.get("vocab"))


def _open_pool(
    url: str, rest: str, layer: int | None, rows: int | None, row_bytes: int | None, mode: str
) -> RowStore:
    path, _, text = rest.partition("?")
    given = split_options(url, text, ("from", "populate"))
    if not path or given.get("from") == "":
        raise ConfigError(
            f"store {url!r}: expected the directory of a pool after pool:, that of a table after from="
        )
    if layer is None or mode != "r" or rows is not None or row_bytes is not None:
        raise ConfigError(
            f"store {url!r}: expected a layer, mode 'r' and neither rows nor row_bytes, found "
            f"layer={layer!r}, mode={mode!r}, rows={rows!r}, row_bytes={row_bytes!r}"
        )
    return open_pool(
        path, layer, given.get("from"), flag(url, "populate", given.get("populate", "1"))
    )
