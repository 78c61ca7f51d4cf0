"""`engraphy finetune`: a memory for a model that exists, trained on one's own text while the model
stays frozen.

The loss on held-out text is measured before and after, on the same tokens. Documents are packed
into rows; position ids begin anew at each, so no document sees another.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from ..addresses.vocab import VocabMap
from ..data.documents import load_documents, split_documents
from ..data.packing import IGNORED, Batch, Batches
from ..errors import ConfigError, DataUnavailable, InputError
from ..eval.losses import mean_with_error
from ..hf import attach, cost, write_card
from ..hf.hub import ADAPTER
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

ROW_RATE = 5.0
"""The rows' learning rate over that of the dense layers."""
LORA_RATE = 0.1
"""LoRA's learning rate over that of the dense layers."""
_HELDOUT_TOKENS = 100_000  # measured twice; more would not be surer, only longer


@dataclass(frozen=True)
class FinetuneConfig:
    """model: folder or hub name. data: a text file or a folder of them (form feeds divide
    documents), a .jsonl file with "text" in each line, or what `lm.load_documents` takes. out: a
    new folder for the memory.

    tokens: of training, by default each of the text once. lr: of the dense layers; the rows learn
    five times as fast. The default did best in docs/results.md, "A memory beside LoRA". layers:
    0-based, rows_per_head: as `EngramConfig.for_model` chooses where None, but no more rows than
    the text has tokens, since it has no more n-grams. batch, length: of a step. heldout: share of
    the documents not trained on. lora: rank of LoRA adapters that are trained together with the
    memory, at a tenth of its rate, and saved in `out`/adapter; None = the memory alone. dtype: of
    the frozen model, as `choose_dtype` takes it; the memory is float32 while it trains.
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

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"tokens: expected 1 or more, found {self.tokens}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"lr: expected a positive number, found {self.lr}")
        if self.lora is not None and self.lora < 1:
            raise ConfigError(f"lora: expected a rank of 1 or more, found {self.lora}")
        check_folder(self.out)


@dataclass(frozen=True)
class Measured:
    """Nats a token on held-out text: of the bare model, with the memory, and the standard error of
    the difference over documents (None with one document). tokens, documents: that were measured.
    lora: whether adapters are with it."""

    without: float
    with_memory: float
    stderr: float | None
    tokens: int
    documents: int
    lora: bool = False

    def __str__(self) -> str:
        error = f", standard error {self.stderr:.4f}" if self.stderr is not None else ""
        without, with_it = (
            ("bare", "with memory and LoRA") if self.lora else ("without the memory", "with it")
        )
        return (
            f"{self.without:.4f} nats a token {without}, {self.with_memory:.4f} {with_it} "
            f"({self.with_memory - self.without:+.4f}{error}, over {self.tokens:,} tokens of "
            f"{_counted(self.documents)})"
        )


def finetune(config: FinetuneConfig, console: Console) -> Measured:
    """Train a memory and save it to `config.out` with a model card. Returns the held-out losses.

    Ctrl-C or SIGTERM ends the training early: the step is finished, what has been learned by then
    is saved, and KeyboardInterrupt raised (`signals.Terminated` for SIGTERM); a second one stops at
    once. Raises DataUnavailable for a model, tokenizer, text or package that is not there,
    InputError for too little text, ConfigError for settings that the model does not allow or that
    do not fit into the RAM, WriteFailed where `config.out` cannot be written or its disk has too
    little space.
    """
    with terminable():
        return _finetune(config, console)


def _finetune(config: FinetuneConfig, console: Console) -> Measured:
    if config.lora is not None:
        require_peft("LoRA adapters")  # before anything takes long
    tokenizer = load_tokenizer(config.model)
    training, heldout = _documents(config, tokenizer)
    start = _start_id(tokenizer)
    batches = Batches(training, start, batch=config.batch, tokens=config.length, seed=config.seed)
    unseen = Batches(heldout, start, batch=config.batch, tokens=config.length, seed=None)
    tokens = sum(map(len, training))
    _say(
        console,
        f"{config.data}: {_documents_of(training)} to train on, {_documents_of(heldout)} held out",
    )
    model, dtype = load_model(config.model, config.dtype)
    model.requires_grad_(False)
    if hasattr(model, "engraphy"):
        raise ConfigError(
            f"{config.model}: expected a model without a memory, found one saved with its memory"
        )
    vocab = VocabMap.from_tokenizer(tokenizer, raw_size=model.config.get_text_config().vocab_size)
    memory_config = _memory_config(config, model, tokenizer, vocab, tokens)
    _tell(model, dtype, memory_config, config.out, console)
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
        _save(model, memory, config, console, f"Trained on {name}; interrupted, not measured.")
        raise
    _, error = mean_with_error(after - before, owners)
    found = Measured(
        float(before.mean()),
        float(after.mean()),
        error,
        len(before),
        len(np.unique(owners)),
        config.lora is not None,
    )
    _say(console, f"held-out loss: {found}")
    note = f"Trained on {name} with the base model frozen. On held-out text of it: {found}."
    with stopping() as stop:  # what an hour went into is saved first
        _save(model, memory, config, console, note)
    if stop:
        raise stop.error("all had been saved")
    return found


def load_texts(source: str) -> tuple[str, ...]:
    """The documents of FinetuneConfig.data, none of them empty. Raises DataUnavailable or
    InputError."""
    path = Path(source)
    if path.suffix != ".jsonl":
        return load_documents(source).texts
    try:
        # Line feeds alone divide: JSON strings may hold U+2028, U+0085 and others that splitlines
        # cuts at.
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise DataUnavailable(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, found {error}") from None
    texts = [
        _text(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()
    ]
    if not any(text.strip() for text in texts):
        raise DataUnavailable(f"{path}: expected documents, found no text")
    return tuple(text for text in texts if text.strip())


def _text(path: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'{path}, line {number}: expected a JSON object with "text", '
            f"found {type(error).__name__}: {error}"
        ) from None
    if not isinstance(text, str):
        raise InputError(
            f'{path}, line {number}: expected a string as "text", found {type(text).__name__}'
        )
    return text


def _documents(config: FinetuneConfig, tokenizer: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ids of the documents to train on and of those held out; of a single document, its end."""
    texts = load_texts(config.data)
    if len(set(texts)) > 1:
        training, heldout = (
            _encode(tokenizer, part) for part in split_documents(texts, config.heldout, config.seed)
        )
    else:
        ids = np.concatenate([np.empty(0, np.int32), *_encode(tokenizer, texts[:1])])
        cut = len(ids) - max(1, round(config.heldout * len(ids)))
        training, heldout = [ids[:cut]], [ids[cut:][:_HELDOUT_TOKENS]]
    total, needed = sum(len(ids) + 1 for ids in training), config.batch * config.length
    if total < needed or not sum(map(len, heldout)):
        raise InputError(
            f"{config.data}: expected at least {needed:,} tokens to train on, a step of {config.batch} "
            f"rows of {config.length}, and some to hold out, found {total:,}; give more text, or a "
            "smaller batch or length"
        )
    before = np.cumsum([0, *map(len, heldout)])[:-1]
    return training, [
        ids for ids, begin in zip(heldout, before, strict=True) if begin < _HELDOUT_TOKENS
    ]


