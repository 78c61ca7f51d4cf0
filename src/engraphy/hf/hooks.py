"""The hooks that connect a memory to a transformers model.

A pre-hook on the decoder sees a call's ids, mask, positions and cache. It looks the ids up and adds
the Lookup to the keyword arguments, which decoders hand on to their blocks. A pre-hook on each
block of a memory layer takes the Lookup out again and changes the hidden states. Nothing of the
model is replaced, so removing the hooks gives it back bit for bit.
"""

from __future__ import annotations

import logging
import warnings
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from ..errors import InputError
from ..memory.memory import EngramMemory, Lookup, Trace
from ..memory.tracing import refuse_tracing, uncompiled
from .adapters import Adapters
from .backbone import Backbone, same_device
from .batch import Batch, read_batch
from .cache import CachedState, cached_state, ready_state, reserve, tokens_seen
from .versions import rename_cache

_OFF = Lookup({}, None, None, None, None, off=True)
_LOOKUP = "engraphy_lookup"  # the keyword argument on its way from the decoder to its blocks
_log = logging.getLogger("engraphy")


class _Passing:
    """What a decoder hands to its blocks: a lookup, and the layers that have read from it.

    A plain object, because code that rebuilds tuples and dataclasses would lose `reached`.
    """

    def __init__(self, lookup: Lookup) -> None:
        self.lookup = lookup
        self.reached: set[int] = set()


