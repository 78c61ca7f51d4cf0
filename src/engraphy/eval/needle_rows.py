"""Training text with needles in it: some rows of each batch hold a text, a question and its
answers."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch

from ..data.packing import IGNORED, Batch, Batches
from ..errors import ConfigError
from .needle_cases import TASKS, NeedleTexts


class NeedleRows:
    """Batches by step, some of whose rows are needle texts. `lm.Run` trains on them as on
    `Batches`.

    A needle row is one document: a text, its question and the answers, which are the only targets.
    Its task and its facts are drawn anew from seed, step and row.

    Args:
        batches: The text, with a seed.
        texts: Of the needles, with the same tokenizer.
        share: Of the rows that are needle texts, 0 to 1. The first rows of a batch are replaced,
            now and then one more, so that the share is met over many steps.
        seed: Of tasks and facts. `needle_cases` never draws the same.

    Raises:
        ConfigError: The share is out of range, or the batches are held-out text.
        InputError: The rows are too short for the needles.
    """

    def __init__(self, batches: Batches, texts: NeedleTexts, share: float, seed: int):
        if not 0 <= share <= 1:
            raise ConfigError(f"share: expected 0 to 1, found {share}")
        if batches.seed is None:
            raise ConfigError("batches: expected training batches, found held-out text")
        self.batches = batches
        self.texts = texts
        self.share = share
        self.seed = seed
        for task in TASKS:
            self._row(task, np.random.default_rng(seed))

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a batch."""
        return self.batches.tokens_per_step

    @property
    def digest(self) -> str:
        """SHA-256 of what the batches depend on, the tokenizer's ids of the needles included."""
        sample = self._row(TASKS[0], np.random.default_rng(self.seed))[0]
        facts = (
            f"{self.batches.digest} {self.share} {self.seed} {self.texts.items} {sample.tolist()}"
        )
        return hashlib.sha256(facts.encode()).hexdigest()

    def __getitem__(self, step: int) -> Batch:
        batch = self.batches[step]
        for row in range(self._rows_until(step + 1) - self._rows_until(step)):
            random = np.random.default_rng([self.seed, len(TASKS), step, row])
            ids, is_answer = self._row(TASKS[int(random.integers(len(TASKS)))], random)
            line = torch.from_numpy(ids)
            batch.ids_BT[row] = line[:-1]
            batch.targets_BT[row] = line[1:]
            batch.targets_BT[row, ~torch.from_numpy(is_answer[1:])] = IGNORED
            batch.starts_BT[row] = False
            batch.starts_BT[row, 0] = True
        return batch

    def _rows_until(self, step: int) -> int:
        """Needle rows of all steps before this one."""
        return math.floor(step * self.share * self.batches.batch + 1e-9)

    def _row(self, task: str, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return self.texts.answered(task, self.batches.tokens + 1, random)
