"""Checks that a memory can join a model, before anything is made.

A decoder's signature shows that it takes keyword arguments, but not that it hands them to its
blocks. So one check runs a forward over one token, and stops it before the first block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ..errors import ConfigError, DigestMismatch
from ..memory.memory import EngramMemory
from ..spec.config import EngramConfig
from .backbone import Backbone, same_device, takes_keywords, unwrapped
from .cache import counts_tokens
from .hooks import Attachment
from .versions import rename_cache

_MARK = "engraphy_probe"


def check_free(model: nn.Module, backbone: Backbone) -> None:
    """Raises ConfigError if the model has a memory already."""
    hooks = backbone.decoder._forward_pre_hooks.values()
    inside = any(isinstance(module, EngramMemory) for module in unwrapped(model).modules())
    if inside or any(isinstance(getattr(hook, "__self__", None), Attachment) for hook in hooks):
        raise ConfigError(
            "model: expected no memory, found one; a model carries one memory: detach it first, or "
            "give one memory more layers"
        )


def check_fits(backbone: Backbone, config: EngramConfig) -> None:
    """Raises ConfigError unless the model has the memory's layers and sizes.

    The weights of these layers must be on a device.
    """
    depth, name = len(backbone.blocks), type(backbone.decoder).__name__
    for layer in config.hash.layer_ids:
        if layer >= depth:
            raise ConfigError(
                f"{name}: expected layers 0 to {depth - 1}, found layer {layer} in the memory"
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
            f"{name}: expected a memory with (hidden size, streams) = {expected}, found {found}"
        )


def check_made_for(backbone: Backbone, memory: EngramMemory) -> None:
    """Raises DigestMismatch if the memory was made for another model.

    The same model with a larger vocabulary is accepted.
    """
    found, made_for = backbone.identity, memory.made_for or {}
    other_type = made_for.get("model_type", found["model_type"]) != found["model_type"]
    size = made_for.get("vocab_size")
    smaller = size is not None and backbone.vocab_size < size
    if other_type or smaller:
        raise DigestMismatch(
            f"model: expected {made_for}, which the memory was made for (or the same with a larger "
            f"vocab_size, whose new ids are dead), found {found}; to use the memory here anyway, "
            "set made_for = None on what EngramMemory.load returns, and attach that"
        )


def check_joins(model: nn.Module, backbone: Backbone) -> None:
    """Raises ConfigError unless the parts of the model work together as a memory needs it.

    The model must hand token ids to its decoder. The decoder must hand keyword arguments and hidden
    states [B, T, D] or [B, T, S, D] to its blocks, and the blocks must take them. The decoder's
    cache must count tokens. Changes nothing, not even the state of random numbers.
    """
    inner: Any = unwrapped(model)
    _check_cache(backbone)
    for block in backbone.blocks:
        if not takes_keywords(block):
            raise ConfigError(
                f"{type(backbone.decoder).__name__}: expected blocks that take keyword arguments "
                f"of others, found {type(block).__name__}"
            )
    hidden = _first_hidden_states(inner, backbone)
    expected = [[1, 1, backbone.streams, backbone.hidden_size]]
    if backbone.streams == 1:
        expected.append([1, 1, backbone.hidden_size])
    found = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
    if found not in expected:
        raise ConfigError(
            f"{type(inner).__name__}: expected blocks that get hidden states {expected[-1]} for "
            f"one token, found {found}"
        )


def _check_cache(backbone: Backbone) -> None:
    expected = (
        f"{type(backbone.decoder).__name__}: expected a decoder with a cache of attention layers, "
        "with which the memory's state travels"
    )
    if backbone.cache_argument is None:
        raise ConfigError(f"{expected}, found one that takes {list(backbone.arguments)}")
    cache = DynamicCache(config=backbone.config)
    if not counts_tokens(cache):
        kinds = sorted({type(layer).__name__ for layer in cache.layers})
        raise ConfigError(f"{expected}, found layers that do not count tokens: {', '.join(kinds)}")


class _Reached(Exception):
    """The first block was called with these arguments."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs


def _first_hidden_states(inner: Any, backbone: Backbone) -> Any:
    """Returns the hidden states that the first block gets in a forward over one token."""
    name, decoder = type(inner).__name__, type(backbone.decoder).__name__
    device = inner.get_input_embeddings().weight.device
    ids_BT = torch.zeros(1, 1, dtype=torch.long, device="cpu" if device.type == "meta" else device)
    try:
        with _watched(inner, backbone), _undisturbed(inner, device):
            inner(input_ids=ids_BT)
    except _Reached as call:
        if _MARK not in call.kwargs:
            raise ConfigError(
                f"{decoder}: expected a decoder that hands keyword arguments on to its blocks, "
                "found one that does not"
            ) from None
        return call.args[0] if call.args else call.kwargs.get("hidden_states")
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{name}: expected a model that runs on token ids alone, found "
            f"{type(error).__name__} before its first block: {error}"
        ) from error
    raise ConfigError(
        f"{decoder}: expected a forward that calls its blocks, found one that does not"
    )


@contextmanager
def _watched(inner: Any, backbone: Backbone) -> Iterator[None]:
    """Marks the decoder's call in a forward, and raises _Reached when the first block is called."""

    def mark(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = dict(zip(backbone.arguments, args, strict=False)) | kwargs
        if arguments.get("input_ids") is None:
            raise ConfigError(
                f"{type(inner).__name__}: expected a model that hands token ids to its decoder, "
                "found one that hands embeddings; a memory looks up ids"
            )
        rename_cache(arguments, str(backbone.cache_argument))
        cache = {backbone.cache_argument: DynamicCache(config=backbone.config), "use_cache": True}
        return (), arguments | {_MARK: True} | cache

    def reached(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args, kwargs)

    handles = [
        backbone.decoder.register_forward_pre_hook(mark, with_kwargs=True),
        backbone.blocks[0].register_forward_pre_hook(reached, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _undisturbed(inner: nn.Module, device: torch.device) -> Iterator[None]:
    """Runs without gradients, dropout and compiled code; restores modes and random numbers."""
    training = [module for module in inner.modules() if module.training]  # may drop layers
    try:
        for module in training:
            module.training = False
        with (
            torch.no_grad(),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        for module in training:
            module.training = True
