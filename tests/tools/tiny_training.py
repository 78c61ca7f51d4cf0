"""What the tests of training share: a tiny model with a memory, token data, and a Trainer over
them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

import engraphy
from engraphy import EngramMemory
from engraphy.hf import MemoryAdamW, trainer_kwargs
from engraphy.train import RowOptimizer
from tests.tools.tiny_model import small_config

VOCAB = 97


BEST_OF_EVERY_STEP: dict[str, Any] = dict(
    save_strategy="steps",
    save_steps=1,
    eval_strategy="steps",
    eval_steps=1,
    load_best_model_at_end=True,
)
"""Arguments of a run that saves each step and ends with the best one."""


def tiny_model(seed: int = 0, **sizes: int) -> Any:
    """A Llama of random weights. sizes: changes of its LlamaConfig."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attention_dropout=0.1,
        initializer_range=0.2,
    )
    return AutoModelForCausalLM.from_config(LlamaConfig(**(settings | sizes)))


def attach_tiny(model: Any, seed: int = 0) -> EngramMemory:
    """An attached memory of two layers; its weights are random, so that rows learn from the first
    step."""
    torch.manual_seed(seed)
    memory = engraphy.attach(model, small_config(model), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.2
    return memory


def token_data(count: int = 24, tokens: int = 12, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    ids_BT = torch.randint(3, VOCAB, (count, tokens), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": ids_T, "labels": ids_T} for ids_T in ids_BT]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = dict(
        per_device_train_batch_size=2,
        max_steps=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        logging_steps=1,
        disable_tqdm=True,
    )
    return TrainingArguments(str(folder), **(settings | changes))


def tiny_trainer(
    model: Any, memory: EngramMemory, folder: Path, rows: RowOptimizer | None = None, **changes: Any
) -> Trainer:
    return Trainer(
        model=model,
        train_dataset=token_data(),
        eval_dataset=token_data(4, seed=2),
        **trainer_kwargs(memory, arguments(folder, **changes), rows),
    )


def optimizer_of(trainer: Trainer) -> MemoryAdamW:
    """The optimiser of a Trainer, inside accelerate's."""
    wrapped: Any = trainer.optimizer
    return wrapped.optimizer


def rows_of(memory: EngramMemory) -> dict[int, np.ndarray]:
    """Copies of the table's bytes, by layer."""
    return {
        layer: store.gather(np.arange(store.info.rows)) for layer, store in memory.stores.items()
    }


def moments_of(rows: RowOptimizer) -> dict[int, np.ndarray]:
    """Copies of the moments' bytes, by layer."""
    return {
        layer: store.gather(np.arange(store.info.rows)) for layer, store in rows.moments.items()
    }


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """Copies of all parameters, by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(first: dict[Any, Any], second: dict[Any, Any]) -> bool:
    """Whether two dictionaries of arrays or tensors are equal bit for bit."""
    return first.keys() == second.keys() and all(
        torch.equal(torch.as_tensor(first[key]), torch.as_tensor(second[key])) for key in first
    )
