"""Several processes train copies of one table: they share row gradients and make the same update.

DistributedDataParallel averages the gradients of dense parameters. Rows are no parameters, so it
does not see them. After backward each process holds the gradients of the rows that its part of the
batch has read. These are gathered in the order of the ranks, and every process steps with their
mean. So equal copies stay equal, bit for bit.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError, DigestMismatch
from ..memory.grads import RowGrad, coalesce
from ..memory.memory import EngramMemory
from ..memory.summed import SummedGrad

_CHUNK = 65_536


def replica_group(memory: EngramMemory) -> dist.ProcessGroup:
    """A group of all processes over the CPU (gloo), for training copies of a table.

    Every process has to call this. Reads every row once, to compare the tables.

    Raises:
        ConfigError: torch.distributed is not initialised.
        DigestMismatch: the tables of the processes differ; raised in every process.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ConfigError(
            "replica_group: expected torch.distributed to be initialised, found it is not: start "
            "the process with torchrun, and call init_process_group"
        )
    group: Any = dist.new_group(backend="gloo")
    digests = _gather(torch.frombuffer(bytearray(_digest(memory)), dtype=torch.uint8), group)
    different = [rank for rank, digest in enumerate(digests) if not torch.equal(digest, digests[0])]
    if different:
        raise DigestMismatch(
            f"replica_group: expected the table of rank 0 in all {len(digests)} processes, found "
            f"another one in ranks {different}: give all of them the same config, seed and rows"
        )
    return group


def drain_mean(memory: EngramMemory, replicas: dist.ProcessGroup | None) -> dict[int, SummedGrad]:
    """Drains the memory's pending row gradients, duplicates summed.

    Args:
        memory: the memory.
        replicas: the group from `replica_group`; None = this process alone. All its processes have
            to call this in every step.

    Returns:
        The gradients by layer; with `replicas` their mean over all processes, as
        DistributedDataParallel computes it for dense gradients.
    """
    own = coalesce(memory.drain_row_grads())
    if replicas is None:
        return own
    nothing = SummedGrad(np.empty(0, np.int64), np.empty((0, memory.config.dim), np.float32))
    counts_L = torch.tensor([len(own.get(layer, nothing).ids) for layer in memory.layers])
    counts_WL = torch.stack(_gather(counts_L, replicas)).tolist()  # W processes
    mean = {}
    for index, layer in enumerate(memory.layers):
        counts_W = [counts_L[index] for counts_L in counts_WL]
        if any(counts_W):
            mean[layer] = _mean(layer, own.get(layer, nothing), counts_W, replicas)
    return mean


def _mean(layer: int, own: SummedGrad, counts_W: list[int], group: dist.ProcessGroup) -> SummedGrad:
    """Mean over all ranks. counts_W: how many rows of the layer each rank has."""
    ids_W = _gather_ragged(torch.from_numpy(own.ids), counts_W, group)
    grads_W = _gather_ragged(torch.from_numpy(own.grad), counts_W, group)
    entries = [RowGrad(layer, ids, grad) for ids, grad in zip(ids_W, grads_W, strict=True)]
    ids_U, grad_Ud = coalesce(entries)[layer]
    return SummedGrad(ids_U, grad_Ud / np.float32(len(counts_W)))


def _gather(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """The tensors of all ranks, which have one shape and dtype."""
    tensors = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(tensors, tensor, group=group)
    return tensors


def _gather_ragged(part: Tensor, counts_W: list[int], group: dist.ProcessGroup) -> list[np.ndarray]:
    """The arrays of all ranks; that of rank r has counts_W[r] rows."""
    padded = part.new_zeros((max(counts_W), *part.shape[1:]))
    padded[: len(part)] = part
    gathered = _gather(padded, group)
    return [rows[:count].numpy() for rows, count in zip(gathered, counts_W, strict=True)]


def _digest(memory: EngramMemory) -> bytes:
    head = f"{memory.address_digest} {memory.format.kind}"
    content = hashlib.blake2b(head.encode(), digest_size=16)
    for store in memory.stores.values():
        rows = store.info.rows
        for first in range(0, rows, _CHUNK):
            ids_N = np.arange(first, min(first + _CHUNK, rows))
            content.update(store.gather(ids_N).data)
    return content.digest()
