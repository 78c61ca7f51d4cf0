"""What a study measures: an arm that has been trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ...data.corpus import Corpus
from ...eval.bands import NgramCounts
from ...eval.losses import Losses
from ...lm import LM
from ...lm.loop import Run
from .arm_recipe import ArmRecipe, Frequent
from .comparison_config import Job


class Trained(NamedTuple):
    """A trained arm.

    Attributes:
        model: The model, in eval mode.
        run: Its training, which has ended.
        corpus: The text that it was trained on.
        frequent: The most frequent n-grams of that text.
        counts: N-grams of the part of it that all arms of this many tokens see.
        losses: On all held-out tokens, by these counts.
        partner: The name of another arm -> its training, of the same seed and rate, at its end.
        config: Of the study.
        job: The run.
        recipe: The arm.
        folder: Where the run leaves its checkpoints.
    """

    model: LM
    run: Run
    corpus: Corpus
    frequent: Frequent
    counts: NgramCounts
    losses: Losses
    partner: Callable[[str], Run]
    config: Any
    job: Job
    recipe: ArmRecipe
    folder: Path
