"""The gates of a memory in Trainer's log, and how many of its rows have learned."""

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

        engraphy/gate_layer_L    mean gate, 0 to 1, of the training tokens since the last line,
                                 over all streams
        engraphy/rows_layer_L    share of the table's rows that have had a gradient since training
                                 began

    Padding does not count. Of several processes each counts its own part of the batch. It costs one
    sum over the gates a forward, and one byte a row. Training stays the same bit for bit.

    Args:
        memory: The memory that is trained.
    """

    def __init__(self, memory: EngramMemory) -> None:
        self.memory = memory
        # Since the last line: layer -> (sum of gates, number of gates).
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}
        self._learned: dict[int, np.ndarray] = {}  # layer -> bool [rows]
        self._handles: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start counting anew."""
        self._remove()  # hooks of a training that ended with an error
        self._sums = {}
        self._learned = {}
        self._handles = [
            self.memory.blocks[str(layer)].register_forward_hook(partial(self._add, layer))
            for layer in self.memory.layers
        ]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the rows that have a gradient."""
        for layer, ids_N, grad_Nd in self.memory.row_grads:
            if layer not in self._learned:
                self._learned[layer] = np.zeros(self.memory.stores[layer].info.rows, dtype=bool)
            self._learned[layer][ids_N[grad_Nd.any(axis=1)]] = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add to `logs`, which later callbacks see, and to the line in `state.log_history`."""
        numbers = {}
        for layer, (total, count) in sorted(self._sums.items()):
            numbers[f"engraphy/gate_layer_{layer}"] = float(total) / max(float(count), 1.0)
            if layer in self._learned:
                numbers[f"engraphy/rows_layer_{layer}"] = float(self._learned[layer].mean())
        self._sums = {}
        if logs is not None:
            logs.update(numbers)
        if state.log_history:
            state.log_history[-1].update(numbers)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop counting."""
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
        """Forward hook of EngramLayer. The sums stay on their device until a line is logged."""
        if not block.training:
            return
        gate_BTS = outputs[1].detach()
        live_BT = inputs[3]
        total = gate_BTS.sum(dtype=torch.float64)
        count = torch.tensor(gate_BTS.numel())
        if live_BT is not None:
            count = live_BT.sum() * gate_BTS.shape[-1]
        if layer in self._sums:
            total_before, count_before = self._sums[layer]
            total, count = total_before + total, count_before + count
        self._sums[layer] = (total, count)
