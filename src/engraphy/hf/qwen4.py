"""The table of a released model inside transformers, read from a store, not from an nn.Embedding.

Qwen4-Exp (`qwen4_exp`, transformers 5.23) hashes by itself and looks rows up in one embedding, of
95 GiB in the release. Only that embedding is replaced here, by a module that reads the same rows
from a store. Hashing, cache and fusion stay the model's own, so the outputs are the model's bit for
bit.

    model = load_without_table(Qwen4ExpForCausalLM, path)    # the table is never allocated
    serve_table(model, "file:DIR")                           # rows are read from there
    restore_table(model)                                     # and no longer
"""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..addresses.vocab import VocabMap
from ..errors import ConfigError, DigestMismatch, StoreError
from ..released.check import check_config
from ..rows.format import RowFormat
from ..spec.config import EngramConfig
from ..spec.dialects.qwen4 import QWEN4
from ..spec.hash import HashSpec
from ..store.base import RowStore
from ..store.group import StoreGroup
from ..table.table import Table
from .served import ServedRows, ServedTable

_KEYS = r"\.ngram_embedding\."  # the checkpoint's names of the table and its parts
# Buffers that the model computes from its config.
_COMPUTED = tuple(QWEN4.released.hash_tensors)
_KINDS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_CHUNK_ROWS = 65_536


class NoTable(nn.Module):
    """In the place of the table's nn.Embedding if none was loaded."""

    def __init__(self) -> None:
        super().__init__()
        # The model looks for its device before it calls.
        self.weight = torch.empty(0, device="meta")

    def forward(self, ids: Tensor) -> Tensor:
        """Raises StoreError: there are no rows."""
        raise StoreError(
            "the model was loaded without its table: give it one, serve_table(model, store)"
        )


def load_without_table(
    model_class: type[PreTrainedModel], path: str | os.PathLike[str], **options: Any
) -> Any:
    """`from_pretrained` without the n-gram table, which is neither read nor allocated.

    Args:
        model_class: a class of Qwen4-Exp models, such as Qwen4ExpForCausalLM.
        path: as for `from_pretrained`.
        options: as for `from_pretrained`.

    Returns:
        The model. It raises StoreError until `serve_table` gives it a table. Its `save_pretrained`
        raises StoreError unless `without_table=True` says that the table is left out.

    Raises:
        ConfigError: the class is no transformers model, the model has no table, or the checkpoint
            lacks another weight (transformers itself would make one up).
    """
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise ConfigError(
            f"expected a model's class such as Qwen4ExpForCausalLM, found {model_class!r}"
        )

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        # On the meta device, as from_pretrained asks.
        model_class.__init__(self, config, *args, **kwargs)
        for ple in ple_layers(self).values():
            ple.ple_embedding.ngram_embedding = NoTable()
        ignored = self._keys_to_ignore_on_load_unexpected or ()
        self._keys_to_ignore_on_load_unexpected = {*ignored, _KEYS}

    # Of the same name and module: transformers looks conversions and recorded outputs up by them.
    names = {"__init__": init, "__module__": model_class.__module__}
    without_table: Any = type(model_class.__name__, (model_class,), names)
    model, loading = without_table.from_pretrained(path, output_loading_info=True, **options)
    missing = sorted(key for key in loading["missing_keys"] if not key.endswith(_COMPUTED))
    if missing or loading["mismatched_keys"]:
        raise ConfigError(
            f"{path}: expected all weights but the table's, missing {missing}, "
            f"of another shape {sorted(loading['mismatched_keys'])}"
        )
    model.__class__ = model_class
    _guard_saving(model)
    return model


