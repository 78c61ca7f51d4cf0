"""Where the gain of a memory lies: by source, by the count of the n-gram, by what a token is, with
the memory switched off, and with less text to train on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from ...data.corpus import Corpus
from ...data.packing import Batch
from ...eval.kinds import KINDS, target_kinds
from ...eval.losses import Losses
from .arm_recipe import ArmRecipe
from .backbones import Backbone
from .comparison import DTYPE, Comparison, ComparisonConfig, study_text
from .comparison_tables import titled, validation_loss
from .queue import Result
from .rates import Runs
from .tables import NONE, head, mean_and_error, paired, row
from .trained import Trained

SHARES = {"quarter": 0.25, "half": 0.5}
"""Shares of the training tokens that further arms see."""
TOKEN_COUNTS = {
    "tokens never trained on": (0, 0),
    "tokens seen 1 to 100 times": (1, 100),
    "tokens seen 101 to 1,000 times": (101, 1_000),
    "tokens seen more often": (1_001, 2**62),
}
"""Counts of tokens in the training text, both ends included. A tokenizer that was trained on the
text leaves few tokens unseen, or none."""
FEW = 100
"""A group of fewer held-out tokens is not shown."""


def _arms(backbone: Backbone) -> Mapping[str, ArmRecipe]:
    arms = {"moe": ArmRecipe("MoE", "moe"), "memory": ArmRecipe("MoE + memory")}
    less = {
        f"{name}-{share}": arm.changed(f"{arm.label}, {share} of the text", text=part)
        for share, part in SHARES.items()
        for name, arm in arms.items()
    }
    return arms | less


def _measure(trained: Trained) -> Result:
    """Losses by source and kind of token; with the memory, its losses when it is off."""
    corpus = trained.corpus
    losses = trained.losses
    batches = list(study_text(trained.run.batches, trained.job.tokens))
    groups = {**_by_source(corpus, losses), **_by_kind(corpus), **_by_count(corpus, batches)}
    result: Result = {"loss_by_group": _means(losses.losses, groups)}
    memory = trained.model.memory
    if memory is not None:
        with memory.disabled():
            off = Losses(trained.model, corpus.heldout_batches(), trained.counts, DTYPE)
        result["off"] = {
            "validation_loss": float(off.losses.mean()),
            "loss_by_frequency": off.by_bucket(),
            "loss_by_group": _means(off.losses, groups),
        }
    return result


def _means(losses_M: np.ndarray, groups: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {
        name: float(losses_M[inside_M].mean())
        for name, inside_M in groups.items()
        if inside_M.sum() >= FEW
    }


def _by_source(corpus: Corpus, losses: Losses) -> dict[str, np.ndarray]:
    """The held-out targets of each source, bool [M]."""
    heldout = corpus.heldout
    source_M = heldout.sources[losses.documents - 1]  # documents count from 1
    return {f"source {name}": source_M == index for index, name in enumerate(heldout.names)}


def _by_kind(corpus: Corpus) -> dict[str, np.ndarray]:
    """The held-out targets of each kind of word, bool [M]."""
    heldout = corpus.heldout
    is_code = np.zeros(len(heldout), dtype=bool)
    if "code" in heldout.names:
        is_code = heldout.of_source("code")
    kind_M = target_kinds(corpus.tokenizer, heldout, is_code)
    return {f"kind {name}": kind_M == name for name in KINDS}


def _by_count(corpus: Corpus, batches: Sequence[Batch]) -> dict[str, np.ndarray]:
    """The held-out targets by how often `batches` have their token."""
    count_V = np.zeros(corpus.vocab_size, dtype=np.int64)
    for batch in batches:
        count_V += np.bincount(_targets(batch), minlength=corpus.vocab_size)
    count_M = np.concatenate([count_V[_targets(batch)] for batch in corpus.heldout_batches()])
    return {
        name: (low <= count_M) & (count_M <= high) for name, (low, high) in TOKEN_COUNTS.items()
    }


def _targets(batch: Batch) -> np.ndarray:
    """Its targets, int64 [M]."""
    return batch.targets_BT[batch.targets_BT >= 0].numpy()


def _tables(config: ComparisonConfig, runs: Runs) -> list[Iterator[str]]:
    return [_groups(runs), _off(runs), _data(runs)]


def _groups(runs: Runs) -> Iterator[str]:
    """What the memory gains in each group."""
    yield from head("held-out tokens", "seeds", "MoE + memory minus MoE")
    for group in _names(runs, lambda result: result["loss_by_group"]):
        gap = _gap(runs, "memory", "moe", lambda r, g=group: r["loss_by_group"].get(g))
        yield row(group, *gap)


def _off(runs: Runs) -> Iterator[str]:
    """What the model that has learned with its memory loses without it."""
    yield from head("held-out tokens", "seeds", "memory off minus on")
    memory = runs.get("memory", {})
    off = {seed: {**result, **result["off"]} for seed, result in memory.items()}
    both = {"off": off, "on": memory}
    yield row("all", *_gap(both, "off", "on", validation_loss))
    for group in _names(both, lambda result: result["loss_by_frequency"]):
        gap = _gap(both, "off", "on", lambda r, g=group: r["loss_by_frequency"].get(g))
        yield row(titled(group), *gap)
    for group in _names(both, lambda result: result["loss_by_group"]):
        yield row(group, *_gap(both, "off", "on", lambda r, g=group: r["loss_by_group"].get(g)))


def _data(runs: Runs) -> Iterator[str]:
    """What the memory gains with less text, by the count of the trigram in all of it."""
    buckets = _names(runs, lambda result: result["loss_by_frequency"])
    yield from head("text", "MoE + memory minus MoE", *map(titled, buckets))
    for share in (*SHARES, ""):
        suffix = f"-{share}" if share else ""
        pair = f"memory{suffix}", f"moe{suffix}"
        cells = [_gap(runs, *pair, validation_loss)[1]]
        for name in buckets:
            gap = _gap(runs, *pair, lambda r, b=name: r["loss_by_frequency"].get(b))
            cells.append(gap[1])
        yield row(share or "all", *cells)


def _names(runs: Runs, groups: Callable[[Result], Mapping[str, float]]) -> list[str]:
    """Groups of all results, in their order."""
    names: dict[str, None] = {}
    for by_seed in runs.values():
        for result in by_seed.values():
            names |= dict.fromkeys(groups(result))
    return list(names)


def _gap(
    runs: Runs, one: str, other: str, value: Callable[[Result], float | None]
) -> tuple[str, str]:
    """Number of seeds, and one - other over them."""
    if one not in runs or other not in runs:
        return "0", NONE
    values = paired(runs[one], runs[other], value)
    return str(len(values)), mean_and_error(values) if values else NONE


def _like(backbone: Backbone) -> Mapping[str, str]:
    """Arms with less text run at the rate of that with all of it."""
    return {f"{name}-{share}": name for share in SHARES for name in ("moe", "memory")}


WHERE = Comparison(
    "where",
    _arms,
    (("memory", "moe"),),
    _measure,
    _tables,
    like=_like,
).study
"""Where the gain of a memory lies."""
