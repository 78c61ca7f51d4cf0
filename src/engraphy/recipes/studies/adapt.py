"""`engraphy adapt-study`: what a memory adds to a frozen model on a domain, what it forgets, and
LoRA beside it.

Every arm trains on the same tokens of the domain in the same order; measured are text of the domain
held out, general text never seen, and multiple-choice items. Each arm runs at each of its rates on
the first seed, and beyond the best one where that is the lowest or highest tried; then on the other
seeds at the rate of the lowest held-out loss. Given rates are not searched. A resumable queue, one
small JSON file a run.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ... import __version__, _native
from ...addresses.vocab import VocabMap
from ...data import domains
from ...data.packing import Batch, Batches
from ...errors import ConfigError
from ...eval import choices
from ...eval.bands import NgramCounts, loss_by_band
from ...eval.losses import Losses, mean_with_error
from ...hf.backbone import unwrapped
from ...lm.cross_entropy import mean_cross_entropy, token_cross_entropy
from ...system import cpu, provenance
from ...system.files import make_folder
from .adapt_arms import LABELS, Adapted, adapt, ladder, memory_config, merged_hash, rates_to_try
from .queue import read_json, run_missing, write_result

CONTEXT, BATCH = 256, 1
GENERAL_CHARACTERS = 45_000  # some 11,000 tokens: a third of what a run takes is measuring
BASE = "base"

Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One run. arm: of LABELS, or BASE: the model as it is. tokens: of training. model: its
    folder's name."""

    arm: str
    seed: int
    lr: float
    tokens: int
    rows_per_head: int
    model: str

    @property
    def name(self) -> str:
        """Name of its result file."""
        return (
            f"{BASE}.json" if self.arm == BASE else f"{self.arm}-seed{self.seed}-lr{self.lr:g}.json"
        )


@dataclass(frozen=True)
class AdaptConfig:
    """model: a folder of a transformers model. general: text that it never saw. seeds: the first
    one chooses rates. rates: (arm, learning rate) of the arms that run, none other and no search;
    () = all arms, each searches its own."""

    model: Path
    general: Path
    tokens: int = 100_000
    rows_per_head: int = 20_000
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(
                f"seeds: expected one or more, all different and none negative, found {self.seeds}"
            )
        if self.tokens < BATCH * CONTEXT:
            raise ConfigError(
                f"tokens: expected at least a step of {BATCH * CONTEXT}, found {self.tokens}"
            )
        for arm, lr in self.rates:
            ladder(arm)
            if not 0 < lr < math.inf:
                raise ConfigError(f"rate of {arm}: expected a positive number, found {lr}")
        if len(dict(self.rates)) < len(self.rates):
            raise ConfigError(f"rates: expected one an arm, found {self.rates}")

    def job(self, arm: str, seed: int, lr: float) -> Job:
        return Job(arm, seed, lr, self.tokens, self.rows_per_head, self.model.name)

    def base_job(self) -> Job:
        """The model before anything is trained."""
        return dataclasses.replace(self.job(BASE, 0, 0.0), tokens=0)

    def ran(self, arm: str, found: Mapping[Job, Result]) -> dict[float, float]:
        """Held-out loss of the domain on the first seed by rate, those that are there."""
        jobs = {lr: self.job(arm, self.seeds[0], lr) for lr in ladder(arm)}
        return {lr: found[job]["domain"]["loss"] for lr, job in jobs.items() if job in found}


def adapt_study(
    config: AdaptConfig, out: Path, workers: int, report: Callable[[str], None]
) -> None:
    """Run what is missing, `workers` at a time. Raises ConfigError for results of other settings in
    `out`."""
    if workers < 1:
        raise ConfigError(f"workers: expected 1 or more, found {workers}")
    make_folder(out)
    read_results([config.base_job()], out)
    run_missing(
        lambda: [config.base_job(), *all_jobs(config, out)],
        out,
        workers,
        partial(run_job, config=config, out=out),
        report,
    )


