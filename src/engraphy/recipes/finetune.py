"""`engraphy finetune`: trains a memory for a model that exists, on your own text, while the model
stays frozen.

The loss on held-out text is measured before and after, on the same tokens. Documents are packed
into rows. Position ids begin anew at each document, so no document sees another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from ..addresses.vocab import VocabMap
from ..data.mix import require_books
from ..data.packing import IGNORED, Batch, Batches
from ..errors import ConfigError
from ..eval.losses import heldout_losses, mean_with_error
from ..hf import attach, cost, save_pretrained, write_card
from ..hf.hub import ADAPTER, FOLDER
from ..hf.pretrained import load_model, load_tokenizer, require_peft
from ..lm.loop import StepReport
from ..memory import saved
from ..memory.memory import EngramMemory
from ..spec.config import EngramConfig
from ..system.files import check_folder, publish_folder
from ..system.machine import VARIABLE, free_memory
from ..system.signals import stopping, terminable
from ..train import OptimizerPair, RowAdam, warmup_cosine
from ..train.dtype import AUTO, DtypeChoice, check_dtype
from .progress import ArmProgress
from .studies.adapt_arms import with_lora
from .texts import read_documents, start_id

ROW_RATE = 5.0
"""The rows' learning rate over that of the dense layers."""
LORA_RATE = 0.1
"""LoRA's learning rate over that of the dense layers."""


@dataclass(frozen=True)
class FinetuneConfig:
    """What to train a memory for, on what, and how.

    Attributes:
        model: Folder or hub name of the model.
        data: A text file or a folder of them (form feeds divide documents), a .jsonl file with
            "text" in each line, or what `data.documents.load_documents` takes.
        out: A new folder for the memory.
        tokens: Training tokens; None = each token of the text once.
        lr: Learning rate of the dense layers; the rows learn five times as fast. The default did
            best in docs/results/beside-lora.md.
        layers: Layers with a memory, 0-based; None = as `EngramConfig.for_model` chooses.
        rows_per_head: Rows of a head; None = as `EngramConfig.for_model` chooses, but no more than
            the text has tokens, since it has no more n-grams.
        batch: Rows of a step.
        length: Tokens of a row.
        heldout: Share of the documents that is not trained on.
        seed: Seed of weights, order and split.
        lora: Rank of LoRA adapters that are trained together with the memory, at a tenth of its
            rate, and saved in `out`/adapter; None = the memory alone.
        dtype: Dtype of the frozen model, as `choose_dtype` takes it. The memory is float32 while it
            trains.
        whole: Save the model and its tokenizer with the memory, as `hf.save_pretrained` does: a
            folder that serving engines take. The memory is then in `out`/engraphy.
    """

    model: str
    data: str
    out: Path
    tokens: int | None = None
    lr: float = 1e-2
    layers: tuple[int, ...] | None = None
    rows_per_head: int | None = None
    batch: int = 4
    length: int = 256
    heldout: float = 0.05
    seed: int = 0
    lora: int | None = None
    dtype: str = AUTO
    whole: bool = False

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"tokens: expected 1 or more, found {self.tokens}")
        require_books(self.data, self.tokens or 0)
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"lr: expected a positive number, found {self.lr}")
        if self.lora is not None and self.lora < 1:
            raise ConfigError(f"lora: expected a rank of 1 or more, found {self.lora}")
        if self.lora is not None and self.whole:
            raise ConfigError(
                "whole: expected a memory alone, found adapters beside it: merge them into the "
                "model, and save both with hf.save_pretrained"
            )
        check_folder(self.out)


@dataclass(frozen=True)
class Measured:
    """Loss on held-out text, before and after.

    Attributes:
        without: Nats a token of the bare model.
        with_memory: Nats a token with the memory, and with the adapters if there are any.
        stderr: Standard error of the difference over documents; None with one document.
        tokens: Tokens that were measured.
        documents: Documents that were measured.
        lora: True if adapters were trained too.
    """

    without: float
    with_memory: float
    stderr: float | None
    tokens: int
    documents: int
    lora: bool = False

    def __str__(self) -> str:
        error = "" if self.stderr is None else f", standard error {self.stderr:.4f}"
        without, with_it = "without the memory", "with it"
        if self.lora:
            without, with_it = "bare", "with memory and LoRA"
        return (
            f"{self.without:.4f} nats a token {without}, {self.with_memory:.4f} {with_it} "
            f"({self.with_memory - self.without:+.4f}{error}, over {self.tokens:,} tokens of "
            f"{_counted(self.documents)})"
        )


