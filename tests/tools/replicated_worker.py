"""What tests/test_replicated.py starts in two processes: `torchrun replicated_worker.py FOLDER`.
Not a test itself."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from engraphy.errors import DigestMismatch
from engraphy.memory import RowGrad
from engraphy.train import OptimizerPair, RowAdagrad, drain_mean, replica_group
from tests.tools.tiny_training import (
    VOCAB,
    attach_tiny,
    rows_of,
    tiny_model,
    tiny_trainer,
    weights_of,
)

TRAINER: dict[str, Any] = dict(
    max_grad_norm=0.5, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2
)
STEPS, PARTS = 3, 2  # updates, and parts that a process's share of a batch is accumulated from


def no_dropout(model: Any) -> Any:
    for block in model.model.layers:
        block.self_attn.attention_dropout = 0.0
    return model.train()


def batches() -> torch.Tensor:
    """int64 [steps, parts, 4, 12]: each part's first half is rank 0's, the second rank 1's."""
    return torch.randint(
        3, VOCAB, (STEPS, PARTS, 4, 12), generator=torch.Generator().manual_seed(4)
    )


def pair_of(model: Any, memory: Any, replicas: Any = None) -> OptimizerPair:
    """SGD and Adagrad, since Adam's first steps hide the scale of a gradient and blow its rounding
    up."""
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    return OptimizerPair(
        sgd, RowAdagrad(memory, lr=5e-2), lambda progress: 1.0, clip=0.5, replicas=replicas
    )


def loop(rank: int) -> dict[str, Any]:
    """A loop of one's own: DistributedDataParallel for the dense part, `replicas` for the rows."""
    model = no_dropout(tiny_model(seed=rank))  # DDP takes rank 0's parameters
    memory = attach_tiny(model, seed=0)
    wrapped = DistributedDataParallel(model)
    pair, norms = pair_of(wrapped, memory, replica_group(memory)), []
    for parts in batches():
        for index, ids_BT in enumerate(parts):
            mine_BT = ids_BT[2 * rank : 2 * rank + 2]
            with nullcontext() if index == PARTS - 1 else wrapped.no_sync():
                (wrapped(mine_BT, labels=mine_BT).loss / PARTS).backward()
        norms.append(pair.step(1.0))
    return {"weights": weights_of(model), "rows": rows_of(memory), "norms": norms}


def gathered(rank: int) -> dict[int, Any]:
    """What drain_mean gives: layer 1 has gradients of rank 1 alone, layer 2 of both, one row in
    common."""
    memory = attach_tiny(tiny_model())
    group = replica_group(memory)
    assert drain_mean(memory, group) == {}
    ids = np.array([7, 3, 7]) if rank == 0 else np.array([7, 9])
    memory.row_grads.append(RowGrad(2, ids, np.full((len(ids), 8), 1.0 + rank, np.float32)))
    if rank == 1:
        memory.row_grads.append(RowGrad(1, np.array([5]), np.full((1, 8), 6.0, np.float32)))
    return {
        layer: (ids_U.tolist(), grad_Ud[:, 0].tolist())
        for layer, (ids_U, grad_Ud) in drain_mean(memory, group).items()
    }


def refusal(rank: int) -> str:
    memory = attach_tiny(tiny_model())
    if rank == 1:
        memory.stores[2].scatter(np.array([50]), np.ones((1, 32), np.uint8))
    try:
        replica_group(memory)
    except DigestMismatch as error:
        return str(error)
    return ""


def trained(folder: Path, resume: bool) -> dict[str, Any]:
    model = no_dropout(tiny_model(seed=3 * resume))
    memory = attach_tiny(model, seed=3 * resume)
    run = tiny_trainer(model, memory, folder, **TRAINER)
    run.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return {"weights": weights_of(model), "rows": rows_of(memory)}


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    straight = trained(folder / "run", resume=False)
    found = {
        "trainer": straight,
        "resumed": trained(folder / "run", resume=True),
        "loop": loop(rank),
        "gathered": gathered(rank),
        "refusal": refusal(rank),
    }
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
