"""attach, detach, load: a memory for a transformers model that exists.

One pre-hook on the decoder sees a call's ids, mask, positions and cache, and puts a Lookup among
its keyword arguments, which decoders hand on to their blocks; one pre-hook on every block takes it
out again, and in the memory's layers changes the hidden states. Nothing of the model is replaced,
so taking the hooks away gives it back bit for bit.
"""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from ..addresses.vocab import VocabMap
from ..errors import ConfigError, DigestMismatch, InputError
from ..memory.memory import EngramMemory, Lookup
from ..memory.tracing import REASON, refuse_tracing
from ..rows.format import RowFormat
from ..spec.config import EngramConfig
from ..system.machine import VARIABLE, free_memory
from ..table.table import Table
from .adapters import Adapters
from .backbone import Backbone, find_backbone, find_dtype, same_device, unwrapped
from .batch import read_batch
from .cache import cached_state, ready_state, reserve, tokens_seen
from .hub import find_memory, warn_without_adapter
from .joins import check_joins
from .versions import check_version, rename_cache

_uncompiled: Any = torch.compiler.disable(reason=REASON)  # its own type hides what it decorates
_OFF = Lookup({}, None, None, None, None, off=True)
_LOOKUP = "engraphy_lookup"  # the keyword argument on its way from the decoder to its blocks
_log = logging.getLogger("engraphy")


@dataclass(frozen=True)
class Cost:
    """What a memory takes. parameters: of the table, and of the dense layers; bytes of both."""

    rows: int
    table_parameters: int
    table_bytes: int
    dense_parameters: int
    dense_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.rows:,} rows, table {self.table_parameters:,} parameters = {self.table_bytes / 1e6:,.1f} MB, "
            f"dense {self.dense_parameters:,} parameters = {self.dense_bytes / 1e6:,.1f} MB"
        )


def cost(
    config: EngramConfig, row_format: RowFormat | str = "f32", dtype: torch.dtype = torch.float32
) -> Cost:
    """What attaching `config` will take, without taking it. dtype: of the dense layers."""
    fmt = RowFormat(row_format, config.dim) if isinstance(row_format, str) else row_format
    dense = config.dense_parameters()
    return Cost(
        config.row_count(),
        config.table_parameters(),
        config.table_bytes(fmt.row_bytes),
        dense,
        dense * dtype.itemsize,
    )


def attach(
    model: nn.Module,
    config: EngramConfig | EngramMemory,
    vocab: VocabMap | None = None,
    store: str | os.PathLike[str] | Table = "ram:",
    *,
    row_format: RowFormat | str | None = None,
    std: float = 0.02,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    margin: int = 64,
) -> EngramMemory:
    """Give a transformers model a memory, which is returned and registered as `model.engraphy`.

    config: as from `EngramConfig.for_model`, or a memory that exists. vocab: the map of the model's
    tokenizer; None = ids as they are. store: "ram:" for a new table of `row_format` (default f32),
    filled with N(0, std**2) from `seed`; or the URL of a table, its folder as a Path, or an open
    Table, whose rows stay as they are. dtype: of the dense layers, default: the model's. margin:
    tokens that a cache can take back (`cache.crop`, assisted decoding). The value projections start
    at zero: a fresh memory changes no logit, and its rows learn from the second step. The model's
    own parameters stay trainable or frozen as they are; its `save_pretrained` leaves the memory
    out, which has its own `save`. Raises ConfigError for a version of transformers that was not
    tested, a model that cannot be joined, has a memory already, has other sizes or no such layer,
    and if the table does not fit into the free RAM; DigestMismatch for a table of other addresses,
    and for a memory that was made for another model (`memory.made_for`). A model that could not be
    given its memory is as it was.
    """
    check_version()
    backbone = find_backbone(model)
    _check_free(model, backbone)
    _check_fits(backbone, config if isinstance(config, EngramConfig) else config.config)
    check_joins(model, backbone)
    if isinstance(config, EngramMemory):
        if isinstance(getattr(config, "_attachment", None), _Attachment):
            raise ConfigError("the memory is attached to a model; detach it there first")
        _check_made_for(backbone, config)
        memory = config.train(model.training)
    else:
        memory = _make(model, config, vocab, store, row_format, std, seed, dtype)
    _Attachment(memory, backbone, margin).install(unwrapped(model))
    return memory


