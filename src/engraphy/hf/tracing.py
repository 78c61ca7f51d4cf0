"""What a transformers model's memory does, in a Trace: an attached memory, or Qwen4-Exp's own.

Qwen4-Exp hashes and fuses by itself. Hooks on its PLE layer read what it computes: the ids that it
looks up, its value, and its value times the gate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..addresses.addresser import Addresser
from ..addresses.vocab import VocabMap
from ..errors import ConfigError
from ..memory.lookup import Trace
from ..memory.memory import EngramMemory
from ..released.check import check_config
from .backbone import find_backbone, unwrapped
from .qwen4 import ple_layers


class Reader:
    """Forwards of a model that tell what its memory does.

    Attributes:
        blocks: the decoder's blocks.
        layers: the layers with a memory, 0-based.
        addresser: token ids -> row ids.

    Raises:
        ConfigError: the model has no memory.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.blocks: nn.ModuleList = find_backbone(model).blocks
        memory = getattr(unwrapped(model), "engraphy", None)
        self._memory = memory if isinstance(memory, EngramMemory) else None
        if self._memory is not None:
            self.addresser = self._memory.addresser
        elif has_own_table(model):
            spec = check_config(model.config).hash
            self.addresser = Addresser(spec, VocabMap.identity(spec.vocab_size))
        else:
            raise ConfigError(
                f"{type(model).__name__}: expected a model with a memory, found none; attach one "
                "or name its folder"
            )
        self.layers = self.addresser.spec.layer_ids

    def forward(self, ids_BT: Tensor, trace: Trace | None) -> Tensor:
        """Logits [B, T, V]; fills the trace unless it is None."""
        if self._memory is not None:
            output = self._model(input_ids=ids_BT, use_cache=False, engraphy_trace=trace)
            return output.logits
        with ExitStack() as hooks:
            if trace is not None:
                hooks.enter_context(_traced(self._model, trace))
            return self._model(input_ids=ids_BT, use_cache=False).logits

    @contextmanager
    def without(self) -> Iterator[None]:
        """Forwards inside the `with` run without the memory."""
        with ExitStack() as stack:
            if self._memory is not None:
                stack.enter_context(self._memory.disabled())
            else:
                for ple in ple_layers(self._model).values():
                    stack.callback(ple.register_forward_hook(_nothing).remove)
            yield


def has_own_table(model: nn.Module) -> bool:
    """Whether it is a Qwen4-Exp model with its own n-gram table."""
    try:
        return bool(ple_layers(model))
    except ConfigError:
        return False


@contextmanager
def _traced(model: nn.Module, trace: Trace) -> Iterator[None]:
    with ExitStack() as hooks:
        for layer, ple in ple_layers(model).items():
            for handle in _PleTrace(layer, ple, trace).install():
                hooks.callback(handle.remove)
        yield


class _PleTrace:
    """Reads one PLE layer while it runs."""

    def __init__(self, layer: int, ple: Any, trace: Trace) -> None:
        self._layer = layer
        self._ple = ple
        self._trace = trace
        self._value: Tensor | None = None
        self._gated: Tensor | None = None

    def install(self) -> list[Any]:
        ple = self._ple
        return [
            ple.ple_embedding.ngram_embedding.register_forward_pre_hook(self._ids),
            ple.value_proj.register_forward_hook(self._values),
            ple.norm_conv.register_forward_pre_hook(self._gated_values),
            ple.register_forward_hook(self._done, with_kwargs=True),
        ]

    def _ids(self, module: Any, args: tuple[Any, ...]) -> None:
        self._trace.row_ids[self._layer] = args[0].cpu().numpy()

    def _values(self, module: Any, args: Any, output: Tensor) -> None:
        self._value = output

    def _gated_values(self, module: Any, args: tuple[Any, ...]) -> None:
        self._gated = args[0]

    def _done(self, module: Any, args: tuple[Any, ...], kwargs: Any, output: Tensor) -> None:
        assert self._value is not None and self._gated is not None
        value_BTD = self._value.float()
        gated_BTSD = self._gated.float().unflatten(-1, (-1, value_BTD.shape[-1]))
        # The gate is what the value was multiplied by: read where the value is largest.
        at_BT = value_BTD.abs().argmax(-1, keepdim=True)
        value_BT1 = value_BTD.gather(-1, at_BT)
        at_BTS1 = at_BT[:, :, None].expand(*gated_BTSD.shape[:3], 1)
        gate_BTS = gated_BTSD.gather(-1, at_BTS1)[..., 0] / value_BT1
        gate_BTS = torch.where(value_BT1 == 0, 0.0, gate_BTS)
        mask = kwargs.get("conv_mask")
        if mask is not None:
            gate_BTS = gate_BTS * mask[:, :, None].to(gate_BTS)
        self._trace.add_fusion(self._layer, gate_BTS, args[0], args[0] + output)


def _nothing(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return torch.zeros_like(output)
