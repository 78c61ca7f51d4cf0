"""Does a hot tier help? ("A Collision-Free Hot-Tier Extension for Engram-Style Conditional Memory",
arXiv 2601.16531.)

The most frequent n-grams of the training text get rows of their own, and as many rows fewer are
hashed. Losses and gates are split by route: whether the n-grams that end at a token are among the
frequent ones. All arms, that without a memory too, are split by the same n-grams, since tokens
after frequent n-grams differ from others in more than the rows that they read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict

import numpy as np

from ...addresses.hot import HotIndex
from ...analysis.routes import RoutedText, by_route, gate_report
from ...data.corpus import Corpus
from ...lm import LM, MemorySizes
from ...lm.controls import NoisyRows
from ...lm.loop import Run, Watch
from ..progress import watched
from .arm_recipe import ArmRecipe, Frequent
from .backbones import Backbone
from .comparison import Comparison, ComparisonConfig
from .frequent import ngram_addresser
from .hot_collisions import collisions
from .hot_tables import tables
from .queue import Result, ResultsByJob
from .rates import Runs
from .trained import Trained

HEADS = 2
RHO = 0.5
"""Share of the experts that a memory leaves: the table is then as large beside the text as the
paper's."""
SHARE = 0.2
"""Share of the rows that the paper moves to hot n-grams: 100,000 of 500,000."""
SWEEP = (0.01, 0.05, 0.5)
"""Other shares."""
COLD = (0.2, 0.4, 1.4)
"""Rows that are hashed beside as many hot n-grams, as a share of all rows; 0.8 would be equal. The
last one has the paper's 800,000 slots for 500,000."""
FINGERPRINT_BITS = 8
POINTS = 20
"""Times at which losses are split by route while an arm trains; 4 in the smallest form."""
WATCHED = 8
"""Held-out batches that are split then."""
ROUTED = 64
"""Held-out batches that are split at the end: all, unless batches are tiny."""
MAIN = ("none", "hash", "hot")
"""Arms of all seeds."""


