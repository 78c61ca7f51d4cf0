"""What a transformers model tells about itself: its decoder, its blocks, and which tokens of a batch are real."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, InputError


@dataclass(frozen=True)
class Backbone:
    """The parts of a decoder that a memory joins. decoder: embeddings and blocks, without the head. blocks: in order.
    arguments: names of the decoder's positional arguments."""

    decoder: nn.Module
    blocks: nn.ModuleList
    arguments: tuple[str, ...]

    @property
    def config(self) -> Any:
        return self.decoder.config

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def streams(self) -> int:
        """Residual streams: more than one with hyper-connections (DeepSeek-V4)."""
        return int(getattr(self.config, "hc_mult", None) or 1)


def find_backbone(model: nn.Module) -> Backbone:
    """The decoder of a transformers model and its blocks: the one ModuleList of num_hidden_layers modules.

    Raises ConfigError for what has no such parts, and for encoder-decoder models.
    """
    inner: Any = unwrapped(model)
    config = getattr(inner, "config", None)
    if config is None or not hasattr(inner, "get_decoder"):
        raise ConfigError(f"expected a transformers model, found {type(model).__name__}")
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"{type(inner).__name__}: expected a decoder-only model, found an encoder-decoder")
    decoder = inner.get_decoder()
    depth = int(getattr(decoder.config, "num_hidden_layers", 0))
    lists = {name: child for name, child in decoder.named_children()
             if isinstance(child, nn.ModuleList) and len(child) == depth}
    if len(lists) != 1:
        raise ConfigError(f"{type(decoder).__name__}: expected one list of its {depth} blocks, found {sorted(lists)}")
    if not takes_keywords(decoder):
        raise ConfigError(f"{type(decoder).__name__}: expected a forward that hands keyword arguments on to its blocks")
    return Backbone(decoder, next(iter(lists.values())), tuple(inspect.signature(decoder.forward).parameters))


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


def read_batch(arguments: dict[str, Any], seen: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(ids [B, T], live [B, T] or None, starts [B, T] or None) of a call to a decoder. seen: tokens in its cache.

    live comes from a 2-D mask, whose columns are positions in the cache. starts: where position ids are 0; generate()
    gives padding position 0 too, so they serve a static cache, whose mask is 4-D, as they serve packing.
    Raises InputError where padding cannot be told: embeddings without ids, a mask that is not 2-D without position ids
    that go up by one or begin again at 0. And where padding stands between tokens of one sequence.
    """
    ids, mask, positions = (arguments.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    if arguments.get("cache") is not None:
        raise InputError(f"cache: a memory's state travels in past_key_values, which "
                         f"{type(arguments['cache']).__name__} has no place for; use generate(), not generate_batch()")
    if ids is None:
        raise InputError("the memory looks up token ids: expected input_ids, found inputs_embeds alone; "
                         "detach the memory to run the model on embeddings")
    batch, tokens = ids.shape
    starts = None
    if positions is not None:
        if positions.ndim != 2 or positions.shape[1] != tokens or positions.shape[0] not in (1, batch):
            raise InputError(f"position_ids: expected [{batch} or 1, {tokens}], found {list(positions.shape)}")
        if not bool(positions.all()):
            starts = (positions == 0).expand(batch, tokens)
    if mask is None:
        return ids, None, starts
    if isinstance(mask, Tensor) and mask.ndim == 2:
        if mask.shape[0] != batch or mask.shape[1] < seen + tokens:
            raise InputError(f"attention_mask: expected [{batch}, at least {seen + tokens}], found {list(mask.shape)}")
        return ids, _live(mask[:, :seen + tokens], tokens, starts), starts
    if (positions is None or bool(((positions.diff() != 1) & (positions[:, 1:] != 0)).any())
            or not seen and bool(positions[:, 0].any())):
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(f"attention_mask: expected [B, T], or position_ids that go up by one and begin at 0 in each "
                         f"document, found {found} and {'no' if positions is None else 'other'} position_ids")
    return ids, None, starts


def _live(mask: Tensor, tokens: int, starts: Tensor | None) -> Tensor | None:
    """Which of the last `tokens` columns of a 2-D mask are tokens; None = all."""
    before = max(mask.shape[1] - tokens - 1, 0)  # the column before the chunk, if there is one
    if bool(mask[:, before:].all()):
        return None
    live = mask != 0
    resumed = live[:, before + 1:] & ~live[:, before:-1] & (live.cumsum(1)[:, before:-1] > 0)
    if starts is not None:
        resumed &= ~starts[:, tokens - resumed.shape[1]:]
    if bool(resumed.any()):
        sequence = int(resumed.any(1).nonzero()[0])
        raise InputError(f"attention_mask: expected padding before or after a sequence, found it between the tokens of "
                         f"sequence {sequence}; pad on the left what is to be continued")
    return live[:, mask.shape[1] - tokens:]


def free_ram() -> int | None:
    """Free RAM in bytes, None where the system does not tell."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def find_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's floating-point parameters."""
    return next((p.dtype for p in unwrapped(model).parameters() if p.is_floating_point()), torch.float32)


def same_device(module: nn.Module) -> torch.device:
    """The device of a block's parameters."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
