"""The stores of one memory, opened and checked together: every layer's rows, of one table, as the
config says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from ..errors import ConfigError, DigestMismatch
from ..rows.format import RowFormat
from ..spec.config import EngramConfig
from ..table.table import Table
from . import FileStore, RowStore, follow, open_store


class Group(NamedTuple):
    """Opened stores. owned: those that were made for this memory, which closes them: not the ones
    that its maker handed in, nor a Table."""

    format: RowFormat
    stores: dict[int, RowStore]
    owned: tuple[RowStore, ...]


def open_stores(
    config: EngramConfig,
    digest: str,
    store: str | os.PathLike[str] | Table | Mapping[int, RowStore],
    row_format: RowFormat | str | None,
) -> Group:
    """Stores of all layers, as `EngramMemory` takes them; nothing stays open after an error."""
    if isinstance(row_format, str):
        row_format = RowFormat(row_format, config.dim)
    if not isinstance(store, (str, os.PathLike, Table, Mapping)):
        raise ConfigError(
            f"store: expected a URL, a path, a Table or {{layer: RowStore}}, found {store!r}"
        )
    if isinstance(store, str) and store.startswith("ram:"):
        row_format = row_format or RowFormat("f32", config.dim)
    owned: list[RowStore] = []
    try:
        if isinstance(store, Mapping):
            stores = dict(store)
        else:
            stores = {}
            for layer in config.hash.layer_ids:
                stores[layer] = _open(config, store, layer, row_format)
                owned.append(stores[layer])
        row_format = _check(config, digest, stores, row_format)
    except BaseException:
        for one in owned:
            one.close()
        raise
    for one in stores.values():
        follow(one)
    return Group(row_format, stores, tuple(owned))


def _open(
    config: EngramConfig,
    store: str | os.PathLike[str] | Table,
    layer: int,
    row_format: RowFormat | None,
) -> RowStore:
    if isinstance(store, Table):
        return FileStore(store, layer)
    if not (isinstance(store, str) and store.startswith("ram:")) or row_format is None:
        return open_store(store, layer=layer)
    rows = config.hash.row_count(layer)
    opened = open_store(store, rows=rows, row_bytes=row_format.row_bytes)
    follow(opened, f"{rows} zeros")
    return opened


def _check(
    config: EngramConfig,
    digest: str,
    stores: Mapping[int, RowStore],
    row_format: RowFormat | None,
) -> RowFormat:
    """The format of the rows. Raises unless the stores are of these layers, addresses and sizes."""
    layers = config.hash.layer_ids
    if set(stores) != set(layers):
        raise ConfigError(
            f"store: expected stores for layers {list(layers)}, found {sorted(stores)}"
        )
    if len({each.info.table_id for each in stores.values()}) > 1:
        raise DigestMismatch(
            f"store: expected rows of one table, found {[s.info.table_id for s in stores.values()]}"
        )
    for layer in layers:
        info = stores[layer].info
        if info.layer not in (None, layer):
            raise ConfigError(
                f"layer {layer}: expected its own store, found one of layer {info.layer}"
            )
        if info.address_digest is not None and info.address_digest != digest:
            raise DigestMismatch(
                f"layer {layer}: expected address digest {digest}, "
                f"{info.path} has {info.address_digest}"
            )
        if None not in (row_format, info.format) and row_format != info.format:
            raise ConfigError(f"layer {layer}: expected rows of {row_format}, found {info.format}")
        row_format = row_format or info.format
        if row_format is None:
            raise ConfigError(
                f"layer {layer}: the {info.kind} store does not know its row format; give row_format="
            )
        expected = (config.hash.row_count(layer), row_format.row_bytes, config.dim)
        if (info.rows, info.row_bytes, row_format.d) != expected:
            raise ConfigError(
                f"layer {layer}: expected (rows, row bytes, d) = {expected}, "
                f"found {(info.rows, info.row_bytes, row_format.d)}"
            )
    assert row_format is not None
    return row_format
