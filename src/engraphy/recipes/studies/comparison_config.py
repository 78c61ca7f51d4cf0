"""The settings of a comparison, and its runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from ...data.corpus import CorpusConfig
from ...data.mix import require_books
from ...errors import ConfigError
from .backbones import Backbone, backbone
from .queue import Job as StudyJob
from .study import check_seeds


@dataclass(frozen=True)
class Job(StudyJob):
    """One run.

    Attributes:
        tokens: Training tokens.
        data: As `load_documents` takes it.
        backbone: Name of the backbone.
        rho: As in `ComparisonConfig`.
    """

    tokens: int
    data: str
    backbone: str
    rho: float | None = None


@dataclass(frozen=True)
class ComparisonConfig:
    """Settings of a comparison.

    Attributes:
        seeds: The first one chooses the learning rates, if there are several.
        tokens: Training tokens of each run.
        data: As `load_documents` takes it.
        backbone: Name of the backbone, in BACKBONES.
        rates: Learning rates that each arm tries; one = no search.
        rho: Share of the experts that a memory leaves, unless an arm says otherwise; None = the
            backbone's.
        arm_rates: (arm, learning rate) of arms whose rate is known: they search none.

    Raises:
        ConfigError: A setting is invalid.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    tokens: int = 4_000_000
    data: str = "mix"
    backbone: str = "base"
    rates: tuple[float, ...] = (4e-3, 6e-3, 8e-3)
    rho: float | None = None
    arm_rates: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        check_seeds(self.seeds)
        backbone(self.backbone)
        if self.tokens < 1:
            raise ConfigError(f"tokens: expected 1 or more, found {self.tokens}")
        require_books(self.data, self.tokens)
        if not self.rates or not _valid(self.rates) or list(self.rates) != sorted(set(self.rates)):
            raise ConfigError(f"rates: expected ascending rates above 0, found {self.rates}")
        known = dict(self.arm_rates)
        if len(known) < len(self.arm_rates) or not _valid(known.values()):
            raise ConfigError(f"arm_rates: expected one above 0 an arm, found {self.arm_rates}")
        if self.rho is not None and not 0 < self.rho < 1:
            raise ConfigError(f"rho: expected a share between 0 and 1, found {self.rho}")

    @classmethod
    def smallest(cls) -> Self:
        """Runs in seconds. It shows that a study works, and nothing else."""
        return cls((0, 1), 2_048, "mix", "smallest", (3e-3,))

    @property
    def base(self) -> Backbone:
        """The backbone."""
        base = backbone(self.backbone)
        return base if self.rho is None else dataclasses.replace(base, rho=self.rho)

    def job(self, arm: str, seed: int, lr: float) -> Job:
        return Job(arm, seed, lr, self.tokens, self.data, self.backbone, self.rho)

    def corpus(self, seed: int) -> CorpusConfig:
        """The text of a seed."""
        base = self.base
        return CorpusConfig(
            self.data,
            vocab_size=base.moe.vocab_size,
            batch=base.batch,
            length=base.length,
            seed=seed,
        )


def _valid(rates: Iterable[float]) -> bool:
    return all(0 < lr < math.inf for lr in rates)