class Attachment:
    """The hooks of one memory in one model. Holds no request state."""

    def __init__(self, memory: EngramMemory, backbone: Backbone, margin: int) -> None:
        self.memory = memory
        self.backbone = backbone
        self.margin = margin
        self.handles: list[Any] = []
        self.unsaved: set[str] = set()  # keys that the model's save_pretrained leaves out
        self.adapters: Adapters | None = None
        self.warned_frozen = False
        self.logged_off = False

    def install(self, model: Any) -> None:
        """Register the memory as `model.engraphy`, and the hooks. Changes nothing else."""
        memory, backbone = self.memory, self.backbone
        self.adapters = Adapters(model)
        for layer in memory.layers:
            memory.blocks[str(layer)].to(same_device(backbone.blocks[layer]))
        torch.compiler.reset()  # a compiled model does not notice hooks that come or go
        model.add_module("engraphy", memory)
        object.__setattr__(memory, "_attachment", self)
        # Asked again when the memory is saved, because a vocabulary may be resized.
        memory.follow_model(lambda: backbone.identity)
        self.unsaved = {f"engraphy.{name}" for name in memory.state_dict()}
        ignored = getattr(model, "_keys_to_ignore_on_save", None)
        model._keys_to_ignore_on_save = set(ignored or ()) | self.unsaved
        self.handles = [
            backbone.decoder.register_forward_pre_hook(self.before_decoder, with_kwargs=True),
            backbone.decoder.register_forward_hook(self.after_decoder, with_kwargs=True),
        ]
        for layer in memory.layers:
            hook = partial(self.before_layer, layer)
            block = backbone.blocks[layer]
            self.handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self, model: Any) -> None:
        """Undo `install`."""
        for handle in self.handles:
            handle.remove()
        torch.compiler.reset()
        self.memory.made_for = self.memory.made_for  # keeps what the model is now
        del model.engraphy
        model._keys_to_ignore_on_save -= self.unsaved
        object.__setattr__(self.memory, "_attachment", None)

    @uncompiled
    def before_decoder(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of the decoder: looks up the call's tokens and adds the Lookup."""
        arguments = dict(zip(self.backbone.arguments, args, strict=False)) | kwargs
        trace = arguments.pop("engraphy_trace", None)
        if self.is_off():
            return (), self._without_memory(arguments)
        refuse_tracing(arguments.get("input_ids"))
        cache_name = str(self.backbone.cache_argument)
        rename_cache(arguments, cache_name)
        cache = arguments.get(cache_name)
        seen = tokens_seen(cache)
        batch = read_batch(arguments, cache, seen)
        if cache is None and self._makes_cache(arguments):
            cache = DynamicCache(config=decoder.config)
            arguments[cache_name] = cache
        carried = None
        if cache is not None:
            carried = ready_state(cache, self.memory, len(batch.ids), seen, self.margin)
        self._warn_if_frozen()
        arguments[_LOOKUP] = _Passing(self._look_up(batch, carried, trace))
        if carried is not None:
            carried.whole = False  # until after_decoder
        return (), arguments

    @uncompiled
    def after_decoder(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Hook of the decoder. Raises InputError if a memory layer's block did not run its hook."""
        passing = kwargs[_LOOKUP]
        if passing.lookup.off:
            return
        depth = self.backbone.config.num_hidden_layers  # lower in an early exit
        drops_layers = decoder.training and getattr(decoder, "layerdrop", 0) > 0
        for layer in self.memory.layers:
            if layer not in passing.reached and layer < depth and not drops_layers:
                raise InputError(
                    f"layer {layer}: expected its block to read from the memory, found that it did "
                    "not: code compiled for another block runs in its place; compile the blocks "
                    "(block.compile()), not the model"
                )
        carried = cached_state(kwargs.get(str(self.backbone.cache_argument)))
        if carried is not None:
            carried.whole = True

    @uncompiled
    def before_layer(
        self, layer: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Pre-hook of a memory layer's block: adds the memory to the hidden states."""
        passing = kwargs.pop(_LOOKUP, None)
        if not isinstance(passing, _Passing):
            decoder = type(self.backbone.decoder).__name__
            raise InputError(
                f"layer {layer}: expected a lookup from the decoder's forward, found none: the "
                f"block was called by itself, or {decoder} hands no keyword on"
            )
        passing.reached.add(layer)
        if passing.lookup.off:
            return args, kwargs
        if args:
            return (self.memory.fuse(layer, args[0], passing.lookup), *args[1:]), kwargs
        kwargs["hidden_states"] = self.memory.fuse(layer, kwargs["hidden_states"], passing.lookup)
        return args, kwargs

    def is_off(self) -> bool:
        """Whether a forward that begins now leaves the memory out."""
        memory, adapters = self.memory, self.adapters
        if not memory.enabled:
            return True
        if not memory.follows_adapters or adapters is None or not adapters.all_disabled():
            return False
        if not self.logged_off:
            self.logged_off = True
            _log.info(
                "PEFT's adapters are disabled, and the memory with them; "
                "memory.follows_adapters = False keeps it enabled"
            )
        return True

    def _without_memory(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The decoder's arguments for a forward that leaves the memory out.

        They look like those of any other forward, so blocks that are compiled are not compiled
        again.
        """
        cache_name = str(self.backbone.cache_argument)
        if cache_name == "cache":  # before 5.24 a `cache` is left to the model
            rename_cache(arguments, cache_name)
        if arguments.get(cache_name) is None and self._makes_cache(arguments):
            arguments[cache_name] = DynamicCache(config=self.backbone.config)
        reserve(arguments.get(cache_name), self.memory, self.margin)
        return {**arguments, _LOOKUP: _Passing(_OFF)}

    def _look_up(self, batch: Batch, carried: CachedState | None, trace: Trace | None) -> Lookup:
        memory = self.memory
        memory.widen(self.backbone.vocab_size)  # the vocabulary may have been resized
        state = None if carried is None else carried.state
        return memory.lookup_eagerly(
            batch.ids, state, starts=batch.starts, trace=trace, present=batch.present
        )

    def _makes_cache(self, arguments: dict[str, Any]) -> bool:
        """Whether the decoder would make a cache of its own, which has to carry the state."""
        first = self.backbone.blocks[0]
        if first.training and getattr(first, "gradient_checkpointing", False):
            return False  # blocks drop the cache then
        wanted = arguments.get("use_cache")
        if wanted is None:
            wanted = getattr(self.backbone.config, "use_cache", False)
        return bool(wanted)

    def _warn_if_frozen(self) -> None:
        memory = self.memory
        trains = memory.training and torch.is_grad_enabled()
        if self.warned_frozen or not trains or memory.rows_require_grad is not None:
            return
        if not any(parameter.requires_grad for parameter in memory.parameters()):
            self.warned_frozen = True
            warnings.warn(
                "the attached memory has nothing trainable: call memory.requires_grad_(True) after "
                "get_peft_model, or set memory.rows_require_grad = False if this is intended",
                stacklevel=3,
            )


def attachment_of(memory: Any) -> Attachment | None:
    """Returns the hooks of an attached memory; None if it is not attached, or not a memory."""
    attachment = getattr(memory, "_attachment", None)
    return attachment if isinstance(attachment, Attachment) else None


def has_adapters(memory: EngramMemory) -> bool:
    """Whether the model that a memory is attached to has PEFT's adapters."""
    attachment = attachment_of(memory)
    return (
        attachment is not None and attachment.adapters is not None and attachment.adapters.present
    )