def serve_table(
    model: PreTrainedModel,
    store: str | os.PathLike[str] | Table | RowStore | Mapping[int, RowStore],
    row_format: RowFormat | None = None,
) -> None:
    """Reads the rows of a Qwen4-Exp model's n-gram table from a store, from now on.

    Before the first block, the rows of all layers are submitted to be read; a block waits for those
    of its layer.

    `model.save_pretrained` raises StoreError while a table is served: the checkpoint would lack the
    table, and transformers would load random rows instead. With `without_table=True` it writes such
    a checkpoint, for `load_without_table`.

    Args:
        model: as from `load_without_table`, or with its table in memory or on the meta device.
        store: the URL of a table ("file:DIR", "checkpoint:DIR"), its folder as a Path, an open
            Table, a RowStore (for one layer), or {layer, from 0: RowStore}.
        row_format: needed if the store does not know it (a RamStore).

    Raises:
        ConfigError: the model has no table, or one is served already; the store is invalid. The
            model is then as it was.
        DigestMismatch: hash, rows or row width are not the model's; it names what differs. The
            model is then as it was.
    """
    layers = ple_layers(model)
    memory = _checked(model)
    if any(isinstance(ple.ple_embedding.ngram_embedding, ServedRows) for ple in layers.values()):
        raise ConfigError("a table is served already: restore_table(model) first")
    table = ServedTable(_open(model.config, memory, store, row_format), memory.hash)
    served = {}
    for layer, ple in layers.items():
        module = ple.ple_embedding
        rows = ServedRows(table, layer, ple.norm_key.weight, module.ngram_embedding)
        served[layer] = module.ngram_embedding = rows
    table.install(model.get_decoder(), served)
    _guard_saving(model)


def restore_table(model: PreTrainedModel) -> None:
    """Takes the store away: the model has what it had before `serve_table`.

    Closes the stores that `serve_table` opened. Raises ConfigError if no table is served.
    """
    modules = [ple.ple_embedding for ple in ple_layers(model).values()]
    served = [module for module in modules if isinstance(module.ngram_embedding, ServedRows)]
    if not served:
        raise ConfigError(f"{type(model).__name__}: expected a served table, found none")
    table = served[0].ngram_embedding.table
    for module in served:
        module.ngram_embedding = module.ngram_embedding.replaced
    table.close()
    if not any(isinstance(module.ngram_embedding, NoTable) for module in modules):
        del model.save_pretrained


def write_table(
    model: PreTrainedModel, path: str | os.PathLike[str], row_format: RowFormat | None = None
) -> str:
    """Writes the n-gram table of a Qwen4-Exp model in memory to a new sealed table on disk.

    A checkpoint on disk is converted without loading it: `engraphy table convert`.

    Args:
        model: a model with its table in memory.
        path: a new folder.
        row_format: None = the weights' own (f32, f16, bf16), which keeps every bit.

    Returns:
        The table_id.

    Raises:
        ConfigError: the weights are not in memory (served, on the meta device), or of another
            dtype.
        DigestMismatch: the weights do not fit the config.
        TableError: `path` is taken.
    """
    memory = _checked(model)
    weights = {}
    for layer, ple in ple_layers(model).items():
        weights[layer] = _weight_in_memory(layer, ple.ple_embedding.ngram_embedding)
    if row_format is None:
        dtype = functools.reduce(torch.promote_types, (weight.dtype for weight in weights.values()))
        row_format = RowFormat(_KINDS[dtype], memory.dim)
    table = Table.create(path, memory, row_format, VocabMap.identity(memory.hash.vocab_size))
    try:
        for layer, weight in weights.items():
            for first in range(0, len(weight), _CHUNK_ROWS):
                values = weight[first : first + _CHUNK_ROWS].float().cpu().numpy()
                table.write_rows(layer, first, row_format.encode(values))
        return table.seal()
    finally:
        table.close()


def _weight_in_memory(layer: int, embedding: Any) -> Tensor:
    weight = embedding.weight
    in_memory = isinstance(embedding, nn.Embedding) and not weight.is_meta
    if not in_memory or weight.dtype not in _KINDS:
        raise ConfigError(
            f"layer {layer}: expected a table of {', '.join(_KINDS.values())} in memory, "
            f"found {type(embedding).__name__} of {weight.dtype} on {weight.device}"
        )
    return weight.detach()


def ple_layers(model: nn.Module) -> dict[int, Any]:
    """Layer, from 0 -> its PLE module. Raises ConfigError if the model has none."""
    modules: list[Any] = list(model.modules())
    layers = {}
    for module in modules:
        if type(module).__name__ == "Qwen4ExpTextPLELayer":
            layers[module.layer_idx] = module
    if not layers:
        raise ConfigError(
            f"expected a Qwen4-Exp model with ple_layer_ids, "
            f"found {type(model).__name__} without any"
        )
    return layers