def _encode(tokenizer: Any, texts: Any) -> list[np.ndarray]:
    found = tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
    )["input_ids"]
    return [np.array(ids, dtype=np.int32) for ids in found if len(ids)]


def _start_id(tokenizer: Any) -> int:
    """The token that a document begins with."""
    for found in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if found is not None:
            return found
    raise ConfigError(
        "tokenizer: expected a BOS or EOS token to begin documents with, found neither"
    )


def _memory_config(
    config: FinetuneConfig, model: Any, tokenizer: Any, vocab: VocabMap, tokens: int
) -> EngramConfig:
    inner = model.config.get_text_config()
    rows = (
        min(5 * inner.vocab_size, tokens) if config.rows_per_head is None else config.rows_per_head
    )
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return EngramConfig.for_model(
        inner, config.layers, rows_per_head=rows, vocab_size=len(vocab), pad_id=pad
    )


def _tell(
    model: Any, dtype: DtypeChoice, config: EngramConfig, out: Path, console: Console
) -> None:
    """Say what the model is and what the memory takes. Raises ConfigError if it does not fit while
    it trains, WriteFailed if not on disk."""
    takes, free = cost(config), free_memory()
    moments = 2 * config.table_parameters() * torch.float32.itemsize
    parameters = f"{model.num_parameters():,} parameters"
    _say(console, f"{type(model).__name__}: {parameters}, frozen, on {model.device}")
    _say(console, str(dtype))
    _say(
        console,
        f"memory in layers {list(config.hash.layer_ids)}: {takes}; {moments / 1e6:,.1f} MB more while it "
        "trains",
    )
    if free is not None and takes.table_bytes + moments > free:
        raise ConfigError(
            f"training the memory takes {(takes.table_bytes + moments) / 1e6:,.1f} MB of RAM, "
            f"{free / 1e6:,.1f} MB are free: give fewer rows_per_head or layers; {VARIABLE} says "
            "otherwise"
        )
    check_folder(out, takes.table_bytes + takes.dense_bytes)