def finetune(config: FinetuneConfig, console: Console) -> Measured:
    """Trains a memory and saves it to `config.out` with a model card.

    Ctrl-C or SIGTERM ends the training early: the step is finished and what has been learned is
    saved. A second signal stops at once.

    Args:
        config: Model, text and settings.
        console: Where progress is printed.

    Returns:
        The held-out losses without and with the memory.

    Raises:
        DataUnavailable: If the model, the tokenizer, the text or a package is not there.
        InputError: If there is too little text.
        ConfigError: If the model does not allow the settings, or the memory does not fit into RAM.
        WriteFailed: If `config.out` cannot be written, or its disk has too little space.
        KeyboardInterrupt: After Ctrl-C; `signals.Terminated` after SIGTERM.
    """
    with terminable():
        return _finetune(config, console)


def _finetune(config: FinetuneConfig, console: Console) -> Measured:
    if config.lora is not None:
        require_peft("LoRA adapters")  # before anything takes long
    tokenizer = load_tokenizer(config.model)
    batches, unseen, tokens = _read(config, tokenizer, console)
    model, dtype = load_model(config.model, config.dtype)
    model.requires_grad_(False)
    if hasattr(model, "engraphy"):
        raise ConfigError(
            f"{config.model}: expected a model without a memory, found one saved with its memory"
        )
    vocab = VocabMap.from_tokenizer(tokenizer, raw_size=model.config.get_text_config().vocab_size)
    memory_config = _memory_config(config, model, tokenizer, vocab, tokens)
    _check_size(model, dtype, memory_config, config, console)
    with console.status("Held-out loss without a memory"):
        before, owners = _losses(model, unseen)
    _say(console, f"held-out loss without a memory: {before.mean():.4f} nats a token")
    if config.lora is not None:
        model = _adapted(model, config, console)
    torch.manual_seed(config.seed)
    memory = attach(model, memory_config, vocab, dtype=torch.float32, seed=config.seed)
    name = Path(config.data).name
    try:
        with ArmProgress(console, {"memory": "training"}) as progress:
            _train(model, memory, batches, config, lambda step: progress.step("memory", step))
        with console.status("Held-out loss with the memory"):
            after, _ = _losses(model, unseen)
    except KeyboardInterrupt:
        note = f"Trained on {name}; interrupted, not measured."
        _save(model, tokenizer, memory, config, console, note)
        raise
    measured = _compared(before, after, owners, config.lora is not None)
    _say(console, f"held-out loss: {measured}")
    note = f"Trained on {name} with the base model frozen. On held-out text of it: {measured}."
    with stopping() as stop:  # a signal waits until the trained memory is saved
        _save(model, tokenizer, memory, config, console, note)
    if stop:
        raise stop.error("all had been saved")
    return measured


def _read(config: FinetuneConfig, tokenizer: Any, console: Console) -> tuple[Batches, Batches, int]:
    """The batches to train on, those of held-out text, and how many tokens there are to train
    on."""
    training, heldout = read_documents(
        config.data,
        tokenizer,
        heldout=config.heldout,
        seed=config.seed,
        batch=config.batch,
        length=config.length,
    )
    start = start_id(tokenizer)
    batches = Batches(training, start, batch=config.batch, tokens=config.length, seed=config.seed)
    unseen = Batches(heldout, start, batch=config.batch, tokens=config.length, seed=None)
    sizes = f"{_documents_of(training)} to train on, {_documents_of(heldout)} held out"
    _say(console, f"{config.data}: {sizes}")
    return batches, unseen, sum(map(len, training))


def _compared(before: np.ndarray, after: np.ndarray, owners: np.ndarray, lora: bool) -> Measured:
    """Losses of the same tokens, f64 [M] each, paired by document."""
    _, error = mean_with_error(after - before, owners)
    return Measured(
        without=float(before.mean()),
        with_memory=float(after.mean()),
        stderr=error,
        tokens=len(before),
        documents=len(np.unique(owners)),
        lora=lora,
    )


def _memory_config(
    config: FinetuneConfig, model: Any, tokenizer: Any, vocab: VocabMap, tokens: int
) -> EngramConfig:
    text_config = model.config.get_text_config()
    rows = config.rows_per_head
    if rows is None:
        rows = min(5 * text_config.vocab_size, tokens)
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id
    return EngramConfig.for_model(
        text_config, config.layers, rows_per_head=rows, vocab_size=len(vocab), pad_id=pad
    )


def _check_size(
    model: Any,
    dtype: DtypeChoice,
    memory_config: EngramConfig,
    config: FinetuneConfig,
    console: Console,
) -> None:
    """Prints what the model is and what the memory takes.

    Raises ConfigError if the memory does not fit into RAM while it trains, WriteFailed if what is
    saved does not fit on the disk of `out`.
    """
    size = cost(memory_config)
    moments = 2 * memory_config.table_parameters() * torch.float32.itemsize
    parameters = f"{model.num_parameters():,} parameters"
    _say(console, f"{type(model).__name__}: {parameters}, frozen, on {model.device}")
    _say(console, str(dtype))
    layers = list(memory_config.hash.layer_ids)
    more = f"{moments / 1e6:,.1f} MB more while it trains"
    _say(console, f"memory in layers {layers}: {size}; {more}")
    needed = size.table_bytes + moments
    free = free_memory()
    if free is not None and needed > free:
        raise ConfigError(
            f"training the memory takes {needed / 1e6:,.1f} MB of RAM, "
            f"{free / 1e6:,.1f} MB are free: give fewer rows_per_head or layers; {VARIABLE} says "
            "otherwise"
        )
    saved_bytes = size.table_bytes + size.dense_bytes
    if config.whole:
        saved_bytes += sum(parameter.nbytes for parameter in model.parameters())
    check_folder(config.out, saved_bytes)