def all_jobs(config: AdaptConfig, out: Path) -> list[Job]:
    """All runs that the results in `out` ask for, arm by arm; of given rates seed by seed. Raises
    as `read_results`."""
    if config.rates:
        given = [config.job(arm, seed, lr) for seed in config.seeds for arm, lr in config.rates]
        read_results(given, out)
        return given
    found = read_results(
        [config.job(arm, config.seeds[0], lr) for arm in LABELS for lr in ladder(arm)], out
    )
    chosen = chosen_rates(config, found)
    jobs = [
        config.job(arm, seed, lr)
        for arm in LABELS
        for seed, lr in [
            *((config.seeds[0], lr) for lr in rates_to_try(arm, config.ran(arm, found))),
            *((seed, chosen[arm]) for seed in config.seeds[1:] if arm in chosen),
        ]
    ]
    read_results(jobs, out)
    return jobs


def chosen_rates(config: AdaptConfig, found: Mapping[Job, Result]) -> dict[str, float]:
    """The rate of the lowest held-out loss on the first seed, of each arm that has run at all rates
    that it tries; or the rates that are given."""
    chosen = dict(config.rates)
    if chosen:
        return chosen
    for arm in LABELS:
        ran = config.ran(arm, found)
        tried = rates_to_try(arm, ran)
        if all(lr in ran for lr in tried):
            chosen[arm] = min(tried, key=lambda lr: ran[lr])
    return chosen


def read_results(jobs: Sequence[Job], out: Path) -> dict[Job, Result]:
    """The results that are there. Raises ConfigError for a damaged file and for one of other
    settings."""
    return {
        job: read_json(out / job.name, asdict(job)) for job in jobs if (out / job.name).exists()
    }


@dataclass(frozen=True)
class Texts:
    """Everything a run reads, as token ids. items: named sets of multiple-choice items."""

    training: list[np.ndarray]
    heldout: list[np.ndarray]
    general: list[np.ndarray]
    items: dict[str, list[choices.Item]]
    end_id: int
    about: dict[str, Any]


