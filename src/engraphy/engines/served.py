"""A memory in the forward of an engine: the rows of all layers are read ahead, then fused.

    step = served.begin(chunks)          # before the first block: ids, addresses, rows requested
    x_ND = step.fuse(layer, x_ND)        # in front of each block with a memory

Nothing of a request is kept between two forwards, except in the slots.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DigestMismatch, InputError, StoreError
from ..fusion.paged import PagedFusion
from ..memory.lookup import Lookup
from ..memory.memory import EngramMemory
from .chunks import Chunks
from .slots import Slots, slot_bytes


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
        self._fusions: dict[int, PagedFusion] = {}
        self.memory = self._placed(memory)
        self.layers = memory.layers
        self.look_back = memory.config.hash.order - 1
        layer = memory.config.layer
        self.past = max(self.look_back, layer.window)
        taps = np.arange(layer.kernel or 1)[::-1] * layer.order
        self._distances_K = np.concatenate([np.arange(self.look_back, 0, -1), taps])
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
        offsets_NK = slots.offsets(chunks.before(self._distances_K))
        # First written, then read: a chunk's past may be among the chunks of this forward.
        slots.write_ids(offsets_NK[:, -1], chunks.ids_N)
        history_NP = slots.read_ids(offsets_NK[:, : self.look_back])
        first_R = chunks.bounds[:-1]
        if history_RP is not None and not np.array_equal(history_RP, history_NP[first_R]):
            raise InputError(
                "slots: expected the values of the tokens before each chunk, whose ids are "
                f"{history_RP.tolist()}, found those of {history_NP[first_R].tolist()}; did "
                "something other than a forward fill or move the KV cache?"
            )
        ids_N1 = chunks.ids_N.to("cpu", torch.int64)[:, None]
        lookup = self.memory.lookup(ids_N1, history=history_NP)
        taps_NK = torch.from_numpy(offsets_NK[:, self.look_back :]).contiguous()
        return Step(self._fusions, slots, lookup, taps_NK.to(self._place[0]))

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
        blocks: Any = memory.blocks
        self._fusions = {layer: PagedFusion(blocks[str(layer)]) for layer in memory.layers}
        return memory


class Step:
    """One forward: the rows that were requested for it, and how to fuse them."""

    def __init__(
        self, fusions: dict[int, PagedFusion], slots: Slots, lookup: Lookup, taps_NK: Tensor
    ) -> None:
        """taps_NK: as `Lines.offsets_NK`."""
        self._fusions = fusions
        self._slots = slots
        self._lookup = lookup
        self._taps_NK = taps_NK
        self._live_N = None
        if lookup.live is not None:
            self._live_N = lookup.live[:, 0].to(taps_NK.device)

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
        fusion = self._fusions.get(layer)
        if fusion is None:
            raise ConfigError(
                f"layer {layer!r} has no memory; expected one of {list(self._fusions)}"
            )
        rows_NE = self._lookup.rows[layer][:, 0]
        tokens = len(rows_NE)
        lines = self._slots.lines(layer, self._taps_NK) if fusion.spec.window else None
        x_NSD = x_ND[:tokens].view(tokens, fusion.spec.streams, -1)
        out_NSD = fusion(x_NSD, rows_NE.to(x_ND.device), self._live_N, lines)
        out_ND = out_NSD.view(tokens, *x_ND.shape[1:])
        return out_ND if tokens == len(x_ND) else torch.cat([out_ND, x_ND[tokens:]])