def _adapted(model: Any, config: FinetuneConfig, console: Console) -> Any:
    """The PEFT model around a frozen one. Its adapters add nothing yet."""
    assert config.lora is not None
    torch.manual_seed(config.seed)
    adapted = with_lora(model, config.lora)
    count = sum(parameter.numel() for parameter in _adapter_parameters(adapted))
    trained = f"{count:,} parameters, trained together with the memory"
    _say(console, f"LoRA of rank {config.lora}: {trained}")
    return adapted


def _adapter_parameters(model: Any) -> list[Tensor]:
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


def _train(
    model: Any,
    memory: EngramMemory,
    batches: Batches,
    config: FinetuneConfig,
    report: Callable[[StepReport], None],
) -> None:
    """Trains the memory, and the adapters if there are any.

    The backbone stays in eval mode: the memory has to fit the model as it is served, without
    dropout.
    """
    model.eval()
    memory.train()
    pair = _optimizers(model, memory, config)
    size = batches.tokens_per_step
    steps = len(batches) if config.tokens is None else math.ceil(config.tokens / size)
    with stopping() as stop:
        for step in range(1, steps + 1):
            began = time.perf_counter()
            # An end token is a mark of the packing, not text: no loss is taken there.
            batch = batches[step - 1].without_target(batches.end_id)
            losses_BT = _token_losses(model, batch)
            loss = losses_BT[batch.targets_BT.to(losses_BT.device) != IGNORED].mean()
            loss.backward()
            norm = pair.step(step / steps)
            speed = size / (time.perf_counter() - began)
            report(StepReport(step, steps, step * size, loss.item(), norm, speed))
            if stop:
                raise stop.error(f"stopped at step {step} of {steps}")
    model.eval()


def _optimizers(model: Any, memory: EngramMemory, config: FinetuneConfig) -> OptimizerPair:
    groups: list[dict[str, Any]] = [{"params": list(memory.parameters())}]
    if config.lora is not None:
        groups.append({"params": _adapter_parameters(model), "lr": config.lr * LORA_RATE})
    dense = torch.optim.AdamW(groups, lr=config.lr, weight_decay=0.0)
    return OptimizerPair(dense, RowAdam(memory, config.lr * ROW_RATE), warmup_cosine(), clip=1.0)


def _losses(model: Any, batches: Batches) -> tuple[np.ndarray, np.ndarray]:
    """Nats of every target but the end tokens, f64 [M], and its document, int64 [M]."""
    return heldout_losses(partial(_token_losses, model), batches, ends=False)


def _token_losses(model: Any, batch: Batch) -> Tensor:
    """Nats of each target, f32 [B, T], 0 where it is IGNORED. Positions begin anew at each start:
    packed documents do not see each other."""
    ids_BT, targets_BT, starts_BT = batch
    at_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    positions_BT = at_BT - torch.where(starts_BT, at_BT, 0).cummax(1).values
    ids_BT, positions_BT = ids_BT.to(model.device), positions_BT.to(model.device)
    logits_BTV = model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).logits
    targets_N = targets_BT.flatten().to(logits_BTV.device)
    losses_N = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), targets_N, ignore_index=IGNORED, reduction="none"
    )
    return losses_N.view(ids_BT.shape)


def _save(
    model: Any,
    tokenizer: Any,
    memory: EngramMemory,
    config: FinetuneConfig,
    console: Console,
    note: str,
) -> None:
    if config.whole:
        save_pretrained(model, config.out)
        tokenizer.save_pretrained(config.out)
    else:
        with publish_folder(config.out, last="memory.json") as folder:
            saved.write(memory, folder, "copy")
            if config.lora is not None:  # neither is right without the other
                model.save_pretrained(folder / ADAPTER, save_embedding_layers=False)
    write_card(config.out, memory, config.model, note=note)
    _say(console, f"saved: {config.out}")
    alone = config.out / FOLDER if config.whole else config.out
    _say(console, f'try it: engraphy generate {config.model} {alone} "..." --show-gates')


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, markup=False)


def _documents_of(documents: list[np.ndarray]) -> str:
    return f"{_counted(len(documents))} of {sum(map(len, documents)):,} tokens"


def _counted(documents: int) -> str:
    return f"{documents:,} document{'s' if documents > 1 else ''}"