def detach(model: nn.Module) -> EngramMemory:
    """Take the memory off a model, which is then what it was before, bit for bit. Returns the
    memory.

    Raises ConfigError for a model without one.
    """
    inner = unwrapped(model)
    memory = getattr(inner, "engraphy", None)
    attachment = getattr(memory, "_attachment", None)
    if not isinstance(memory, EngramMemory) or not isinstance(attachment, _Attachment):
        raise ConfigError(
            f"{type(model).__name__}: expected a model with an attached memory, found none"
        )
    attachment.remove(inner)
    return memory


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    store: str | os.PathLike[str] | None = None,
    *,
    tokenizer: Any = None,
    margin: int = 64,
    **hub: Any,
) -> EngramMemory:
    """Attach what `memory.save` wrote. store: the URL, or the table's folder as a Path, to serve
    the rows from; default: the saved table.

    path: a folder, or "user/name" on the hub: a memory, or a model saved with its memory. hub:
    revision, token, cache_dir, force_download, local_files_only. tokenizer: the model's; where it
    is given, its vocabulary map has to be the saved one. Raises as `attach` and `EngramMemory.load`
    do, DigestMismatch for another tokenizer, DataUnavailable for a repository that cannot be had;
    nothing is left half attached.
    """
    _check_free(model, find_backbone(model))
    path = find_memory(path, **hub)
    warn_without_adapter(model, path)
    memory = EngramMemory.load(path, store)
    try:
        if tokenizer is not None:
            if not memory.vocab.agrees_with(tokenizer):
                raise DigestMismatch(
                    f"{path}: made for a vocabulary map of digest {memory.vocab.digest}, "
                    f"the tokenizer's is {VocabMap.from_tokenizer(tokenizer).digest}"
                )
        return attach(model, memory, margin=margin)
    except BaseException:
        memory.close()
        raise


class _Passing:
    """What a decoder hands to its blocks: a lookup, and the layers whose block has taken from it. A
    plain object: what rebuilds tuples and dataclasses on their way would lose the mark."""

    def __init__(self, lookup: Lookup) -> None:
        self.lookup = lookup
        self.reached: set[int] = set()


