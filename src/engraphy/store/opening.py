"""Opens a store by URL or path: `open_store`."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError
from ..table.table import Table
from .base import RowStore
from .cache import CacheStore
from .checkpoint import open_checkpoint
from .file import open_layer
from .options import FileOptions, flag, parse_size, split_options
from .pool import open_pool
from .ram import RamStore
from .remote_options import RemoteOptions
from .warming import warm

_CACHE = ("cache", "warm", "pin")  # options of every scheme with a cache


def open_store(
    url: str | os.PathLike[str],
    layer: int | None = None,
    rows: int | None = None,
    row_bytes: int | None = None,
    mode: str = "r",
) -> RowStore:
    """Opens the store that a URL names.

    The options of a URL follow its first "?". If the name of a folder has a "?", give its path
    instead, here or to `open_checkpoint` or `open_pool`. The schemes:

    - "ram:" holds `rows` rows of `row_bytes` bytes. They are zero at first and always writable.
    - "file:DIR" serves `layer` of the table at DIR (a path as it is, not percent-encoded). With
      mode "w" it opens the table for writing; `store.table.seal()` ends the writing, and closing
      the store closes the table. Options: read=mmap|pread|auto, threads=128 and direct=0|1 (for
      pread), populate=0|1 (for mmap). See `FileOptions`; its `choose` documents "auto", and
      `info.reads` says what was chosen. cache=2GiB keeps the rows that are requested often in
      memory, at most 2 GiB for this layer (KiB, MiB, GiB, or bytes without a unit). warm=FILE reads
      rows into it first, those that matter most first (`numpy.savez`, by layer); pin=FILE keeps
      rows of these and no others (`CacheStore.pin`).
    - "checkpoint:DIR" serves `layer` of a released checkpoint from its own shards, read-only.
      "checkpoint:FILE.gguf" does so with a GGUF file, or with the first file of a split model.
      vocab=FILE: a saved vocabulary map; by default the map of the checkpoint's tokenizer, or of
      its GGUF file.
    - "pool:PATH" serves `layer` of a table that all processes of this host share at PATH,
      read-only: a file, memfd or device that `publish_pool` wrote, or a folder. from=DIR: the pool
      has to hold the table at DIR; if there is none yet, a folder is filled with that table.
      populate=0|1: see `open_pool`. cache=, warm= and pin= as for "file:".
    - "remote:HOST:PORT,HOST:PORT" serves `layer` of a table that `engraphy table serve` serves on
      other hosts, read-only; needs the extra `remote`. Options: tls=0|1, ca=FILE (PEM, of those who
      vouch for the servers), token_file=FILE (the bearer token), deadline=10 (seconds of a call),
      cache=, warm= and pin= as for "file:".

    Args:
        url: the URL, or a path (`pathlib.Path`), which is "file:DIR" without options.
        layer: the model's layer, 0-based. For "ram:" it is only a label.
        rows: number of rows, for "ram:" only.
        row_bytes: bytes of a row, for "ram:" only.
        mode: "r", or "w" to write the rows of "file:DIR".

    Returns:
        The store, which the caller closes.

    Raises:
        ConfigError: if the scheme or an option is unknown, or the scheme does not take an
            argument.
        TableError: if the table cannot be used.
    """
    if not isinstance(url, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"store: expected a URL or a path, found {url!r}")
    if mode not in ("r", "w"):
        raise ConfigError(f"store {url!r}: expected mode 'r' or 'w', found {mode!r}")
    wanted = _Wanted(url, layer, rows, row_bytes, mode)
    if not isinstance(url, str):
        return _open_table(wanted, os.fspath(url), FileOptions(), None)
    scheme, colon, rest = url.partition(":")
    opener = _OPENERS.get(scheme) if colon else None
    if opener is None:
        raise ConfigError(
            f"store {url!r}: expected ram:, file:DIR, checkpoint:DIR, pool:PATH or remote:HOST:PORT"
        )
    return opener(wanted, rest)


@dataclass(frozen=True)
class _Wanted:
    """The arguments of `open_store`. url: the URL or path, as messages show it."""

    url: str | os.PathLike[str]
    layer: int | None
    rows: int | None
    row_bytes: int | None
    mode: str

    def expected(self, what: str) -> ConfigError:
        """A ConfigError with what was expected, and the arguments found."""
        return ConfigError(
            f"store {self.url!r}: expected {what}, found layer={self.layer!r}, "
            f"mode={self.mode!r}, rows={self.rows!r}, row_bytes={self.row_bytes!r}"
        )

    @property
    def has_sizes(self) -> bool:
        """Whether the caller gave sizes, which only "ram:" takes."""
        return self.rows is not None or self.row_bytes is not None


def _open_ram(wanted: _Wanted, rest: str) -> RowStore:
    if rest:
        raise ConfigError(f"store {wanted.url!r}: expected nothing after ram:, found {rest!r}")
    if wanted.rows is None or wanted.row_bytes is None:
        raise wanted.expected("rows and row_bytes")
    return RamStore(wanted.rows, wanted.row_bytes, wanted.layer)


def _open_file(wanted: _Wanted, rest: str) -> RowStore:
    path, _, text = rest.partition("?")
    values = split_options(wanted.url, text, ("read", "threads", "direct", "populate", *_CACHE))
    cache = _cache(wanted, values)
    options = FileOptions.parse(wanted.url, values)
    if not path:
        raise ConfigError(f"store {wanted.url!r}: expected the directory of a table after file:")
    return _open_table(wanted, path, options, cache)


def _open_table(wanted: _Wanted, path: str, options: FileOptions, cache: _Cache | None) -> RowStore:
    """A layer of the table at `path`, behind a cache unless that is None."""
    if wanted.layer is None:
        raise wanted.expected("a layer")
    if wanted.has_sizes:
        raise wanted.expected("neither rows nor row_bytes, which the table knows")
    table = Table.open(path, wanted.mode)
    try:
        return _cached(open_layer(table, wanted.layer, options), cache)
    except BaseException:
        table.close()
        raise


@dataclass(frozen=True)
class _Cache:
    """A cache that a URL asks for: its bytes, the rows that it is warmed with, and whether it keeps
    them."""

    budget: int
    warm_N: np.ndarray | None
    pin: bool

    def around(self, store: RowStore) -> CacheStore:
        cache = CacheStore(store, self.budget)
        if self.warm_N is not None:
            warm(cache, self.warm_N if self.pin else self.warm_N[: cache.capacity], pin=self.pin)
        return cache


def _cache(wanted: _Wanted, values: dict[str, str]) -> _Cache | None:
    """Takes the options of a cache out of those of a URL; None if there are none."""
    size = values.pop("cache", None)
    files = {name: values.pop(name) for name in ("warm", "pin") if name in values}
    if len(files) > 1:
        raise ConfigError(f"store {wanted.url!r}: expected warm= or pin=, found both")
    name, path = next(iter(files.items()), ("", None))
    if size is None:
        if files:
            raise ConfigError(f"store {wanted.url!r}: expected cache= with {name}=, found none")
        return None
    ids_N = None if path is None else _hot_rows(wanted, name, path)
    return _Cache(parse_size(wanted.url, size), ids_N, name == "pin")


def _hot_rows(wanted: _Wanted, name: str, path: str) -> np.ndarray:
    """int64 [N], the rows of the layer in a file of `numpy.savez`."""
    try:
        with np.load(path, allow_pickle=False) as layers:
            return layers[str(wanted.layer)].reshape(-1).astype(np.int64, casting="safe")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"store {wanted.url!r}, {name}: expected the row ids of layer {wanted.layer} in "
            f"{path}, as numpy.savez writes them, found {type(error).__name__}: {error}"
        ) from None


def _cached(store: RowStore, cache: _Cache | None) -> RowStore:
    """A store behind the cache that a URL asks for. Closes it after an error."""
    try:
        return store if cache is None else cache.around(store)
    except BaseException:
        store.close()
        raise


def _open_checkpoint(wanted: _Wanted, rest: str) -> RowStore:
    path, _, text = rest.partition("?")
    values = split_options(wanted.url, text, ("vocab",))
    if not path:
        raise ConfigError(
            f"store {wanted.url!r}: expected the folder of a checkpoint, or a GGUF file, after "
            "checkpoint:"
        )
    layer = _read_only_layer(wanted)
    return open_checkpoint(path, layer, values.get("vocab"))


def _open_pool(wanted: _Wanted, rest: str) -> RowStore:
    path, _, text = rest.partition("?")
    values = split_options(wanted.url, text, ("from", "populate", *_CACHE))
    cache = _cache(wanted, values)
    source = values.get("from")
    if not path or source == "":
        raise ConfigError(
            f"store {wanted.url!r}: expected the file or directory of a pool after pool:, "
            "and the directory of a table after from="
        )
    layer = _read_only_layer(wanted)
    populate = flag(wanted.url, "populate", values.get("populate", "1"))
    return _cached(open_pool(path, layer, source, populate), cache)


def _open_remote(wanted: _Wanted, rest: str) -> RowStore:
    options, values = RemoteOptions.parse(wanted.url, rest)
    cache = _cache(wanted, values)
    layer = _read_only_layer(wanted)
    from .remote import RemoteStore  # needs pyarrow

    return _cached(RemoteStore(options, layer), cache)


def _read_only_layer(wanted: _Wanted) -> int:
    """The layer, for schemes that only read and know their sizes."""
    if wanted.layer is None or wanted.mode != "r" or wanted.has_sizes:
        raise wanted.expected("a layer, mode 'r' and neither rows nor row_bytes")
    return wanted.layer


_OPENERS = {
    "ram": _open_ram,
    "file": _open_file,
    "checkpoint": _open_checkpoint,
    "pool": _open_pool,
    "remote": _open_remote,
}
