"""Whether a memory can join a model, found by a forward over one token that ends before the first
block.

Signatures tell only that a decoder takes keyword arguments, not that its blocks get them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ..errors import ConfigError
from .backbone import Backbone, takes_keywords, unwrapped
from .cache import counts_tokens
from .versions import rename_cache

_MARK = "engraphy_probe"


class _Reached(Exception):
    """The first block was called with these arguments."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs


def check_joins(model: nn.Module, backbone: Backbone) -> None:
    """Raises ConfigError unless the model hands token ids to its decoder, and the decoder hands
    keyword arguments and hidden states [B, T, D] or [B, T, S, D] to blocks that take them. Changes
    nothing, random numbers included."""
    inner: Any = unwrapped(model)
    name, decoder = type(inner).__name__, type(backbone.decoder).__name__
    expected = (
        "expected a decoder with a cache of attention layers, with which the memory's state travels"
    )
    if backbone.cache_argument is None:
        raise ConfigError(f"{decoder}: {expected}, found one that takes {list(backbone.arguments)}")
    cache = DynamicCache(config=backbone.config)
    if not counts_tokens(cache):
        kinds = sorted({type(layer).__name__ for layer in cache.layers})
        raise ConfigError(
            f"{decoder}: {expected}, found layers that do not count tokens: {', '.join(kinds)}"
        )
    for block in backbone.blocks:
        if not takes_keywords(block):
            raise ConfigError(
                f"{decoder}: expected blocks that take keyword arguments of others, found "
                f"{type(block).__name__}"
            )
    hidden = _first_hidden_states(inner, backbone)
    expected = [[1, 1, backbone.streams, backbone.hidden_size]]
    if backbone.streams == 1:
        expected.append([1, 1, backbone.hidden_size])
    found = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
    if found not in expected:
        raise ConfigError(
            f"{name}: expected hidden states {expected[-1]} for one token, its blocks get {found}"
        )


def _first_hidden_states(inner: Any, backbone: Backbone) -> Any:
    name, decoder = type(inner).__name__, type(backbone.decoder).__name__

    def mark(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(backbone.arguments, args, strict=False)) | kwargs
        if given.get("input_ids") is None:
            raise ConfigError(
                f"{name}: expected a model that hands token ids to its decoder, found one that hands "
                "embeddings; a memory looks up ids"
            )
        rename_cache(given, str(backbone.cache_argument))
        cache = {backbone.cache_argument: DynamicCache(config=backbone.config), "use_cache": True}
        return (), given | {_MARK: True} | cache

    def reached(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args, kwargs)

    device = inner.get_input_embeddings().weight.device
    ids = torch.zeros(1, 1, dtype=torch.long, device="cpu" if device.type == "meta" else device)
    handles = [
        backbone.decoder.register_forward_pre_hook(mark, with_kwargs=True),
        backbone.blocks[0].register_forward_pre_hook(reached, with_kwargs=True),
    ]
    training = [module for module in inner.modules() if module.training]  # may drop layers
    try:
        for module in training:
            module.training = False
        with (
            torch.no_grad(),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.compiler.set_stance("force_eager"),
        ):
            inner(input_ids=ids)
    except _Reached as found:
        if _MARK not in found.kwargs:
            raise ConfigError(
                f"{decoder}: expected a decoder that hands keyword arguments on to its blocks, found "
                "one that does not"
            ) from None
        return found.args[0] if found.args else found.kwargs.get("hidden_states")
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{name}: expected a model that runs on token ids alone, found {type(error).__name__} before "
            f"its first block: {error}"
        ) from error
    finally:
        for module in training:
            module.training = True
        for handle in handles:
            handle.remove()
    raise ConfigError(
        f"{decoder}: expected a forward that calls its blocks, found one that does not"
    )
