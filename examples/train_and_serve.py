"""Trains a memory beside a toy model, saves it, and serves its table from disk: the outputs are the
same, bit for bit.

python examples/train_and_serve.py
"""

import tempfile
from pathlib import Path

import torch

from engraphy import EngramConfig, EngramMemory, HashSpec, LayerSpec, VocabMap
from engraphy.train import OptimizerPair, RowAdam, warmup_cosine

VOCAB = 100
HIDDEN = 32
DIM = 8  # values of a row

# Addresses: 2-grams and 3-grams of layer 1, two heads each. The multipliers depend on the
# vocabulary.
spec = HashSpec.demo(
    layer_ids=(1,), orders=(2, 3), heads=2, rows_per_head=5_000, vocab_size=VOCAB, pad_id=0
)
config = EngramConfig(spec, LayerSpec(HIDDEN, width=spec.columns * DIM), DIM)
print(
    f"{config.row_count():,} rows, {config.table_parameters():,} values in the table, "
    f"{config.dense_parameters():,} dense parameters"
)

torch.manual_seed(0)
memory = EngramMemory(config, VocabMap.identity(VOCAB))
memory.init_rows(std=0.02, seed=0)
embed = torch.nn.Embedding(VOCAB, HIDDEN)
head = torch.nn.Linear(HIDDEN, VOCAB)


def logits(memory: EngramMemory, ids_BT: torch.Tensor) -> torch.Tensor:
    lookup = memory.lookup(ids_BT)  # reads the rows of every memory layer
    x_BTD = embed(ids_BT)
    return head(memory.fuse(1, x_BTD[:, :, None], lookup)[:, :, 0])  # one residual stream: S = 1


# A text in which each token follows from the two before it. Only the memory sees the one that is
# two places back.
ids = torch.randint(1, VOCAB, (32, 48))
for t in range(2, 48):
    ids[:, t] = 1 + (ids[:, t - 1] * 7 + ids[:, t - 2] * 3) % 20

dense = torch.optim.AdamW([*memory.parameters(), *embed.parameters(), *head.parameters()], lr=3e-3)
pair = OptimizerPair(dense, RowAdam(memory, lr=1.5e-2), warmup_cosine(), clip=1.0)
for step in range(60):
    loss = torch.nn.functional.cross_entropy(
        logits(memory, ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()
    )
    loss.backward()
    pair.step(progress=(step + 1) / 60)
    if step % 20 == 0 or step == 59:
        print(f"step {step:2d}  loss {loss.item():.3f}")

memory.eval()
with tempfile.TemporaryDirectory() as folder:
    memory.save(Path(folder) / "memory")
    served = EngramMemory.load(Path(folder) / "memory").eval()
    print("served from", served.stores[1].info.kind, "store, table", served.stores[1].info.table_id)
    print("equal bit for bit:", torch.equal(logits(memory, ids), logits(served, ids)))
