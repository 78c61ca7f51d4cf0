"""What a memory has to know about earlier tokens, one line of values for each KV slot.

A line holds the token's id and, for each memory layer with a conv, its conv input. The engine
decides which slots a request has; whoever reads a slot gets what the forward of its token wrote.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..fusion.paged import Lines
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

    The tensor belongs to the engine.
    """

    def __init__(self, config: EngramConfig, values_KBW: Tensor) -> None:
        """Args:
            config: Sizes of the memory.
            values_KBW: float32, blocks, lines of a block (1 if the engine has no blocks), values of
                a slot, which lie side by side; blocks and lines may have any strides.

        Raises:
            InputError: The tensor has another dtype, width or stride.
        """
        width = slot_width(config)
        fits = values_KBW.dtype is torch.float32 and values_KBW.shape[2:] == (width,)
        if not fits or (width > 1 and values_KBW.stride(2) != 1):
            raise InputError(
                f"slots: expected float32 [blocks, lines, {width}] with the values of a slot side "
                f"by side, found {values_KBW.dtype} {list(values_KBW.shape)}, strides "
                f"{list(values_KBW.stride())}"
            )
        blocks, self._size, _ = values_KBW.shape
        self._block, self._line, _ = values_KBW.stride()
        extent = (blocks - 1) * self._block + (self._size - 1) * self._line + width
        values = values_KBW.as_strided((extent,), (1,))
        self._ids = values.view(torch.int32)
        layer = config.layer
        self._inputs: dict[int, Tensor] = {}
        if layer.window:
            inputs = layer.streams * layer.hidden_size
            places = enumerate(config.hash.layer_ids)
            self._inputs = {layer_id: values[1 + place * inputs :] for place, layer_id in places}

    def offsets(self, slots: np.ndarray) -> np.ndarray:
        """int64 of the same shape: where each slot begins among the values; -1 for slot -1."""
        if self._block == self._size * self._line:
            offsets = slots * self._line
        else:
            blocks, lines = np.divmod(slots, self._size)
            offsets = blocks * self._block + lines * self._line
        return np.where(slots >= 0, offsets, -1)

    def write_ids(self, offsets_N: np.ndarray, ids_N: Tensor) -> None:
        """Notes the ids of tokens."""
        self._ids[torch.from_numpy(offsets_N).to(self._ids.device)] = ids_N.to(self._ids)

    def read_ids(self, offsets_NP: np.ndarray) -> np.ndarray:
        """int64 [N, P], the ids in these slots; -1 where the offset is -1."""
        known_NP = torch.from_numpy(np.maximum(offsets_NP, 0)).to(self._ids.device)
        ids_NP = self._ids[known_NP].numpy(force=True).astype(np.int64)
        return np.where(offsets_NP >= 0, ids_NP, -1)

    def lines(self, layer: int, offsets_NK: Tensor) -> Lines:
        """The conv inputs of a layer, and those which the taps of each token read."""
        return Lines(self._inputs[layer], offsets_NK)
