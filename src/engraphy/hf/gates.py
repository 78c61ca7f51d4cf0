"""Gates of a memory in Trainer's log: how much of what is looked up is let in, and how many rows
have learned."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from ..memory.memory import EngramMemory

_uncompiled: Any = torch.compiler.disable  # its own type hides what it decorates


class GateCallback(TrainerCallback):
    """Adds to each line of Trainer's log, for every layer L with a memory:

        engraphy/gate_layer_L    mean gate of the training tokens since the last line, 0 to 1, over all streams
        engraphy/rows_layer_L    share of the table's rows that have had a gradient since training began

    Padding does not count; of several processes each counts its own part of the batch. Costs one
    sum over the gates a forward, and one byte a row. The training itself is the same bit for bit.
    """

    def __init__(self, memory: EngramMemory) -> None:
        self.memory = memory
        self._sums: dict[
            int, list[Tensor]
        ] = {}  # layer -> [sum of gates, how many], since the last line
        self._learned: dict[int, np.ndarray] = {}  # layer -> bool [rows]
        self._handles: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._remove()  # of a training that ended with an error
        self._sums, self._learned = {}, {}
        self._handles = [
            self.memory.blocks[str(layer)].register_forward_hook(partial(self._add, layer))
            for layer in self.memory.layers
        ]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for layer, ids_N, grad_Nd in self.memory.row_grads:
            if layer not in self._learned:
                self._learned[layer] = np.zeros(self.memory.stores[layer].info.rows, dtype=bool)
            self._learned[layer][ids_N[grad_Nd.any(axis=1)]] = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Adds to `logs`, for the callbacks after this one, and to the line in `state.log_history`."""
        found = {}
        for layer, (total, count) in sorted(self._sums.items()):
            found[f"engraphy/gate_layer_{layer}"] = float(total) / max(float(count), 1.0)
            if layer in self._learned:
                found[f"engraphy/rows_layer_{layer}"] = float(self._learned[layer].mean())
        self._sums = {}
        for line in (logs, state.log_history[-1] if state.log_history else None):
            if line is not None:
                line.update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._remove()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        torch.compiler.reset()  # compiled code does not notice hooks that come or go

    @_uncompiled
    def _add(
        self, layer: int, block: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]
    ) -> None:
        """A forward hook of EngramLayer. The numbers stay on their device until a line is logged."""
        if not block.training:
            return
        gate_BTS, live_BT = outputs[1].detach(), inputs[3]
        count = torch.tensor(gate_BTS.numel())
        if live_BT is not None:
            count = live_BT.sum() * gate_BTS.shape[-1]
        sums = gate_BTS.sum(dtype=torch.float64), count
        before = self._sums.get(layer)
        self._sums[layer] = (
            [*sums] if before is None else [a + b for a, b in zip(before, sums, strict=True)]
        )
