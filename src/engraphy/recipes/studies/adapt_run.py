"""One run of the adaptation study: its texts, training on the domain, and what is measured."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...data import domains
from ...data.packing import Batch, Batches
from ...eval import choices
from ...eval.bands import NgramCounts, loss_by_band
from ...eval.losses import Losses, mean_with_error
from ...hf.backbone import unwrapped
from ...lm.cross_entropy import mean_cross_entropy, token_cross_entropy
from .adapt_arms import Adapted
from .queue import Job, Result

CONTEXT, BATCH = 256, 1
GENERAL_CHARACTERS = 45_000  # some 11,000 tokens: a third of what a run takes is measuring


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