def load_texts(general: Path, tokenizer: Any) -> Texts:
    """The medical domain, general text and the items; the same for every seed and arm."""
    domain, seen = domains.medical(), domains.general(general, GENERAL_CHARACTERS)
    kept, unseen = domains.medical_categories()
    items = {
        "domain, trained": choices.medical_items(kept),
        "domain, held out": choices.medical_items(unseen),
        "general": choices.geography_items() + choices.wikipedia_items(),
    }
    training, heldout, other = (
        [np.array(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        for texts in (domain.training, domain.heldout, seen)
    )
    about = {
        **domain.about,
        "general": domains.describe(seen),
        "tokens": {
            name: sum(map(len, part))
            for name, part in (("training", training), ("heldout", heldout), ("general", other))
        },
    }
    # What divides documents where a model was pre-trained; the EOS of a chat model ends a turn.
    end_id = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id)
    return Texts(training, heldout, other, items, end_id, about)


def run_job(job: Job, config: AdaptConfig, out: Path) -> str:
    """One run: train, measure, write `out`/NAME.json. Returns a line to print."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    commit = provenance.commit()
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    texts = load_texts(config.general, tokenizer)
    result: Result = {"job": asdict(job), "text": texts.about}
    adapted = None
    if job.arm != BASE:
        vocab = VocabMap.from_tokenizer(tokenizer, raw_size=model.config.vocab_size)
        adapted = adapt(model, vocab, job.arm, job.rows_per_head, job.seed)
        result |= train(adapted, texts, job)
        result["memory"] = merged_hash(memory_config(model.config, vocab, job.rows_per_head))
    result |= measure(adapted.model if adapted else model, tokenizer, texts)
    if "diverged_at" in result:
        result["domain"]["loss"] = result["general"]["loss"] = math.inf
    result |= {
        "version": __version__,
        "commit": commit,
        "machine": f"{cpu.name()}, {_native.level()}, one thread, float32",
    }
    write_result(result, out / job.name)
    return (
        f"{job.name}: domain {result['domain']['loss']:.4f}, general {result['general']['loss']:.4f}, "
        f"{result.get('minutes', 0)} minutes"
    )


def train(adapted: Adapted, texts: Texts, job: Job) -> Result:
    """Train on `job.tokens` tokens of the domain, shuffled by the seed, up to the first step whose
    loss is not finite. Returns sizes, rows used, curve, the minutes of processor time, and that
    step where there was one."""
    batches = Batches(texts.training, texts.end_id, batch=BATCH, tokens=CONTEXT, seed=job.seed)
    steps, losses, used = job.tokens // batches.tokens_per_step, [], dict[int, set[int]]()
    diverged: dict[str, int] = {}
    pair = adapted.optimizers(job.lr)
    adapted.model.train()
    began = time.process_time()
    for step in range(steps):
        ids_BT, targets_BT, starts_BT = batches[step]
        x_BTD, head = hidden(adapted.model, ids_BT, starts_BT)
        loss = mean_cross_entropy(x_BTD.flatten(0, 1), head, targets_BT.flatten())
        if not torch.isfinite(loss):
            diverged["diverged_at"] = step
            break
        loss.backward()
        if adapted.memory is not None:
            for part in adapted.memory.row_grads:
                used.setdefault(part.layer, set()).update(np.unique(part.ids).tolist())
        pair.step(step / steps)
        losses.append(float(loss.detach()))
    tenth = max(1, steps // 10)
    dim = adapted.memory.config.dim if adapted.memory is not None else 0
    return {
        "sizes": {
            **asdict(adapted.sizes),
            "bytes": adapted.sizes.bytes,
            "table_updated": sum(map(len, used.values())) * dim,
        },
        "epochs": round(steps / len(batches), 3),
        "steps": steps,
        "step_tokens": batches.tokens_per_step,
        "training_curve": [
            round(float(np.mean(losses[i : i + tenth])), 4) for i in range(0, len(losses), tenth)
        ],
        "minutes": round((time.process_time() - began) / 60, 2),
        **diverged,
    }


def measure(model: Any, tokenizer: Any, texts: Texts) -> Result:
    """Losses on held-out text of the domain (by trigram frequency too) and on general text; items."""
    inner: Any = unwrapped(model.eval())
    counts = NgramCounts(texts.training, texts.end_id, inner.config.vocab_size)
    told: Result = {}
    for name, documents in (("domain", texts.heldout), ("general", texts.general)):
        batches = Batches(documents, texts.end_id, batch=4, tokens=CONTEXT, seed=None)
        losses = Losses(partial(token_losses, model), batches, counts)
        mean, error = mean_with_error(losses.losses, losses.documents)
        bands = loss_by_band(losses.losses, losses.counts)
        told[name] = {
            "loss": mean,
            "stderr": error,
            "tokens": len(losses.losses),
            "by_frequency": {
                band: {"loss": part.loss, "tokens": part.targets}
                for band, part in bands.items()
                if part.targets
            },
        }
    scores = {name: choices.score(model, tokenizer, items) for name, items in texts.items.items()}
    told["items"] = {
        name: {key: value for key, value in score.items() if key != "each"}
        for name, score in scores.items()
    }
    return told


def token_losses(model: Any, batch: Batch) -> torch.Tensor:
    """Nats of each target, f32 [B, T], 0 where it is IGNORED. Has no gradient."""
    ids_BT, targets_BT, starts_BT = batch
    x_BTD, head = hidden(model, ids_BT, starts_BT)
    losses_N = token_cross_entropy(x_BTD.flatten(0, 1), head, targets_BT.flatten())
    return losses_N.view_as(targets_BT)


def hidden(
    model: Any, ids_BT: torch.Tensor, starts_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the head takes, [B, T, D], and the head's weight. Positions begin anew at each start:
    packed documents do not see each other."""
    at = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    positions = at - torch.where(starts_BT, at, 0).cummax(1).values
    inner: Any = unwrapped(model)
    out = inner.get_decoder()(input_ids=ids_BT, position_ids=positions, use_cache=False)
    return out.last_hidden_state, inner.get_output_embeddings().weight
