"""What a memory has to know about earlier tokens, one line of values for each KV slot.

A line holds the token's id and, for each memory layer with a conv, its conv input. The engine
decides which slots a request has; whoever reads a slot gets what the forward of its token wrote.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..spec.config import EngramConfig

_ITEM = 4  # bytes of a value: float32, or the bits of an int32


def slot_width(config: EngramConfig) -> int:
    """Values of a slot, 4 bytes each: the id, and S*D conv inputs for each layer with a conv."""
    layer = config.layer
    inputs = layer.streams * layer.hidden_size if layer.window else 0
    return 1 + len(config.hash.layer_ids) * inputs


def slot_bytes(config: EngramConfig) -> int:
    """Bytes of a slot."""
    return slot_width(config) * _ITEM


class Slots:
    """The lines of all slots. Slot s is line s % size of block s // size, as in a paged KV cache.

    The tensor may have any strides; it belongs to the engine.
    """

    def __init__(self, config: EngramConfig, values_KBW: Tensor) -> None:
        """Args:
            config: Sizes of the memory.
            values_KBW: float32, blocks, lines of a block (1 if the engine has no blocks), values of
                a slot.

        Raises:
            InputError: The tensor has another dtype or width.
        """
        width = slot_width(config)
        expected = f"float32 [blocks, lines, {width}]"
        if values_KBW.dtype is not torch.float32 or values_KBW.shape[2:] != (width,):
            raise InputError(
                f"slots: expected {expected}, found {values_KBW.dtype} {list(values_KBW.shape)}"
            )
        self._size = values_KBW.shape[1]
        self._ids_KB = values_KBW[:, :, :1].view(torch.int32)[:, :, 0]
        self._inputs: dict[int, Tensor] = {}
        layer = config.layer
        if layer.window:
            inputs_KBLSD = values_KBW[:, :, 1:].unflatten(
                2, (len(config.hash.layer_ids), layer.streams, layer.hidden_size)
            )
            self._inputs = dict(zip(config.hash.layer_ids, inputs_KBLSD.unbind(2), strict=True))

    def write_ids(self, slots_N: np.ndarray, ids_N: Tensor) -> None:
        """Notes the ids of tokens."""
        self._ids_KB[self._places(slots_N)] = ids_N.to(self._ids_KB)

    def read_ids(self, slots_RP: np.ndarray) -> np.ndarray:
        """int64 [R, P], the ids in these slots; -1 where the slot is -1."""
        ids_RP = self._ids_KB[self._places(slots_RP)].numpy(force=True).astype(np.int64)
        return np.where(slots_RP >= 0, ids_RP, -1)

    def write_inputs(self, layer: int, slots_BT: np.ndarray, inputs_BTSD: Tensor) -> None:
        """Notes conv inputs of tokens."""
        self._inputs[layer][self._places(slots_BT)] = inputs_BTSD.to(torch.float32)

    def read_inputs(self, layer: int, slots_BW: np.ndarray) -> Tensor:
        """f32 [B, W, S, D], the conv inputs in these slots; zeros where the slot is -1."""
        inputs_BWSD = self._inputs[layer][self._places(slots_BW)]
        if (slots_BW < 0).any():
            absent_BW = torch.from_numpy(slots_BW < 0).to(inputs_BWSD.device)
            inputs_BWSD = inputs_BWSD.masked_fill(absent_BW[:, :, None, None], 0.0)
        return inputs_BWSD

    def _places(self, slots: np.ndarray) -> tuple[Tensor, Tensor]:
        """Blocks and lines of slots, on the tensor's device. A slot -1 counts as 0."""
        known = torch.from_numpy(np.maximum(slots, 0)).to(self._ids_KB.device)
        return known // self._size, known % self._size