def _adapted(model: Any, config: FinetuneConfig, console: Console) -> Any:
    """The PEFT model around a frozen one. Its adapters add nothing yet."""
    assert config.lora is not None
    torch.manual_seed(config.seed)
    adapted = with_lora(model, config.lora)
    count = sum(parameter.numel() for parameter in _adapter_parameters(adapted))
    _say(
        console,
        f"LoRA of rank {config.lora}: {count:,} parameters, trained together with the memory",
    )
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
    """The backbone stays in eval mode: no dropout beside a memory that is to fit the model as it is
    served."""
    model.eval()
    memory.train()
    groups: list[dict[str, Any]] = [{"params": list(memory.parameters())}]
    if config.lora is not None:
        groups.append({"params": _adapter_parameters(model), "lr": config.lr * LORA_RATE})
    dense = torch.optim.AdamW(groups, lr=config.lr, weight_decay=0.0)
    pair = OptimizerPair(dense, RowAdam(memory, config.lr * ROW_RATE), warmup_cosine(), clip=1.0)
    size = batches.tokens_per_step
    steps = len(batches) if config.tokens is None else math.ceil(config.tokens / size)
    with stopping() as stop:
        for step in range(1, steps + 1):
            began = time.perf_counter()
            losses_M, _ = _token_losses(model, batches[step - 1], batches.end_id)
            loss = losses_M.mean()
            loss.backward()
            norm = pair.step(step / steps)
            report(
                StepReport(
                    step,
                    steps,
                    step * size,
                    loss.item(),
                    norm,
                    size / (time.perf_counter() - began),
                )
            )
            if stop:
                raise stop.error(f"stopped at step {step} of {steps}")
    model.eval()


@torch.no_grad()
def _losses(model: Any, batches: Batches) -> tuple[np.ndarray, np.ndarray]:
    """Nats of every target of all batches, f64 [M], and its document, int64 [M]."""
    losses, owners, seen = [], [], 0
    for batch in batches:
        losses_M, kept_BT = _token_losses(model, batch, batches.end_id)
        owner_BT = seen + (batch.ids_BT == batches.end_id).flatten().cumsum(0).view_as(batch.ids_BT)
        seen = int(owner_BT.max())
        losses.append(losses_M.double().cpu().numpy())
        owners.append(owner_BT[kept_BT].numpy())
    return np.concatenate(losses), np.concatenate(owners)


def _token_losses(model: Any, batch: Batch, start: int) -> tuple[Tensor, Tensor]:
    """Nats of each target, f32 [M], and which positions have one, bool [B, T]: all but those before
    a document's start, which is a mark of the packing and not text."""
    ids_BT, targets_BT, starts_BT = batch
    kept_BT = (targets_BT != start) & (targets_BT != IGNORED)
    at_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    positions_BT = at_BT - torch.where(starts_BT, at_BT, 0).cummax(1).values
    ids_BT, positions_BT = ids_BT.to(model.device), positions_BT.to(model.device)
    logits_BTV = model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).logits
    targets_BT = targets_BT.where(kept_BT, IGNORED).to(logits_BTV.device)
    losses_N = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="none"
    )
    return losses_N[kept_BT.flatten().to(losses_N.device)], kept_BT


def _save(
    model: Any, memory: EngramMemory, config: FinetuneConfig, console: Console, note: str
) -> None:
    with publish_folder(config.out, last="memory.json") as folder:
        saved.write(memory, folder, "copy")
        if config.lora is not None:  # neither is right without the other
            model.save_pretrained(folder / ADAPTER, save_embedding_layers=False)
    write_card(config.out, memory, config.model, note=note)
    _say(
        console,
        f"saved: {config.out}\n"
        f'try it: engraphy generate {config.model} {config.out} "..." --show-gates',
    )


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, markup=False)


def _documents_of(documents: list[np.ndarray]) -> str:
    return f"{_counted(len(documents))} of {sum(map(len, documents)):,} tokens"


def _counted(documents: int) -> str:
    return f"{documents:,} document{'s' if documents > 1 else ''}"
