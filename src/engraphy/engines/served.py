"""A memory in the forward of an engine: the rows of all layers are read ahead, then fused.

    step = served.begin(chunks)          # before the first block: ids, addresses, rows requested
    x_ND = step.fuse(layer, x_ND)        # in front of each block with a memory

Nothing of a request is kept between two forwards, except in the slots.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError, DigestMismatch, InputError, StoreError
from ..memory.lookup import Lookup
from ..memory.memory import EngramMemory
from .chunks import Batch, Chunks
from .slots import Slots, slot_bytes

# torch's matrix products on a CPU add in another order if there are fewer rows than this.
_FEW = 16


class ServedMemory:
    """A memory that an engine serves.

    Attributes:
        memory: The memory.
        past: P, how many earlier tokens of a request it looks at.
        look_back: Of how many of them it needs the ids.
        layers: The layers (0-based) in front of which it adds something.
    """

    def __init__(self, memory: EngramMemory, device: torch.device, dtype: torch.dtype) -> None:
        """Moves the dense layers.

        Args:
            memory: The memory, frozen, in eval mode.
            device: Where the engine computes.
            dtype: In which dtype it computes.
        """
        self._place = (device, dtype)
        self.memory = self._placed(memory)
        self.layers = memory.layers
        self.look_back = memory.config.hash.order - 1
        self._window = memory.config.layer.window
        self.past = max(self.look_back, self._window)
        self._slots: Slots | None = None
        logging.getLogger("engraphy").info(
            "a memory in layers %s; beside the KV cache it takes %s bytes a token",
            list(self.layers),
            f"{slot_bytes(memory.config):,}",
        )

    def bind(self, values_KBW: Tensor) -> None:
        """Takes the engine's tensor for the slots, as `Slots` does. Its values may be anything."""
        self._slots = Slots(self.memory.config, values_KBW)
        logging.getLogger("engraphy").info(
            "%s bytes beside the KV cache for ids and conv inputs of %s tokens",
            f"{values_KBW.nbytes:,}",
            f"{values_KBW.shape[0] * values_KBW.shape[1]:,}",
        )

    def begin(self, chunks: Chunks, history_RP: np.ndarray | None = None) -> Step:
        """Notes the ids of the chunks, and requests the rows of all layers.

        Args:
            chunks: The tokens of the forward.
            history_RP: int [R, look_back], the ids before each chunk as the engine knows them; -1 =
                none. They have to be those in the slots. None = the engine does not say.

        Raises:
            InputError: An id is out of range, or the slots hold the values of other tokens.
            StoreError: The memory is closed, or no slots were bound.
        """
        slots = self._slots
        if slots is None:
            raise StoreError("slots: expected a tensor from the engine before the first forward")
        ids_N = chunks.ids_N.to("cpu", torch.int64)
        # First written, then read: a chunk's past may be among the chunks of this forward.
        slots.write_ids(chunks.slots_N, chunks.ids_N)
        found_RP = slots.read_ids(chunks.past_RP[:, self.past - self.look_back :])
        if history_RP is not None and not np.array_equal(history_RP, found_RP):
            raise InputError(
                "slots: expected the values of the tokens before each chunk, whose ids are "
                f"{history_RP.tolist()}, found those of {found_RP.tolist()}; did something other "
                "than a forward fill or move the KV cache?"
            )
        reads = []
        for batch in chunks.batches(ordered=self._window > 0):
            places_BT = torch.from_numpy(batch.tokens_BT)
            lookup = self.memory.lookup(ids_N[places_BT], history=found_RP[batch.requests])
            reads.append((batch, places_BT.to(self._place[0]), lookup))
        return Step(self.memory, slots, chunks, reads)

    def replace(self, memory: EngramMemory) -> None:
        """Serves another memory from the next forward on, and closes the old one.

        What the slots hold, and all keys and values, came from the old one: the engine has to
        forget its caches, and must not be in the middle of a request.

        Args:
            memory: Of the same config, frozen, in eval mode. Closed if it is refused.

        Raises:
            DigestMismatch: It has other addresses or sizes.
        """
        old = self.memory
        if (memory.config, memory.address_digest) != (old.config, old.address_digest):
            memory.close()
            raise DigestMismatch(
                f"reload: expected a memory with address digest {old.address_digest} and the same "
                f"layers, found {memory.address_digest}"
            )
        self.memory = self._placed(memory)
        logging.getLogger("engraphy").info(
            "table %s instead of %s", memory.stores.table_id, old.stores.table_id
        )
        old.close()

    def _placed(self, memory: EngramMemory) -> EngramMemory:
        device, dtype = self._place
        memory.to(device=device, dtype=dtype)
        for block in memory.blocks.values():
            _fold_conv_norm(block)
        return memory


