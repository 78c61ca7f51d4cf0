"""Stores of rows, opened by URL."""

from __future__ import annotations

from ..errors import ConfigError
from ..table import Table
from .base import MappedStore, RowStore, StoreInfo, StoreStats, copy_rows
from .file import FileStore, write_layer
from .ram import RamStore

__all__ = ["FileStore", "MappedStore", "RamStore", "RowStore", "StoreInfo", "StoreStats", "copy_rows", "open_store",
           "write_layer"]


def open_store(url: str, layer: int | None = None, rows: int | None = None, row_bytes: int | None = None,
               mode: str = "r") -> RowStore:
    """The store that a URL names.

    "ram:" holds `rows` rows of `row_bytes` bytes, zero at first, always writable. "file:DIR" maps `layer` of the table
    at DIR (a path as it is, not percent-encoded; what follows a "?" are options, of which there are none yet); mode
    "w" opens the table for writing, `store.table.seal()` ends that, and closing the store closes the table.
    Raises ConfigError for an unknown scheme or option and for arguments that the scheme does not take, TableError for a
    table that cannot be used.
    """
    if not isinstance(url, str):
        raise ConfigError(f"store: expected a URL, found {url!r}")
    if mode not in ("r", "w"):
        raise ConfigError(f"store {url!r}: expected mode 'r' or 'w', found {mode!r}")
    scheme, colon, rest = url.partition(":")
    if scheme == "ram" and colon:
        return _open_ram(url, rest, layer, rows, row_bytes)
    if scheme == "file" and colon:
        return _open_file(url, rest, layer, rows, row_bytes, mode)
    raise ConfigError(f"store {url!r}: expected ram: or file:DIR")


def _open_ram(url: str, rest: str, layer: int | None, rows: int | None, row_bytes: int | None) -> RowStore:
    if rest:
        raise ConfigError(f"store {url!r}: expected nothing after ram:")
    if rows is None or row_bytes is None:
        raise ConfigError(f"store {url!r}: expected rows and row_bytes, found rows={rows!r}, row_bytes={row_bytes!r}")
    return RamStore(rows, row_bytes, layer)


def _open_file(url: str, rest: str, layer: int | None, rows: int | None, row_bytes: int | None, mode: str) -> RowStore:
    path, _, options = rest.partition("?")
    if options:
        raise ConfigError(f"store {url!r}: expected no options, found {options!r}")
    if not path:
        raise ConfigError(f"store {url!r}: expected the directory of a table after file:")
    if layer is None:
        raise ConfigError(f"store {url!r}: expected a layer")
    if rows is not None or row_bytes is not None:
        raise ConfigError(f"store {url!r}: the table tells rows and row_bytes, found rows={rows!r}, "
                          f"row_bytes={row_bytes!r}")
    table = Table.open(path, mode)
    try:
        return FileStore(table, layer, close_table=True)
    except BaseException:
        table.close()
        raise
