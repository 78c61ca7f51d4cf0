"""The rows of one memory: the stores of all its layers, opened, checked and closed together."""

from __future__ import annotations

import os
from collections.abc import (
    Callable,
    ItemsView,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    ValuesView,
)
from typing import Protocol

from ..errors import ConfigError, DigestMismatch
from ..rows.format import RowFormat
from ..spec.config import EngramConfig
from ..table.table import Table
from .base import RowStore, StoreInfo, copy_rows
from .file import FileStore, write_layer
from .names import follow, names_of
from .opening import open_store

StoreSource = str | os.PathLike[str] | Table | Mapping[int, RowStore]


class Closable(Protocol):
    """A store or a table."""

    def close(self) -> None: ...


class StoreGroup(Mapping[int, RowStore]):
    """The stores of all layers of one memory, by layer, with rows of one format and one table.

    `open` makes one from a URL, a path, a table or stores. A store's description may change while
    it is served (a seal, a reload), so `info`, `table_id` and `writable` ask the stores each time.

    Attributes:
        format: the format of the rows.
    """

    def __init__(
        self,
        stores: Mapping[int, RowStore],
        row_format: RowFormat | None = None,
        *,
        owned: Iterable[Closable] = (),
        address_digest: str | None = None,
    ) -> None:
        """Checks that the stores belong together, by their `info` alone.

        Args:
            stores: layer -> store; at least one.
            row_format: needed if the stores do not know it.
            owned: stores and tables that `close` closes, in this order.
            address_digest: what stores that know a digest must have, or None.

        Raises:
            ConfigError: there is no store, a store belongs to another layer, the row format is
                unknown, or the stores differ in it.
            DigestMismatch: the stores have rows of different tables.
        """
        if not stores:
            raise ConfigError("store: expected a store for each layer, found none")
        self._stores = dict(stores)
        self._owned = tuple(owned)
        # Identity first: of rows that mean something else the format says nothing.
        table_ids = [store.info.table_id for store in self.values()]
        if len(set(table_ids)) > 1:
            raise DigestMismatch(f"store: expected rows of one table, found {table_ids}")
        if address_digest is not None:
            self._check_addresses(address_digest)
        self.format = self._common_format(row_format)

    @classmethod
    def open(
        cls,
        config: EngramConfig,
        store: StoreSource,
        row_format: RowFormat | str | None = None,
        *,
        address_digest: str | None = None,
    ) -> StoreGroup:
        """Opens the rows of the memory that `config` describes. Nothing stays open after an error.

        Args:
            config: names the layers and their sizes.
            store: "ram:" for new rows of zeros; the URL of a table, or its folder as a path; an
                open Table; or {layer: store}. Stores and tables that are handed in stay open when
                the group is closed.
            row_format: a format, or its kind with d = config.dim. Needed if the stores do not know
                it; "ram:" takes f32 if it is None.
            address_digest: the digest that the rows must have, see `check`. With None nothing is
                compared with the config, and the caller has to call `check`.

        Raises:
            ConfigError: `store` is none of these, or has other layers, sizes or formats.
            DigestMismatch: the stores have rows of different tables or other addresses.
            TableError: the table cannot be used as it is.
        """
        layers = config.hash.layer_ids
        if isinstance(row_format, str):
            row_format = RowFormat(row_format, config.dim)
        if isinstance(store, Mapping):
            if row_format is None and isinstance(store, StoreGroup):
                row_format = store.format
            group = cls(_of_layers(store, layers), row_format, address_digest=address_digest)
        elif isinstance(store, Table):
            group = cls._made(
                layers, lambda layer: FileStore(store, layer), row_format, address_digest
            )
        elif isinstance(store, str) and store.startswith("ram:"):
            group = cls.zeros(config, row_format or RowFormat("f32", config.dim), store)
        elif isinstance(store, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
            group = cls._made(
                layers, lambda layer: open_store(store, layer=layer), row_format, address_digest
            )
        else:
            raise ConfigError(
                f"store: expected a URL, a path, a Table or {{layer: RowStore}}, found {store!r}"
            )
        try:
            if address_digest is not None:
                group._check_sizes(config)
        except BaseException:
            group.close()
            raise
        for layer_store in group.values():
            follow(layer_store)
        return group

    @classmethod
    def of_table(
        cls,
        table: Table,
        layers: Iterable[int],
        row_format: RowFormat | None = None,
        *,
        close_table: bool = False,
    ) -> StoreGroup:
        """Layers of an open table, mapped. The group closes the stores that it makes.

        Args:
            table: open for reading or writing.
            layers: layers of the table.
            row_format: None, or the format that the table is expected to have.
            close_table: whether closing the group closes the table, too.

        Raises:
            ConfigError: the table has no such layer, or another row format.
        """
        tables = [table] if close_table else []
        return cls._made(layers, lambda layer: FileStore(table, layer), row_format, tables=tables)

    @classmethod
    def zeros(cls, config: EngramConfig, row_format: RowFormat, url: str = "ram:") -> StoreGroup:
        """New rows in memory, all zero, as many as `config` says. The group closes its stores.

        Raises ConfigError if `url` is not "ram:".
        """

        def make(layer: int) -> RowStore:
            rows = config.row_count(layer)
            store = open_store(url, rows=rows, row_bytes=row_format.row_bytes)
            follow(store, f"{rows} zeros")
            return store

        return cls._made(config.hash.layer_ids, make, row_format)

    @classmethod
    def _made(
        cls,
        layers: Iterable[int],
        make: Callable[[int], RowStore],
        row_format: RowFormat | None,
        address_digest: str | None = None,
        tables: Sequence[Table] = (),
    ) -> StoreGroup:
        """A group that owns `tables`, and the store that `make` returns for each layer."""
        stores: dict[int, RowStore] = {}
        try:
            for layer in layers:
                stores[layer] = make(layer)
            owned = [*stores.values(), *tables]
            return cls(stores, row_format, owned=owned, address_digest=address_digest)
        except BaseException:
            _close_all([*stores.values(), *tables])
            raise

    def __getitem__(self, layer: int) -> RowStore:
        return self._stores[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._stores)

    def __len__(self) -> int:
        return len(self._stores)

    def items(self) -> ItemsView[int, RowStore]:
        """(layer, store) of every layer."""
        return self._stores.items()

    def values(self) -> ValuesView[RowStore]:
        """The store of every layer."""
        return self._stores.values()

    @property
    def info(self) -> StoreInfo:
        """The first layer's StoreInfo now. Its kind, table and path are those of all layers."""
        return next(iter(self.values())).info

    @property
    def table_id(self) -> str | None:
        """The identity of the table behind the stores now. None if no store knows one."""
        return self.info.table_id

    @property
    def writable(self) -> bool:
        """Whether the rows of every layer can be written now."""
        return all(store.info.writable for store in self.values())

    @property
    def rows(self) -> int:
        """Rows of all layers."""
        return sum(store.info.rows for store in self.values())

    @property
    def bytes(self) -> int:
        """Bytes of the rows of all layers."""
        return sum(store.info.bytes for store in self.values())

    def describe(self) -> str:
        """One line for a log: the stores of each layer, and the identity of the rows."""
        return describe(self, self.format)

    def __repr__(self) -> str:
        info = self.info
        origin = f"table {info.table_id} at {info.path}" if info.table_id else "no table"
        return (
            f"<{info.kind} stores of layers {list(self)}: {self.rows:,} rows of "
            f"{info.row_bytes} bytes ({self.format.kind}, d = {self.format.d}), {origin}>"
        )

    def check(self, config: EngramConfig, address_digest: str) -> None:
        """Compares the stores with the memory that they are to serve. Reads no row.

        Args:
            config: the memory's layers, rows and row width.
            address_digest: the memory's digest, from `EngramConfig.address_digest`. Stores that
                know no digest are accepted.

        Raises:
            ConfigError: layers, row counts or row width differ.
            DigestMismatch: the rows were made for other addresses.
        """
        _check_layers(self, config.hash.layer_ids)
        self._check_addresses(address_digest)
        self._check_sizes(config)

    def _check_sizes(self, config: EngramConfig) -> None:
        for layer, store in self.items():
            expected = (config.row_count(layer), config.dim)
            found = (store.info.rows, self.format.d)
            if found != expected:
                raise ConfigError(f"layer {layer}: expected (rows, d) = {expected}, found {found}")

    def check_writable(self) -> None:
        """Raises ConfigError if the rows of a layer cannot be written."""
        for layer, store in self.items():
            if not store.info.writable:
                raise ConfigError(
                    f"layer {layer}: expected a writable store, "
                    f"found a {store.info.kind} store that is read-only"
                )

    def copy_to(self, target: Table | Mapping[int, RowStore]) -> None:
        """Copies all rows to a table that is open for writing, or to other stores, in bounded
        memory.

        Raises:
            InputError: the target has other rows, row bytes or (if it knows one) row format.
            StoreError: the target's stores cannot be written.
            WriteFailed: the system refuses to write the table.
        """
        for layer, store in self.items():
            if isinstance(target, Table):
                write_layer(store, target, layer)
            else:
                copy_rows(store, target[layer])

    def row_names(self) -> dict[int, list[str]]:
        """Layer -> the names of its rows as they are now (names.py)."""
        return {layer: names_of(store) for layer, store in self.items()}

    def adopt_names(self, names: Mapping[int, Iterable[str]]) -> None:
        """Adds the names of rows elsewhere that each layer's rows were read from (names.py)."""
        for layer, store in self.items():
            follow(store).adopt(names.get(layer, ()))

    def add_name(self, name: str) -> None:
        """Adds the name of rows elsewhere that were written from these (names.py)."""
        for store in self.values():
            follow(store).add(name)

    def close(self) -> None:
        """Closes what was opened for the group, not what was handed in. May be called again."""
        _close_all(self._owned)

    def __enter__(self) -> StoreGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_addresses(self, address_digest: str) -> None:
        for layer, store in self.items():
            info = store.info
            if info.address_digest not in (None, address_digest):
                raise DigestMismatch(
                    f"layer {layer}: expected address digest {address_digest}, "
                    f"found {info.address_digest} in {info.path or f'the {info.kind} store'}"
                )

    def _common_format(self, row_format: RowFormat | None) -> RowFormat:
        for layer, store in self.items():
            info = store.info
            if info.layer not in (None, layer):
                raise ConfigError(
                    f"layer {layer}: expected its own store, found one of layer {info.layer}"
                )
            if row_format is None and info.format is None:
                raise ConfigError(
                    f"layer {layer}: expected a row format, found none in the {info.kind} store; "
                    "give row_format="
                )
            row_format = row_format or info.format
            assert row_format is not None
            if info.format not in (None, row_format):
                raise ConfigError(
                    f"layer {layer}: expected rows of {row_format}, found {info.format}"
                )
            if info.row_bytes != row_format.row_bytes:
                raise ConfigError(
                    f"layer {layer}: expected rows of {row_format.row_bytes} bytes "
                    f"({row_format.kind}, d = {row_format.d}), found {info.row_bytes}"
                )
        assert row_format is not None
        return row_format


def describe(stores: Mapping[int, RowStore], row_format: RowFormat | None = None) -> str:
    """One line for a log: the stores of each layer, and the identity of the rows.

    Args:
        stores: layer -> store; at least one.
        row_format: format of the rows, if the stores do not know it.
    """
    parts: list[str] = []
    for layer, store in stores.items():
        kinds = " over ".join(kind_of(part) for part in wrapped(store))
        info = store.info
        parts.append(f"layer {layer}: {kinds}, {info.rows} rows of {info.row_bytes} bytes")
    info = next(iter(stores.values())).info
    row_format = row_format or info.format
    rows = "rows of no known format"
    if row_format is not None:
        rows = f"rows {row_format.kind}, d = {row_format.d}"
    return (
        f"{'; '.join(parts)}; {rows}; from {info.path or 'memory'}; table_id {info.table_id}; "
        f"address digest {info.address_digest}"
    )


def wrapped(store: RowStore | None) -> Iterator[RowStore]:
    """A store, and the stores behind it if it is a wrapper, outermost first."""
    while store is not None:
        yield store
        store = store.inner


def kind_of(store: RowStore) -> str:
    """What logs and metrics call a store: its `kind`, or the name of its class without "Store"."""
    kind = getattr(store, "kind", None)
    return kind if isinstance(kind, str) else type(store).__name__.removesuffix("Store").lower()


def _of_layers(stores: Mapping[int, RowStore], layers: Iterable[int]) -> dict[int, RowStore]:
    """The stores in the order of the layers."""
    _check_layers(stores, layers)
    return {layer: stores[layer] for layer in layers}


def _check_layers(stores: Mapping[int, RowStore], layers: Iterable[int]) -> None:
    if set(stores) != set(layers):
        raise ConfigError(
            f"store: expected stores for layers {list(layers)}, found {sorted(stores)}"
        )


def _close_all(parts: Iterable[Closable]) -> None:
    for part in parts:
        part.close()
