"""EngramMemory: the three ideas joined for a model: addresses, stores, and one fusion layer per memory layer.

The table is not a Parameter. The rows of a batch become a leaf tensor each time; after backward its gradient is handed
to `row_grads`, which a row optimiser drains. Request state (last ids, conv window) is a SequenceState in the caller's
hands; a forward without one starts from nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import rows as row_io
from .address import Addresser
from .errors import ConfigError, DigestMismatch, EngraphyError, InputError
from .layer import EngramLayer
from .rowinit import normal_rows
from .rows import RowFormat
from .spec import EngramConfig
from .state import SequenceState
from .store import FileStore, RowStore, StoreInfo, copy_rows, open_store, write_layer
from .table import Table
from .vocab import VocabMap

_FORMAT = "engraphy-memory-1"


class RowGrad(NamedTuple):
    """Gradient of rows as they were read: ids int64 [N] with duplicates, grad f32 [N, d]."""

    layer: int
    ids: np.ndarray
    grad: np.ndarray


@dataclass
class Trace:
    """What a forward did, for looking inside: filled by `lookup` and `apply` when handed to `lookup`.

    row_ids: layer -> int64 [B, T, C]. gates: layer -> f32 [B, T, S], 0 at dead positions.
    """

    row_ids: dict[int, np.ndarray] = field(default_factory=dict)
    gates: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Lookup:
    """Rows of one chunk for every memory layer. rows: layer -> [B, T, E], leaves that require grad while training."""

    rows: Mapping[int, Tensor]
    live: Tensor | None
    starts: Tensor | None
    state: SequenceState | None
    trace: Trace | None


class EngramMemory(nn.Module):
    """A memory for a model: `lookup` before the blocks run, `apply` in each block that has a memory.

    config, vocab: what is addressed. store: "ram:" (a new table of `row_format`, all zeros until `init_rows`), the
    URL of a table ("file:DIR"; the format is read from it), an open Table (mode "w" to train it in place), or
    {layer: RowStore} with `row_format` given where the stores do not know it.
    Raises DigestMismatch where the table was made for other addresses, ConfigError where sizes differ.
    """

    def __init__(self, config: EngramConfig, vocab: VocabMap, store: str | Table | Mapping[int, RowStore] = "ram:",
                 row_format: RowFormat | str | None = None):
        super().__init__()
        self.config, self.vocab = config, vocab
        self.addresser = Addresser(config.hash, vocab)
        self.address_digest = config.address_digest(vocab.digest)
        self.format, self.stores = _open(config, self.address_digest, store, row_format)
        self.blocks = nn.ModuleDict({str(layer): EngramLayer(config.layer) for layer in self.layers})
        self.row_grads: list[RowGrad] = []
        self.rows_require_grad = True

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's layers (0-based) that have a memory."""
        return self.config.hash.layer_ids

    def state(self, batch: int, margin: int = 64) -> SequenceState:
        """A fresh state for `batch` sequences that can be cropped by up to `margin` tokens."""
        return SequenceState(batch, margin).bind(self.config.hash.order, self._windows())

    def _windows(self) -> dict[int, int]:
        return {layer: self.config.layer.window for layer in self.layers}

    def requires_grad_(self, requires_grad: bool = True) -> EngramMemory:
        """As nn.Module's, and the rows follow."""
        self.rows_require_grad = requires_grad
        return super().requires_grad_(requires_grad)

    @torch.compiler.disable
    def lookup(self, ids_BT: Tensor, state: SequenceState | None = None, live: Tensor | None = None,
               starts: Tensor | None = None, trace: Trace | None = None) -> Lookup:
        """Read every layer's rows for raw ids [B, T] that follow `state`, which is extended by them.

        live, starts: bool [B, T] as in `Addresser.all_rows`. Rows are f32, on the CPU, as gathered; with gradients
        enabled, in training mode and `rows_require_grad`, they are leaves whose gradients reach `row_grads`.
        Raises InputError for ids, shapes or a state that do not fit, before the state changes.
        """
        ids, alive, begins = _numpy(ids_BT), _numpy(live), _numpy(starts)
        history = None
        if state is not None:
            state.bind(self.config.hash.order, self._windows())
            if state.batch != len(ids):
                raise InputError(f"state: expected one for {len(ids)} sequences, found {state.batch}")
            history = state.history
        row_ids_LBTC = self.addresser.all_rows(ids, history, alive, begins)
        if self.vocab.table.min() < 0:  # ids without a token are dead
            valid = np.ones(ids.shape, dtype=bool) if alive is None else alive
            alive = valid & (self.vocab.table[np.where(valid, ids, 0)] >= 0)
            live = torch.from_numpy(alive)
        if state is not None:
            state.extend(ids, alive, begins)
        learn = self.training and self.rows_require_grad and torch.is_grad_enabled()
        rows = {layer: self._read(layer, row_ids_LBTC[i], learn) for i, layer in enumerate(self.layers)}
        if trace is not None:
            trace.row_ids.update({layer: row_ids_LBTC[i] for i, layer in enumerate(self.layers)})
        return Lookup(rows, live, starts, state, trace)

    def apply(self, layer: Any, x_BTSD: Any = None, lookup: Any = None) -> Any:  # type: ignore[override]
        """x + what the memory of `layer` adds to it, [B, T, S, D], for the chunk that `lookup` was made for.

        Raises ConfigError for a layer without memory. With one callable argument it is nn.Module.apply, which
        walks over the modules of any model that the memory belongs to.
        """
        if x_BTSD is None and callable(layer):
            return super().apply(layer)  # pyright: ignore[reportArgumentType]
        if x_BTSD is None or lookup is None:
            raise InputError("apply: expected layer, x and lookup (or one callable), found less")
        if layer not in lookup.rows:
            raise ConfigError(f"layer {layer!r} has no memory; expected one of {list(self.layers)}")
        block, state = self.blocks[str(layer)], lookup.state
        assert isinstance(block, EngramLayer)
        rows_BTE = lookup.rows[layer].to(x_BTSD.device)
        window = None if state is None else state.window(layer)
        live, starts = (None if flags is None else flags.to(x_BTSD.device) for flags in (lookup.live, lookup.starts))
        update_BTSD, gate_BTS, inputs_BTSD = block(x_BTSD, rows_BTE, window, live, starts,
                                                   conv_inputs=state is not None)
        if state is not None and inputs_BTSD is not None:
            state.push(layer, inputs_BTSD, lookup.starts)
        if lookup.trace is not None:
            lookup.trace.gates[layer] = gate_BTS.detach().float().cpu()
        return x_BTSD + update_BTSD

    def init_rows(self, std: float, seed: int, chunk: int = 1 << 18) -> None:
        """Fill the table with N(0, std**2). Each value depends on (seed, layer, row, column) alone."""
        for layer, store in self.stores.items():
            for start in range(0, store.info.rows, chunk):
                ids_N = np.arange(start, min(start + chunk, store.info.rows))
                store.scatter(ids_N, self.format.encode(normal_rows(seed, layer, ids_N, self.config.dim, std)))

    def drain_row_grads(self) -> list[RowGrad]:
        """Pending gradients, oldest first; the list is empty afterwards."""
        pending, self.row_grads = self.row_grads, []
        return pending

    def _read(self, layer: int, ids_BTC: np.ndarray, learn: bool) -> Tensor:
        batch, tokens, columns = ids_BTC.shape
        leaf_BTE = torch.empty(batch, tokens, columns * self.config.dim)
        row_io.read(self.stores[layer], ids_BTC.reshape(-1), self.format, leaf_BTE.numpy().reshape(-1, self.config.dim))
        if learn:
            leaf_BTE.requires_grad_()

            def hand_over(leaf: Tensor) -> None:
                assert leaf.grad is not None
                grad_Nd = leaf.grad.reshape(-1, self.config.dim).numpy()
                self.row_grads.append(RowGrad(layer, ids_BTC.reshape(-1), grad_Nd))
                leaf.grad = None

            leaf_BTE.register_post_accumulate_grad_hook(hand_over)
        return leaf_BTE

    def write_table(self, path: str | os.PathLike[str], parent: str | None = None) -> str:
        """Copy the rows to a new sealed table at `path`, as they are. Returns its table_id."""
        table = Table.create(path, self.config, self.format, self.vocab, parent=parent)
        try:
            for layer, store in self.stores.items():
                write_layer(store, table, layer)
            return table.seal()
        finally:
            table.close()

    def read_table(self, path: str | os.PathLike[str]) -> None:
        """Copy the rows of a table on disk, of the same addresses and row format, into the (writable) stores."""
        table = Table.open(path)
        try:
            table.check_address(self.address_digest)
            if table.fmt != self.format:
                raise ConfigError(f"{path}: expected rows of format {self.format.kind}, found {table.fmt.kind}")
            for layer, store in self.stores.items():
                copy_rows(FileStore(table, layer), store)
        finally:
            table.close()

    def save(self, path: str | os.PathLike[str], table: str = "copy") -> None:
        """Write the memory to a new directory: config, vocabulary map, dense weights, and the table.

        table: "copy" the rows into `path`/table; "link" to the sealed table that the stores serve; "skip" it (the
        rows have to be given again to `load`). The directory appears complete or not at all.
        Raises ConfigError for "link" without a table on disk, and where `path` exists and is not an empty directory.
        """
        path = Path(os.path.abspath(path))
        if table not in ("copy", "link", "skip"):
            raise ConfigError(f'table: expected "copy", "link" or "skip", found {table!r}')
        info = next(iter(self.stores.values())).info
        if table == "link" and info.path is None:
            raise ConfigError(f'table="link": expected stores over a table on disk, found {info.kind}')
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise ConfigError(f"{path}: expected a new or empty directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            self._save_into(partial, table, info)
            partial.chmod(0o755)
            os.rename(partial, path)
        except BaseException:
            shutil.rmtree(partial)
            raise

    def _save_into(self, path: Path, table: str, info: StoreInfo) -> None:
        where = {"copy": "table", "link": str(info.path), "skip": None}[table]
        table_id = self.write_table(path / "table", parent=info.table_id) if table == "copy" else info.table_id
        self.vocab.save(path / "vocab.json")
        tensors = {name: value.contiguous() for name, value in self.blocks.state_dict().items()}
        identity = {"table_id": table_id or "", "address_digest": self.address_digest}
        save_file(tensors, path / "memory.safetensors", metadata=identity)
        body = {"format": _FORMAT, "config": self.config.to_json(), "table": where, **identity}
        (path / "memory.json").write_text(json.dumps(body, indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str], store: str | None = None) -> EngramMemory:
        """Read what `save` wrote. store: the URL to serve the rows from; default: the saved table through `file:`.

        Raises ConfigError for what is no memory, DigestMismatch where table and dense weights do not belong together.
        """
        path = Path(path)
        try:
            body = json.loads((path / "memory.json").read_text())
            kind, where, table_id = body["format"], body["table"], body["table_id"]
            config = EngramConfig.from_json(body["config"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, EngraphyError):
                raise
            raise ConfigError(f"{path}: expected a saved memory ({_FORMAT}), "
                              f"found {type(error).__name__}: {error}") from None
        if kind != _FORMAT:
            raise ConfigError(f"{path}: expected format {_FORMAT!r}, found {kind!r}")
        if store is None:
            if where is None:
                raise ConfigError(f"{path}: saved without its table; give store=")
            store = f"file:{path / where}"
        memory = cls(config, VocabMap.load(path / "vocab.json"), store)
        for layer, opened in memory.stores.items():
            if opened.info.table_id != table_id and table_id:
                raise DigestMismatch(f"{path}, layer {layer}: the dense weights belong to table {table_id}, "
                                     f"the store serves {opened.info.table_id}")
        memory._load_dense(path / "memory.safetensors", table_id)
        return memory

    def _load_dense(self, path: Path, table_id: str) -> None:
        with safe_open(path, framework="pt") as file:
            identity = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        expected = {"table_id": table_id, "address_digest": self.address_digest}
        found = {key: identity.get(key) for key in expected}
        if found != expected:
            raise DigestMismatch(f"{path}: expected {expected}, found {found}")
        own = {name: list(value.shape) for name, value in self.blocks.state_dict().items()}
        given = {name: list(value.shape) for name, value in tensors.items()}
        if own != given:
            raise ConfigError(f"{path}: expected tensors {own}, found {given}")
        self.blocks.load_state_dict(tensors)


def _open(config: EngramConfig, digest: str, store: str | Table | Mapping[int, RowStore],
          row_format: RowFormat | str | None) -> tuple[RowFormat, dict[int, RowStore]]:
    layers = config.hash.layer_ids
    if isinstance(row_format, str):
        row_format = RowFormat(row_format, config.dim)
    stores: dict[int, RowStore]
    if isinstance(store, str) and store.startswith("ram:"):
        row_format = row_format or RowFormat("f32", config.dim)
        stores = {layer: open_store(store, rows=config.hash.row_count(layer), row_bytes=row_format.row_bytes)
                  for layer in layers}
    elif isinstance(store, str):
        stores = {layer: open_store(store, layer=layer) for layer in layers}
    elif isinstance(store, Table):
        stores = {layer: FileStore(store, layer) for layer in layers}
    else:
        stores = {layer: store[layer] for layer in layers if layer in store}
    for layer in layers:
        if layer not in stores:
            raise ConfigError(f"store: expected stores for layers {list(layers)}, found {sorted(stores)}")
        info = stores[layer].info
        if info.address_digest is not None and info.address_digest != digest:
            raise DigestMismatch(f"layer {layer}: expected address digest {digest}, "
                                 f"{info.path} has {info.address_digest}")
        if None not in (row_format, info.format) and row_format != info.format:
            raise ConfigError(f"layer {layer}: expected rows of {row_format}, found {info.format}")
        row_format = row_format or info.format
        if row_format is None:
            raise ConfigError(f"layer {layer}: the {info.kind} store does not know its row format; give row_format=")
        expected = (config.hash.row_count(layer), row_format.row_bytes, config.dim)
        if (info.rows, info.row_bytes, row_format.d) != expected:
            raise ConfigError(f"layer {layer}: expected (rows, row bytes, d) = {expected}, "
                              f"found {(info.rows, info.row_bytes, row_format.d)}")
    assert row_format is not None
    return row_format, stores


def _numpy(values: Tensor | None) -> Any:
    return None if values is None else values.detach().cpu().numpy()
