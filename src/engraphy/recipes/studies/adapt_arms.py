"""Ways to adapt a frozen language model to a domain: a memory, its controls, and LoRA.

A value counts as trainable if training may change it. Those of a memory are its dense layers and
its whole table. An optimiser over `parameters()` sees the dense layers alone, so LoRA is compared
at two sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ...addresses.vocab import VocabMap
from ...errors import ConfigError
from ...hf import attach
from ...hf.pretrained import require_peft
from ...memory.memory import EngramMemory
from ...spec.config import EngramConfig
from ...train import OptimizerPair, RowAdam
from ...train.pair import warmup_cosine, weight_decay_groups
from .rates import Rates

LABELS = {
    "memory": "memory",
    "lora-dense": "LoRA, as many parameters as the memory's dense layers",
    "lora-total": "LoRA, as many bytes as the whole memory",
    "one-row": "memory, one row of each head in use",
    "frozen-rows": "memory, random rows that do not learn",
}
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""Learning rates that an arm may try; those of the rows are five times as high."""
MIDDLE = {"memory": 3e-3, "lora": 1e-3}
"""The rate that an arm tries first; then the one below and the one above."""
BEYOND = 2
"""How many more rates an arm tries while the best one is the last on its side."""
ROW_RATE = 5.0
"""The rows' learning rate over that of the dense layers."""
ROW_STD = 0.02
"""Standard deviation of the rows at the start."""


@dataclass(frozen=True)
class Sizes:
    """Values that training may change.

    Attributes:
        dense: Values in dense layers.
        table: Values in the table.
        rank: LoRA's rank; None = there is none.
    """

    dense: int
    table: int
    rank: int | None = None

    @property
    def bytes(self) -> int:
        """What the values take as float32."""
        return 4 * (self.dense + self.table)


@dataclass
class Adapted:
    """A frozen model with what is trained beside it.

    Attributes:
        model: The model with its memory attached, or a PEFT model.
        sizes: Sizes of what is trained.
        memory: None for LoRA.
    """

    model: nn.Module
    sizes: Sizes
    memory: EngramMemory | None

    def optimizers(self, lr: float) -> OptimizerPair:
        """AdamW without decay, RowAdam at ROW_RATE times its rate; warm-up, then a cosine down to a
        tenth."""
        trained: list[torch.Tensor] = []
        for group in weight_decay_groups(self.model, 0.0):
            trained += group["params"]
        rows = None
        if self.memory is not None and self.memory.rows_require_grad is None:
            rows = RowAdam(self.memory, lr * ROW_RATE)
        dense = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
        return OptimizerPair(dense, rows, warmup_cosine(), clip=1.0)


def check_arm(arm: str) -> str:
    """Returns `arm`. Raises ConfigError unless it is one of LABELS."""
    if arm not in LABELS:
        raise ConfigError(f"arm: expected one of {list(LABELS)}, found {arm!r}")
    return arm


def rates_of(arm: str) -> Rates:
    """The learning rates that an arm may try. Raises ConfigError unless it is one of LABELS."""
    kind = "lora" if check_arm(arm).startswith("lora") else "memory"
    return Rates.around(RATES, MIDDLE[kind], BEYOND)


def memory_config(model_config: Any, vocab: VocabMap, rows_per_head: int) -> EngramConfig:
    """The memory of the study: two layers, orders 2 and 3, eight heads each, E about D/2."""
    return EngramConfig.for_model(model_config, rows_per_head=rows_per_head, vocab_size=len(vocab))


def adapt(model: Any, vocab: VocabMap, arm: str, rows_per_head: int, seed: int) -> Adapted:
    """Freezes a model and gives it what an arm trains.

    Args:
        model: A transformers model; it is changed in place.
        vocab: Map of its vocabulary.
        arm: One of LABELS.
        rows_per_head: Rows per head of the memory.
        seed: Seed of the initial values.

    Raises:
        ConfigError: The arm is unknown.
    """
    check_arm(arm)
    model.requires_grad_(False)
    config = memory_config(model.config, vocab, rows_per_head)
    torch.manual_seed(seed)
    if arm.startswith("lora"):
        wanted = config.dense_parameters()
        if arm == "lora-total":
            wanted += config.table_parameters()
        rank = max(1, round(wanted / _per_rank(model)))
        adapted = with_lora(model, rank)
        return Adapted(adapted, Sizes(_trainable(adapted), 0, rank), None)
    if arm == "one-row":  # every token has the same address
        vocab = VocabMap(np.zeros(vocab.raw_size, dtype=np.int64))
        config = memory_config(model.config, vocab, rows_per_head)
    memory = attach(model, config, vocab, std=ROW_STD, seed=seed)
    table = {
        "memory": config.table_parameters(),
        "one-row": len(memory.layers) * config.hash.columns * config.dim,
    }
    if arm == "frozen-rows":
        memory.rows_require_grad = False
    return Adapted(model, Sizes(_trainable(model), table.get(arm, 0)), memory)


def merged_hash(config: EngramConfig) -> dict[str, Any]:
    """The memory's shape, as results have it."""
    return {
        "layers": list(config.hash.layer_ids),
        "orders": list(config.hash.orders),
        "heads": config.hash.heads,
        "rows_per_head": list(config.hash.rows_per_head),
        "dim": config.dim,
        "width": config.layer.width,
        "kernel": config.layer.kernel,
    }


def _trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _per_rank(model: Any) -> int:
    """Parameters that one rank of LoRA adds: a row and a column of every projection."""
    projections = [part for part in model.get_decoder().modules() if isinstance(part, nn.Linear)]
    return sum(part.in_features + part.out_features for part in projections)


def with_lora(model: Any, rank: int) -> Any:
    """A PEFT model around `model`: LoRA on all linear layers of its blocks, alpha twice the rank.

    Raises:
        DataUnavailable: peft is not installed.
    """
    peft = require_peft("LoRA adapters")
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)
