"""One run of the adaptation study: its texts, and what is measured."""

from __future__ import annotations

from dataclasses import dataclass
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
from ...lm.cross_entropy import token_cross_entropy
from .queue import Job as StudyJob
from .queue import Result

CONTEXT = 256  # tokens of a row
BATCH = 1  # rows of a training step
BASE = "base"
"""Arm of the job that trains nothing."""
GENERAL_CHARACTERS = 45_000  # some 11,000 tokens: a third of what a run takes is measuring


@dataclass(frozen=True)
class Job(StudyJob):
    """One run.

    Attributes:
        arm: One of LABELS, or BASE: the model as it is.
        tokens: Training tokens.
        rows_per_head: Rows per head of the memory.
        model: Name of its folder.
    """

    tokens: int
    rows_per_head: int
    model: str

    @property
    def name(self) -> str:
        """Name of the result file."""
        return f"{BASE}.json" if self.arm == BASE else super().name


@dataclass(frozen=True)
class Texts:
    """Everything that a run reads.

    Attributes:
        training: Token ids of the domain's documents to train on.
        heldout: Token ids of the domain's documents held out.
        general: Token ids of text that has nothing to do with the domain.
        items: Multiple-choice items, by the name of their set.
        end_id: Id of the token that divides documents.
        about: What a result says about the texts.
    """

    training: list[np.ndarray]
    heldout: list[np.ndarray]
    general: list[np.ndarray]
    items: dict[str, list[choices.Item]]
    end_id: int
    about: dict[str, Any]


def load_texts(general: Path, tokenizer: Any) -> Texts:
    """The medical domain, general text and the items. They are the same for every seed and arm.

    Args:
        general: File or folder of general text.
        tokenizer: Tokenizer of the model.
    """
    domain = domains.medical()
    passages = domains.general(general, GENERAL_CHARACTERS)
    trained, unseen = domains.medical_categories()
    items = {
        "domain, trained": choices.medical_items(trained),
        "domain, held out": choices.medical_items(unseen),
        "general": choices.geography_items() + choices.wikipedia_items(),
    }
    ids = {
        "training": _encoded(tokenizer, domain.training),
        "heldout": _encoded(tokenizer, domain.heldout),
        "general": _encoded(tokenizer, passages),
    }
    about = {
        **domain.about,
        "general": domains.describe(passages),
        "tokens": {name: sum(map(len, documents)) for name, documents in ids.items()},
    }
    # What divided documents in pre-training. The EOS of a chat model ends a turn instead.
    end_id = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id)
    return Texts(ids["training"], ids["heldout"], ids["general"], items, end_id, about)


def _encoded(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    return [np.array(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def measure(model: Any, tokenizer: Any, texts: Texts) -> Result:
    """Losses on held-out text of the domain and on general text, each by trigram frequency too, and
    the scores of the items."""
    inner: Any = unwrapped(model.eval())
    counts = NgramCounts(texts.training, texts.end_id, inner.config.vocab_size)
    result: Result = {}
    for name, documents in (("domain", texts.heldout), ("general", texts.general)):
        batches = Batches(documents, texts.end_id, batch=4, tokens=CONTEXT, seed=None)
        losses = Losses(partial(token_losses, model), batches, counts)
        mean, error = mean_with_error(losses.losses, losses.documents)
        bands = loss_by_band(losses.losses, losses.counts)
        by_frequency = {
            band: {"loss": part.loss, "tokens": part.targets}
            for band, part in bands.items()
            if part.targets
        }
        result[name] = {
            "loss": mean,
            "stderr": error,
            "tokens": len(losses.losses),
            "by_frequency": by_frequency,
        }
    result["items"] = {}
    for name, items in texts.items.items():
        score = choices.score(model, tokenizer, items)
        del score["each"]
        result["items"][name] = score
    return result


def token_losses(model: Any, batch: Batch) -> torch.Tensor:
    """Nats of each target, f32 [B, T], without a gradient; 0 where the target is IGNORED."""
    ids_BT, targets_BT, starts_BT = batch
    x_BTD, head = hidden(model, ids_BT, starts_BT)
    losses_N = token_cross_entropy(x_BTD.flatten(0, 1), head, targets_BT.flatten())
    return losses_N.view_as(targets_BT)


def hidden(
    model: Any, ids_BT: torch.Tensor, starts_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Input of the head, [B, T, D], and its weight. Positions begin anew at each start, so that
    packed documents do not see each other."""
    at = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    positions = at - torch.where(starts_BT, at, 0).cummax(1).values
    inner: Any = unwrapped(model)
    out = inner.get_decoder()(input_ids=ids_BT, position_ids=positions, use_cache=False)
    return out.last_hidden_state, inner.get_output_embeddings().weight