class Step:
    """One forward: the rows that were requested for it, and how to fuse them."""

    def __init__(
        self,
        memory: EngramMemory,
        slots: Slots,
        chunks: Chunks,
        reads: list[tuple[Batch, Tensor, Lookup]],
    ) -> None:
        self._memory = memory
        self._slots = slots
        self._chunks = chunks
        self._reads = reads
        self._windows_RW = chunks.past_RP[:, chunks.past_RP.shape[1] - memory.config.layer.window :]

    def fuse(self, layer: int, x_ND: Tensor) -> Tensor:
        """x plus what the memory of a layer adds. Waits for the rows of the layer.

        Args:
            layer: One of the memory's layers.
            x_ND: The hidden states in front of the block, [N, D] or [N, S, D]. Lines behind the
                last token, which some engines add, stay as they are.

        Returns:
            A new tensor of the shape of x.

        Raises:
            ConfigError: The layer has no memory.
            EngraphyError: Whatever reading the rows raises.
        """
        if layer not in self._memory.layers:
            raise ConfigError(
                f"layer {layer!r} has no memory; expected one of {list(self._memory.layers)}"
            )
        for *_, lookup in self._reads:
            lookup.rows[layer]  # an error of reading is raised before anything is computed
        out_ND = x_ND.clone()
        for batch, places_BT, lookup in self._reads:
            out_ND[places_BT] = self._fuse_batch(layer, x_ND[places_BT], batch, lookup)
        return out_ND

    def _fuse_batch(self, layer: int, x_BTD: Tensor, batch: Batch, lookup: Lookup) -> Tensor:
        block: Any = self._memory.blocks[str(layer)]
        spec = self._memory.config.layer
        batch_size, tokens = batch.tokens_BT.shape
        size = _padded_size(batch_size, tokens)
        x_BTSD = x_BTD.unflatten(2, (1, -1)) if x_BTD.ndim == 3 else x_BTD
        live = lookup.live
        window = None
        if spec.window:
            window_BWSD = self._slots.read_inputs(layer, self._windows_RW[batch.requests])
            window = _padded(window_BWSD, (size[0], spec.window))
        out_BTSD, _, inputs_BTSD = block(
            _padded(x_BTSD, size),
            _padded(lookup.rows[layer].to(x_BTD.device), size),
            window,
            None if live is None else _padded(live.to(x_BTD.device), size),
            conv_inputs=True,
            residual=True,
        )
        if spec.window:
            slots_BT: np.ndarray = self._chunks.slots_N[batch.tokens_BT]
            self._slots.write_inputs(layer, slots_BT, inputs_BTSD[:batch_size, :tokens])
        return out_BTSD[:batch_size, :tokens].reshape(x_BTD.shape)


def _fold_conv_norm(block: Any) -> None:
    """Multiplies the taps of the conv by its norm's factors, which become one.

    conv(norm * v) is the same sum. So a conv input has the same bits whether it comes from the
    chunk or from the slots.
    """
    if block.conv is None:
        return
    unit = 1.0 if block.spec.unit_offset else 0.0
    norm_SD = block.conv_norm.float() + unit
    block.conv = nn.Parameter(block.conv.float() * norm_SD[..., None], requires_grad=False)
    block.conv_norm = nn.Parameter(torch.full_like(norm_SD, 1.0 - unit), requires_grad=False)


def _padded_size(batch: int, tokens: int) -> tuple[int, int]:
    """The smallest batch of sequences around this one whose tokens are a multiple of _FEW.

    So a token's result is the same bits in every batch, and does not depend on what else the engine
    computes with it.
    """
    longer = (batch, -(-tokens // _FEW) * _FEW)
    step = _FEW // math.gcd(tokens, _FEW)
    wider = (-(-batch // step) * step, tokens)
    return min(longer, wider, key=math.prod)


def _padded(values_BT: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, T, ...] with zeros behind: `size` sequences and tokens."""
    if values_BT.shape[:2] == size:
        return values_BT
    padded = values_BT.new_zeros(*size, *values_BT.shape[2:])
    padded[: values_BT.shape[0], : values_BT.shape[1]] = values_BT
    return padded