def _checked(model: PreTrainedModel) -> EngramConfig:
    """The memory of the model's config. Raises DigestMismatch if the model's hash is another."""
    memory = check_config(model.config)
    for layer, ple in ple_layers(model).items():
        _check_hash(layer, ple.ple_embedding, memory.hash)
        embedding = ple.ple_embedding.ngram_embedding
        expected = [memory.hash.row_count(layer), memory.dim]
        found = list(embedding.weight.shape)
        if isinstance(embedding, nn.Embedding) and found != expected:
            raise DigestMismatch(
                f"layer {layer}, ngram_embedding: the config gives [rows, d] = {expected}, "
                f"the model has {found}"
            )
    return memory


def _check_hash(layer: int, module: Any, spec: HashSpec) -> None:
    """Raises DigestMismatch unless the model hashes this layer as the config says."""
    if module.eos_token_id != spec.filler_id:  # the model keeps the id that it was made with
        raise DigestMismatch(
            f"layer {layer}, eos_token_id: the config gives {spec.filler_id}, the model hashes "
            f"with {module.eos_token_id}; end texts with another id by generation_config, or "
            "load the model with that config"
        )
    for name, expected in QWEN4.released.hash_values(spec, layer).items():
        buffer = getattr(module, name)
        if buffer.is_meta:
            raise ConfigError(
                f"layer {layer}, {name}: expected a loaded model, found it on the meta device"
            )
        if buffer.tolist() != list(expected):
            raise DigestMismatch(
                f"layer {layer}, {name}: the config gives {list(expected)}, the model has "
                f"{buffer.tolist()}"
            )


def _open(
    config: Any,
    memory: EngramConfig,
    store: str | os.PathLike[str] | Table | RowStore | Mapping[int, RowStore],
    row_format: RowFormat | None,
) -> StoreGroup:
    """The stores of the model's layers. Nothing stays open after an error."""
    layers = memory.hash.layer_ids
    if isinstance(store, str) and store.startswith("ram:"):
        raise ConfigError(
            f"store {store!r}: expected one that holds the table's rows, "
            "a new ram: store holds none"
        )
    if isinstance(store, Table):
        check_config(config, table=store)
    if isinstance(store, RowStore):
        if len(layers) != 1:
            raise ConfigError(f"store: expected stores for layers {list(layers)}, found {store!r}")
        store = {layers[0]: store}
    stores = StoreGroup.open(memory, store, row_format)
    try:
        _check_rows(config, memory, stores)
    except BaseException:
        stores.close()
        raise
    return stores


def _check_rows(config: Any, memory: EngramConfig, stores: StoreGroup) -> None:
    """Raises DigestMismatch naming what differs unless the rows are those of the config."""
    for layer, store in stores.items():
        table = getattr(store, "table", None)
        if isinstance(table, Table):
            check_config(config, table=table)
        expected = memory.hash.row_count(layer)
        found = store.info.rows
        if (found, stores.format.d) != (expected, memory.dim):
            raise DigestMismatch(
                f"layer {layer}: expected {expected} rows of d = {memory.dim}, "
                f"found {found} of d = {stores.format.d}"
            )
    stores.check(memory, memory.address_digest(VocabMap.identity(memory.hash.vocab_size).digest))


def _guard_saving(model: PreTrainedModel) -> None:
    # A bound method, since copies of a model rebind it.
    model.save_pretrained = types.MethodType(_save_pretrained, model)


def _save_pretrained(
    self: Any,
    save_directory: str | os.PathLike[str],
    *args: Any,
    without_table: bool = False,
    **kwargs: Any,
) -> None:
    """`save_pretrained` of a model whose table is elsewhere.

    Raises StoreError unless `without_table` says that this is intended: transformers would load
    such a checkpoint with random rows, `load_without_table` loads it as it is.
    """
    if not without_table:
        raise StoreError(
            f"{os.fspath(save_directory)}: expected a model with its n-gram table, found the table "
            "in a store; save_pretrained(path, without_table=True) leaves it out, for "
            "load_without_table"
        )
    type(self).save_pretrained(self, save_directory, *args, **kwargs)