class HotConfig(ComparisonConfig):
    """Settings of the study."""

    @property
    def base(self) -> Backbone:
        base = super().base
        return dataclasses.replace(base, memory=_sizes(base))

    @property
    def every(self) -> int:
        """Steps between two times at which losses are split by route."""
        steps = math.ceil(self.tokens / (self.base.batch * self.base.length))
        points = 4 if self.backbone == "smallest" else POINTS
        return max(1, steps // points)


def _sizes(backbone: Backbone) -> MemorySizes:
    return dataclasses.replace(backbone.memory, heads=HEADS)


def _arms(backbone: Backbone) -> Mapping[str, ArmRecipe]:
    sizes = _sizes(backbone)

    def hashed(label: str, cold: float | None = None, **fields: object) -> ArmRecipe:
        memory = dataclasses.replace(sizes, cold=cold)
        return ArmRecipe(label, rho=RHO, memory=memory).changed(label, **fields)

    def hot(label: str, share: float = SHARE, cold: float | None = None, **fields: object):
        memory = dataclasses.replace(sizes, hot=share, cold=cold)
        return ArmRecipe(label, rho=RHO, memory=memory).changed(label, **fields)

    name = "collision-free"
    return {
        "none": ArmRecipe("no memory", "moe"),
        "hash": hashed("hash"),
        "hot": hot(name),
        **{f"hot-{share:.0%}"[:-1]: hot(f"{name}, {share:.0%} hot", share) for share in SWEEP},
        **{
            f"cold-{round(100 * cold)}": hot(f"{name}, {cold:.0%} cold", cold=cold) for cold in COLD
        },
        "double": hashed("hash, twice the rows", 2.0),
        "fingerprint": hot(
            f"{FINGERPRINT_BITS}-bit fingerprints", fingerprint_bits=FINGERPRINT_BITS
        ),
        "noise": hot(f"{name}, noise of collisions", control="noise"),
        "private": hot("hash, hot rows on top", cold=1.0),
        "dropout": hot(f"{name}, dropout of rows", control="dropout"),
        "hash-dropout": hashed("hash, dropout of rows", control="dropout"),
    }


def _asked(config: HotConfig, results: ResultsByJob) -> Mapping[str, int]:
    """All seeds of the main arms, one of the others."""
    return {arm: len(config.seeds) if arm in MAIN else 1 for arm in _arms(config.base)}


def _like(backbone: Backbone) -> Mapping[str, str]:
    """Which arms run at whose rate: those that hash all n-grams, and those that do not."""
    others = [arm for arm in _arms(backbone) if arm not in MAIN]
    return {arm: "hash" if arm in ("double", "hash-dropout") else "hot" for arm in others}


def _frequent(config: HotConfig, corpus: Corpus, frequent: Frequent) -> HotIndex:
    """The n-grams that divide the routes of all arms: the hot ones of the main arm."""
    arm = _arms(config.base)["hot"].arm(config.base, corpus.vocab, corpus.end_id)
    return HotIndex.build(frequent(arm.hot))


def _routed(config: HotConfig, corpus: Corpus, frequent: Frequent, most: int) -> RoutedText:
    """Held-out batches, at most so many of them, evenly spread."""
    batches = corpus.heldout_batches()
    count = min(most, len(batches))
    chosen = [batches[place * len(batches) // count] for place in range(count)]
    index = _frequent(config, corpus, frequent)
    return RoutedText.of(chosen, ngram_addresser(corpus, index.orders), index)


def _watch(corpus: Corpus, config: HotConfig, frequent: Frequent) -> Watch:
    text = _routed(config, corpus, frequent, WATCHED)
    return Watch(config.every, lambda model: by_route(model, text))


def _begin(model: LM, recipe: ArmRecipe, frequent: Frequent, partner: Callable[[str], Run]) -> None:
    """Measures the noise of an arm that has some, on the arm that hashes all n-grams."""
    memory = model.memory
    if isinstance(memory, NoisyRows) and memory.hot is not None:
        memory.noise = collisions(partner("hash"), memory.hot).share


# --- what is measured -----------------------------------------------------------------------------


def _measure(trained: Trained) -> Result:
    """Losses and gates by route, over training and at its end; of a memory, what its gates are
    worth; of that which hashes all n-grams, what collisions do."""
    config, corpus = trained.config, trained.corpus
    text = _routed(config, corpus, trained.frequent, ROUTED)
    result: Result = {
        "by_step": watched(trained.folder),
        "route_shares": text.shares(),
        "by_route": by_route(trained.model, text),
        "tier": _tier(trained, text),
    }
    memory = trained.model.memory
    if memory is not None:
        result["gates"] = gate_report(trained.model, text)
    if isinstance(memory, NoisyRows):
        result["noise"] = memory.noise
    if trained.job.arm == "hash":
        index = _frequent(config, corpus, trained.frequent)
        result["collisions"] = collisions(trained.run, index)._asdict()  # trains it further: last
    return result


def _tier(trained: Trained, text: RoutedText) -> Result:
    """Rows of a memory, and what its index covers."""
    memory = trained.model.memory
    if memory is None:
        return {}
    arm = trained.recipe.arm(trained.config.base, trained.corpus.vocab, trained.corpus.end_id)
    tier: Result = {
        "hashed_rows": sum(map(memory.config.hash.row_count, memory.layers)),
        "hot_rows": memory.config.hot_rows * len(memory.layers),
        "table": asdict(arm.parameters)["table"],
    }
    if arm.hot and memory.hot is not None:
        ngrams = trained.frequent(arm.hot)
        tier["hot"] = {str(order): count for order, count in arm.hot.items()}
        tier["coverage"] = {str(order): part for order, part in ngrams.coverage().items()}
        tier["false_hits"] = _false_hits(memory.hot, HotIndex.build(ngrams), text, trained.corpus)
    return tier


def _false_hits(
    index: HotIndex, exact: HotIndex, text: RoutedText, corpus: Corpus
) -> dict[str, float]:
    """The share of the held-out n-grams of each order that an index takes for others."""
    addresser = ngram_addresser(corpus, exact.orders)
    shares: dict[str, float] = {}
    for order in exact.orders:
        parts = []
        for batch in text.batches:
            windows_BTN, _ = addresser.windows(batch.ids_BT.numpy(), starts=batch.starts_BT.numpy())
            ids_BTn = windows_BTN[..., -order:]
            parts.append((index.slots_of(ids_BTn) >= 0) & (exact.slots_of(ids_BTn) < 0))
        shares[str(order)] = float(np.concatenate([part.ravel() for part in parts]).mean())
    return shares


def _tables(config: HotConfig, runs: Runs) -> list[Iterator[str]]:
    labels = {name: recipe.label for name, recipe in _arms(config.base).items()}
    return tables(runs, labels)


_PAIRS = (
    ("hash", "none"),
    ("hot", "none"),
    ("hot", "hash"),
    *((f"hot-{share:.0%}"[:-1], "hash") for share in SWEEP),
    *((f"cold-{round(100 * cold)}", "hot") for cold in COLD),
    ("double", "hash"),
    ("double", "hot"),
    ("fingerprint", "hot"),
    ("noise", "hot"),
    ("noise", "hash"),
    ("private", "hash"),
    ("private", "hot"),
    ("dropout", "hot"),
    ("hash-dropout", "hash"),
)

HOT = Comparison(
    "hot",
    _arms,
    _PAIRS,
    _measure,
    _tables,
    after={"noise": "hash"},
    asked=_asked,
    like=_like,
    begin=_begin,
    watch=_watch,
    config=HotConfig,
).study
"""A hot tier beside hashing alone."""
