"""The parts of a transformers model that a memory joins: its decoder, its blocks, its cache."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from .versions import cache_argument


@dataclass(frozen=True)
class Backbone:
    """The parts of a decoder that a memory joins.

    Attributes:
        decoder: Embeddings and blocks, without the head.
        blocks: The decoder's blocks in order.
        arguments: Names of the arguments of the decoder's forward, in order.
    """

    decoder: nn.Module
    blocks: nn.ModuleList
    arguments: tuple[str, ...]

    @property
    def config(self) -> Any:
        """The decoder's config."""
        return self.decoder.config

    @property
    def hidden_size(self) -> int:
        """Values of one residual stream."""
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """How many token ids the model has; 0 if its config does not say."""
        return int(getattr(self.config, "vocab_size", None) or 0)

    @property
    def identity(self) -> dict[str, Any]:
        """What a memory keeps of the model that it is trained in: model_type and vocab_size."""
        return {name: getattr(self.config, name, None) for name in ("model_type", "vocab_size")}

    @property
    def cache_argument(self) -> str | None:
        """Name of the argument in which the decoder takes its cache; None if it takes none."""
        return cache_argument(self.arguments)

    @property
    def streams(self) -> int:
        """Number of residual streams: more than one with hyper-connections (DeepSeek-V4)."""
        return int(getattr(self.config, "hc_mult", None) or 1)


def find_backbone(model: nn.Module) -> Backbone:
    """The decoder of a transformers model, and its blocks.

    The blocks are the decoder's one ModuleList of num_hidden_layers modules.

    Raises:
        ConfigError: The model has no such parts, or is an encoder-decoder.
    """
    inner: Any = unwrapped(model)
    config = getattr(inner, "config", None)
    if config is None or not hasattr(inner, "get_decoder"):
        raise ConfigError(f"expected a transformers model, found {type(model).__name__}")
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{type(inner).__name__}: expected a decoder-only model, found an encoder-decoder"
        )
    decoder = inner.get_decoder()
    depth = int(getattr(decoder.config, "num_hidden_layers", 0))
    lists = {
        name: child
        for name, child in decoder.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == depth
    }
    if len(lists) != 1:
        raise ConfigError(
            f"{type(decoder).__name__}: expected one list of its {depth} blocks, "
            f"found {sorted(lists)}"
        )
    if not takes_keywords(decoder):
        raise ConfigError(
            f"{type(decoder).__name__}: expected a forward that hands keyword arguments on to its "
            "blocks"
        )
    (blocks,) = lists.values()
    return Backbone(decoder, blocks, tuple(inspect.signature(decoder.forward).parameters))


def takes_keywords(module: nn.Module) -> bool:
    """Whether a module's forward takes keyword arguments that it does not name."""
    parameters = inspect.signature(module.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a PEFT model, a compiled one or DistributedDataParallel."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()  # pyright: ignore[reportCallIssue]
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def find_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's first floating-point parameter; float32 if it has none."""
    for parameter in unwrapped(model).parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.float32


def same_device(module: nn.Module) -> torch.device:
    """The device of a block's first parameter; the CPU if it has none."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