class _Attachment:
    """The hooks of one memory in one model. Holds no request state."""

    def __init__(self, memory: EngramMemory, backbone: Backbone, margin: int) -> None:
        self.memory, self.backbone, self.margin = memory, backbone, margin
        self.handles: list[Any] = []
        self.unsaved: set[str] = set()
        self.adapters: Adapters | None = None
        self.warned = self.told = False

    def install(self, model: Any) -> None:
        memory, blocks = self.memory, self.backbone.blocks
        self.adapters = Adapters(model)
        for layer in memory.layers:
            memory.blocks[str(layer)].to(same_device(blocks[layer]))
        torch.compiler.reset()  # a compiled model does not notice hooks that come or go
        model.add_module("engraphy", memory)
        object.__setattr__(memory, "_attachment", self)
        memory._model = partial(
            _made_for, self.backbone
        )  # asked again when it is saved: a vocabulary may be resized
        self.unsaved = {f"engraphy.{name}" for name in memory.state_dict()}
        kept = getattr(model, "_keys_to_ignore_on_save", None)
        model._keys_to_ignore_on_save = set(kept or ()) | self.unsaved
        decoder = self.backbone.decoder
        self.handles = [
            decoder.register_forward_pre_hook(self.before_decoder, with_kwargs=True),
            decoder.register_forward_hook(self.after_decoder, with_kwargs=True),
        ]
        for layer in memory.layers:
            hook = partial(self.before_layer, layer)
            self.handles.append(blocks[layer].register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self, model: Any) -> None:
        for handle in self.handles:
            handle.remove()
        torch.compiler.reset()
        self.memory.made_for = self.memory.made_for  # as it is now
        del model.engraphy
        model._keys_to_ignore_on_save -= self.unsaved
        object.__setattr__(self.memory, "_attachment", None)

    @_uncompiled
    def before_decoder(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(self.backbone.arguments, args, strict=False)) | kwargs
        trace = given.pop("engraphy_trace", None)
        if self.is_off():
            return (), self.left_out(given)
        refuse_tracing(given.get("input_ids"))
        name = str(self.backbone.cache_argument)
        rename_cache(given, name)
        cache = given.get(name)
        seen = tokens_seen(cache)
        batch = read_batch(given, cache, seen)
        if cache is None and self._makes_cache(given):
            cache = given[name] = DynamicCache(config=decoder.config)
        carried = None
        if cache is not None:
            carried = ready_state(cache, self.memory, len(batch.ids), seen, self.margin)
        self._warn_if_frozen()
        self.memory.widen(_vocabulary(self.backbone))  # which may have been resized
        lookup: Any = self.memory.lookup
        given[_LOOKUP] = _Passing(
            lookup(
                batch.ids,
                carried and carried.state,
                None,
                batch.starts,
                trace,
                present=batch.present,
            )
        )
        if carried is not None:
            carried.whole = False
        return (), given

    def left_out(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a forward that leaves the memory out: they look like those of any other,
        so that code which was compiled for the blocks is not compiled again."""
        name = str(self.backbone.cache_argument)
        if name == "cache":  # in earlier versions what comes as `cache` is the model's own matter
            rename_cache(given, name)
        if given.get(name) is None and self._makes_cache(given):
            given[name] = DynamicCache(config=self.backbone.config)
        reserve(given.get(name), self.memory, self.margin)
        return {**given, _LOOKUP: _Passing(_OFF)}

    def is_off(self) -> bool:
        """Whether a forward that begins now leaves the memory out."""
        memory, adapters = self.memory, self.adapters
        if not memory.enabled:
            return True
        if not memory.follows_adapters or adapters is None or not adapters.all_disabled():
            return False
        if not self.told:
            self.told = True
            _log.info(
                "PEFT's adapters are disabled, and the memory with them; "
                "memory.follows_adapters = False keeps it enabled"
            )
        return True

    @_uncompiled
    def after_decoder(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if kwargs[_LOOKUP].lookup.off:
            return
        reached, depth = (
            kwargs[_LOOKUP].reached,
            self.backbone.config.num_hidden_layers,
        )  # fewer in an early exit
        drops = decoder.training and getattr(decoder, "layerdrop", 0) > 0
        for layer in self.memory.layers:
            if layer not in reached and layer < depth and not drops:
                raise InputError(
                    f"layer {layer}: expected its block to take from the memory, found that it has not: "
                    "code compiled for another block runs in its place; compile the blocks "
                    "(block.compile()), not the model"
                )
        carried = cached_state(kwargs.get(str(self.backbone.cache_argument)))
        if carried is not None:
            carried.whole = True

    @_uncompiled
    def before_layer(
        self, layer: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        passing = kwargs.pop(_LOOKUP, None)
        if not isinstance(passing, _Passing):
            raise InputError(
                f"layer {layer}: expected a lookup from the decoder's forward, found none: the block was "
                f"called by itself, or {type(self.backbone.decoder).__name__} hands no keyword on"
            )
        passing.reached.add(layer)
        if passing.lookup.off:
            return args, kwargs
        if args:
            return (self.memory.apply(layer, args[0], passing.lookup), *args[1:]), kwargs
        kwargs["hidden_states"] = self.memory.apply(layer, kwargs["hidden_states"], passing.lookup)
        return args, kwargs

    def _makes_cache(self, given: dict[str, Any]) -> bool:
        """Whether the decoder would make a cache of its own: it then has to carry the memory's
        state."""
        wanted = given.get("use_cache")
        first = self.backbone.blocks[0]
        if first.training and getattr(
            first, "gradient_checkpointing", False
        ):  # blocks then drop the cache
            return False
        return bool(getattr(self.backbone.config, "use_cache", False) if wanted is None else wanted)

    def _warn_if_frozen(self) -> None:
        memory = self.memory
        if (
            self.warned
            or not (memory.training and torch.is_grad_enabled())
            or memory.rows_require_grad is not None
        ):
            return
        if not any(parameter.requires_grad for parameter in memory.parameters()):
            self.warned = True
            warnings.warn(
                "the attached memory has nothing trainable: call memory.requires_grad_(True) after "
                "get_peft_model, or set memory.rows_require_grad = False to say that this is meant",
                stacklevel=3,
            )


def has_adapters(memory: EngramMemory) -> bool:
    """Whether the model that a memory is attached to has PEFT's adapters."""
    attachment = getattr(memory, "_attachment", None)
    adapters = attachment.adapters if isinstance(attachment, _Attachment) else None
    return adapters is not None and adapters.present


def _make(
    model: nn.Module,
    config: EngramConfig,
    vocab: VocabMap | None,
    store: str | os.PathLike[str] | Table,
    row_format: RowFormat | str | None,
    std: float,
    seed: int,
    dtype: torch.dtype | None,
) -> EngramMemory:
    if vocab is None:
        vocab = _identity(model, config.hash.vocab_size)
    if dtype is None:
        dtype = find_dtype(model)
    fresh = isinstance(store, str) and store.startswith("ram:")
    _tell_cost(config, row_format or "f32", dtype, fresh)
    memory = EngramMemory(config, vocab, store, row_format)
    memory.to(dtype)
    for layer in memory.layers:
        memory.blocks[str(layer)].zero_value()  # pyright: ignore[reportCallIssue]
    if fresh:
        memory.init_rows(std, seed)
    return memory.train(model.training)


def _identity(model: nn.Module, size: int) -> VocabMap:
    """Ids as they are. Raises ConfigError if the model has more, which would all be dead."""
    ids = _vocabulary(find_backbone(model))
    if size < ids:
        raise ConfigError(
            f"vocab_size: expected the model's {ids} ids without a vocabulary map, the "
            f"hash spec says {size}; give vocab=, VocabMap.from_tokenizer(tokenizer, "
            f"raw_size={ids})"
        )
    return VocabMap.identity(size)


def _tell_cost(
    config: EngramConfig, row_format: RowFormat | str, dtype: torch.dtype, fresh: bool
) -> None:
    takes, free = cost(config, row_format, dtype), free_memory()
    _log.info(
        "attaching a memory to layers %s: %s; %s MB of RAM are free",
        list(config.hash.layer_ids),
        takes,
        "?" if free is None else f"{free / 1e6:,.1f}",
    )
    if fresh and free is not None and takes.table_bytes + takes.dense_bytes > free:
        raise ConfigError(
            f"the memory takes {takes}, {free / 1e6:,.1f} MB of RAM are free: give fewer rows_per_head, "
            f"a smaller dim or row_format, or a table on disk as store; {VARIABLE} says otherwise"
        )


def _made_for(backbone: Backbone) -> dict[str, Any]:
    """What a memory keeps of the model that it was trained in."""
    return {name: getattr(backbone.config, name, None) for name in ("model_type", "vocab_size")}


def _check_made_for(backbone: Backbone, memory: EngramMemory) -> None:
    found, known = _made_for(backbone), memory.made_for or {}
    size = known.get("vocab_size")
    smaller = size is not None and _vocabulary(backbone) < size
    if known.get("model_type", found["model_type"]) != found["model_type"] or smaller:
        raise DigestMismatch(
            f"the memory was made for {known}, the model is {found} (a larger vocab_size "
            "would do, its new ids are dead); to take it across, "
            "set made_for = None on what EngramMemory.load gives, and attach that"
        )


def _vocabulary(backbone: Backbone) -> int:
    """How many token ids the model has."""
    return int(getattr(backbone.config, "vocab_size", None) or 0)


def _check_free(model: nn.Module, backbone: Backbone) -> None:
    hooks = backbone.decoder._forward_pre_hooks.values()
    inside = any(isinstance(module, EngramMemory) for module in unwrapped(model).modules())
    if inside or any(isinstance(getattr(hook, "__self__", None), _Attachment) for hook in hooks):
        raise ConfigError(
            "the model has a memory: a model carries one; detach it first, or give one memory more "
            "layers"
        )


def _check_fits(backbone: Backbone, config: EngramConfig) -> None:
    depth, name = len(backbone.blocks), type(backbone.decoder).__name__
    for layer in config.hash.layer_ids:
        if layer >= depth:
            raise ConfigError(
                f"{name}: expected layers 0 to {depth - 1}, the memory has layer {layer}"
            )
        if same_device(backbone.blocks[layer]).type == "meta":
            raise ConfigError(
                f"layer {layer}: expected its weights on a device, found them offloaded or not "
                "loaded; keep the memory's layers on a device in the device_map"
            )
    expected = (backbone.hidden_size, backbone.streams)
    found = (config.layer.hidden_size, config.layer.streams)
    if found != expected:
        raise ConfigError(
            f"{name}: expected (hidden size, streams) = {expected}, the memory has {found}"
        )
