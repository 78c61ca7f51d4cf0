"""Several processes that train copies of one table: they share their row gradients and make the
same update.

The dense parameters are DistributedDataParallel's matter; the rows are no parameters, so it never
meets them. After backward each process holds the gradients of the rows that its part of the batch
has read. They are gathered, in the order of the ranks, and their mean is what every process steps
with: copies that were equal stay equal bit for bit.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError, DigestMismatch
from ..memory.grads import RowGrad, SummedGrad, coalesce
from ..memory.memory import EngramMemory

_CHUNK = 65_536


def replica_group(memory: EngramMemory) -> dist.ProcessGroup:
    """A group of all processes over the CPU (gloo), which every process has to make, for training
    copies of a table.

    Raises ConfigError where torch.distributed is not initialised, DigestMismatch on every process
    where their tables differ. Looks at every row once.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ConfigError(
            "replica_group: expected torch.distributed to be initialised, as in a process that torchrun "
            "started and that called init_process_group"
        )
    group: Any = dist.new_group(backend="gloo")
    digests = _gather(torch.frombuffer(bytearray(_digest(memory)), dtype=torch.uint8), group)
    different = [rank for rank, digest in enumerate(digests) if not torch.equal(digest, digests[0])]
    if different:
        raise DigestMismatch(
            f"expected the same table in all {len(digests)} processes, found another than that of "
            f"rank 0 in ranks {different}: give all of them the same config, seed and rows"
        )
    return group


def drain_mean(memory: EngramMemory, replicas: dist.ProcessGroup | None) -> dict[int, SummedGrad]:
    """The memory's pending row gradients, duplicates summed; with `replicas` their mean over all
    processes.

    The mean is what DistributedDataParallel makes of dense gradients. Every process has to take
    part in every step.
    """
    summed = coalesce(memory.drain_row_grads())
    if replicas is None:
        return summed
    none = SummedGrad(np.empty(0, np.int64), np.empty((0, memory.config.dim), np.float32))
    mine = [summed.get(layer, none) for layer in memory.layers]
    counts_WL = torch.stack(_gather(torch.tensor([len(ids) for ids, _ in mine]), replicas)).tolist()
    shared = {}
    for index, layer in enumerate(memory.layers):
        sizes = [counts_L[index] for counts_L in counts_WL]
        if any(sizes):
            ids, grads = (
                _gather_ragged(torch.from_numpy(part), sizes, replicas) for part in mine[index]
            )
            ids_U, grad_Ud = coalesce(
                RowGrad(layer, *pair) for pair in zip(ids, grads, strict=True)
            )[layer]
            shared[layer] = SummedGrad(ids_U, grad_Ud / np.float32(len(sizes)))
    return shared


def _gather(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """The tensors of all ranks, which have one shape and dtype."""
    found = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(found, tensor, group=group)
    return found


def _gather_ragged(part: Tensor, sizes: list[int], group: dist.ProcessGroup) -> list[np.ndarray]:
    """The arrays of all ranks, of which that of rank r has sizes[r] rows."""
    padded = part.new_zeros((max(sizes), *part.shape[1:]))
    padded[: len(part)] = part
    return [each[:size].numpy() for each, size in zip(_gather(padded, group), sizes, strict=True)]


def _digest(memory: EngramMemory) -> bytes:
    content = hashlib.blake2b(
        f"{memory.address_digest} {memory.format.kind}".encode(), digest_size=16
    )
    for layer in memory.layers:
        store = memory.stores[layer]
        for first in range(0, store.info.rows, _CHUNK):
            content.update(
                store.gather(np.arange(first, min(first + _CHUNK, store.info.rows))).data
            )
    return content.digest()
