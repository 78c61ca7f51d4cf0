"""Transfer: how the rows of a ticket get from a store to the device of the model.

For the CPU they stay in the buffer that they were read into. For CUDA they go through page-locked
buffers, on a stream of their own. That part is written, but has not been run on a GPU yet. For any
other device they are copied while the reader waits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .buffers import BufferPool


class Transfer:
    """The way to one device.

    Attributes:
        pool: the buffers that rows are read into. Not safe for several threads: see BufferPool.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        """Args:
        device: where rows go.
        limit: bytes of unused buffers that are kept.
        """
        self._device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pool = BufferPool(limit, pinned=device.type == "cuda")

    def send(self, rows: dict[int, Tensor]) -> dict[int, Tensor]:
        """The rows on the device. When this returns, nothing reads from the buffers any more."""
        if self._device.type == "cpu":
            return rows
        if self._stream is None:
            return {layer: values.to(self._device) for layer, values in rows.items()}
        with torch.cuda.stream(self._stream):
            copies = {
                layer: values.to(self._device, non_blocking=True) for layer, values in rows.items()
            }
        self._stream.synchronize()
        return copies

    def hand_out(self, rows: dict[int, Tensor]) -> dict[int, Tensor]:
        """The rows, for use in the caller's current stream."""
        if self._stream is not None:
            # Their memory belongs to the other stream, which must not reuse it too early.
            for values in rows.values():
                values.record_stream(torch.cuda.current_stream(self._device))
        return dict(rows)
