"""Does a memory help to find needles in a text (RULER), or is it the conv? And in a longer text?

All arms train on the mix with needle texts among its rows. First the mixture of experts tries up
to three shares of such rows, until it writes between 20 and 80 % of the answers of two tasks or
more: a baseline that writes none or all could show no difference. The other arms then train on that
share.

Longer texts: an arm is measured at 4 times the length, as it is and with YaRN, and then trained on
with YaRN, with a tenth of the tokens. Memory and experts are compared at equal steps, and at equal
loss: one memory arm stops once its held-out loss is that of the experts (paper, section 6.1).
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...data.corpus import Corpus
from ...data.packing import Batches
from ...data.tokens import encode
from ...eval.needle_cases import TASKS, NeedleTexts, seeded_cases
from ...eval.needle_rows import NeedleRows
from ...eval.needles import score_forced
from ...lm import LM
from ...lm.config import YarnConfig
from ...lm.loop import Run, heldout_loss, train
from .arm_recipe import ArmRecipe
from .backbones import Backbone
from .comparison import DTYPE, Comparison, ComparisonConfig, origin, settings
from .queue import Result, ResultsByJob
from .rates import Runs
from .tables import NONE, fixed, head, mean_and_error, paired, row, shared_seeds
from .trained import Trained

LOW, HIGH = "low", "high"
NEXT: Mapping[tuple[str, ...], float] = {
    (): 0.25,
    (LOW,): 0.5,
    (HIGH,): 0.1,
    (LOW, LOW): 0.9,
    (LOW, HIGH): 0.35,
    (HIGH, LOW): 0.16,
    (HIGH, HIGH): 0.03,
}
"""How the baseline has missed so far -> the share of the rows that are needle texts next."""
SHARES = tuple(NEXT.values())
FACTOR = 4
"""Times the length of training."""
LONGER = 0.1
"""Share of the tokens, and of the rate, of the training on longer texts."""
STAGES = {"as it is": "as it is", "yarn": "with YaRN", "trained": "trained on"}
_KINDS = {
    "moe": ArmRecipe("MoE", "moe"),
    "memory": ArmRecipe("MoE + memory"),
    "early": ArmRecipe("MoE + memory, stopped at equal loss"),
    "one-row": ArmRecipe("one row of each head", control="one-row"),
    "conv": ArmRecipe("MoE + conv", "conv"),
}
_LONG = ("moe", "memory", "early")


@dataclass(frozen=True)
class Sizes:
    """How needles are asked for.

    Attributes:
        length: Tokens of a row in training.
        items: Keys, values, or variables of a chain.
        cases: Of each task.
        band: Share of a task's answers that the baseline has to write, from and to.
        tasks: Tasks in which it has to, at least.
        heldout: About as many held-out tokens are read at 4 times the length.
    """

    length: int = 256
    items: int = 4
    cases: int = 100
    band: tuple[float, float] = (0.2, 0.8)
    tasks: int = 2
    heldout: int = 200_000


_SMALLEST = Sizes(128, items=2, cases=3, band=(0.0, 1.0), heldout=5_000)


class NeedlesConfig(ComparisonConfig):
    """Settings of the study. Rows are longer than those of the other studies, and a step has about
    as many tokens."""

    @property
    def sizes(self) -> Sizes:
        """How needles are asked for."""
        return _SMALLEST if self.backbone == "smallest" else Sizes()

    @property
    def base(self) -> Backbone:
        base = super().base
        length = self.sizes.length
        batch = max(2, base.batch * base.length // length)
        return dataclasses.replace(base, length=length, batch=batch)


def _named(kind: str, share: float) -> str:
    return f"{kind}-{round(100 * share)}"


def _arms(backbone: Backbone) -> Mapping[str, ArmRecipe]:
    arms = {}
    for share in SHARES:
        for kind, recipe in _KINDS.items():
            until = _named("moe", share) if kind == "early" else ""
            label = f"{recipe.label}, {share:.0%} needles"
            arms[_named(kind, share)] = recipe.changed(label, needles=share, until=until)
    return arms


def _asked(config: NeedlesConfig, results: ResultsByJob) -> Mapping[str, int]:
    """Seeds of each arm: one of each baseline that was tried, all of the arms of the right share.
    The share that is tried now counts as the right one until it has run."""
    asked: dict[str, int] = {}
    misses: tuple[str, ...] = ()
    while misses in NEXT:
        share = NEXT[misses]
        name = _named("moe", share)
        job = config.job(name, config.seeds[0], config.rates[0])
        asked[name] = 1
        miss = _miss(results[job], config) if job in results else None
        if miss is None:
            others = (_named(kind, share) for kind in _KINDS if kind != "moe")
            asked |= dict.fromkeys(others, len(config.seeds))
            asked[name] = len(config.seeds) if job in results else 1
            break
        misses += (miss,)
    return asked


def _miss(result: Result, config: NeedlesConfig) -> str | None:
    """None = the baseline writes as many answers as it should. Else the side of the band on which
    more tasks lie, LOW or HIGH."""
    low, high = config.sizes.band
    scores = [score["score"] for score in result["needles"].values()]
    below = sum(score < low for score in scores)
    above = sum(score > high for score in scores)
    if len(scores) - below - above >= config.sizes.tasks:
        return None
    return LOW if below >= above else HIGH


def _text(corpus: Corpus, recipe: ArmRecipe, config: NeedlesConfig, seed: int) -> NeedleRows:
    texts = _texts(corpus, config)
    return NeedleRows(corpus.batches(), texts, recipe.needles, seed)


def _texts(corpus: Corpus, config: NeedlesConfig) -> NeedleTexts:
    return NeedleTexts(_encode(corpus), items=config.sizes.items, start=corpus.end_id)


def _encode(corpus: Corpus) -> Callable[[str], list[int]]:
    return lambda text: encode(corpus.tokenizer, [text])[0].tolist()


# --- what is measured -----------------------------------------------------------------------------


def _measure(trained: Trained) -> Result:
    """Needles at the length of training; of some arms at 4 times that length as well."""
    config: NeedlesConfig = trained.config
    texts = _texts(trained.corpus, config)
    length = config.sizes.length
    result: Result = {"needles": _scores(trained.model, texts, length, config.sizes.cases)}
    if trained.job.arm.rpartition("-")[0] in _LONG:
        result["long"] = _longer(trained, texts, FACTOR * length)
    return result


def _scores(model: LM, texts: NeedleTexts, tokens: int, count: int) -> dict[str, Any]:
    """Share of the answers that a model writes, by task."""
    scores = {}
    for task in TASKS:
        cases = seeded_cases(texts, task, tokens, count, 0)
        summary = score_forced(cases, _predicts(model), texts.encode, 8)
        scores[task] = {name: summary[name] for name in ("score", "score_stderr", "cases")}
    return scores


def _predicts(model: LM) -> Callable[[Tensor], Tensor]:
    @torch.no_grad()
    def predict(ids_BT: Tensor) -> Tensor:
        return model(ids_BT).argmax(-1)

    model.eval()
    return predict


def _longer(trained: Trained, texts: NeedleTexts, tokens: int) -> dict[str, Any]:
    """Needles and held-out loss in longer texts: as trained, with YaRN, and trained on with it."""
    model = trained.model
    sizes = trained.config.sizes
    heldout = _heldout(trained.corpus, tokens, sizes.heldout)
    stages: dict[str, Any] = {}

    def note(stage: str, now: LM) -> None:
        stages[stage] = {
            "needles": _scores(now, texts, tokens, sizes.cases),
            "validation_loss": heldout_loss(now, heldout, DTYPE),
        }

    note("as it is", _stretched(model, tokens, None))
    yarn = YarnConfig(FACTOR, trained.config.sizes.length)
    longer = _stretched(model, tokens, yarn)
    note("yarn", longer)
    train(_run(longer, trained, texts, tokens), trained.folder / "longer", resume=True)
    note("trained", longer)
    return stages


def _stretched(model: LM, tokens: int, yarn: YarnConfig | None) -> LM:
    """The same weights and memory, for texts of so many tokens."""
    room = max(model.config.max_tokens, 2 * tokens)  # question and answers
    config = dataclasses.replace(model.config, max_tokens=room, yarn=yarn)
    stretched = LM(config, model.memory)
    stretched.load_state_dict(model.state_dict())
    return stretched.eval()


def _heldout(corpus: Corpus, tokens: int, about: int) -> Batches:
    """Held-out documents, each so many-th, in longer rows."""
    total = sum(len(ids) for ids in corpus.heldout)
    documents = [
        corpus.heldout[index] for index in range(0, len(corpus.heldout), -(-total // about))
    ]
    return Batches(documents, corpus.end_id, batch=8, tokens=tokens, seed=None)


def _run(model: LM, trained: Trained, texts: NeedleTexts, tokens: int) -> Run:
    """The training on longer texts, with as many tokens a step."""
    corpus, job = trained.corpus, trained.job
    rows = max(1, trained.config.base.batch // FACTOR)
    text = Batches(corpus.training, corpus.end_id, batch=rows, tokens=tokens, seed=job.seed)
    batches = NeedleRows(text, texts, trained.recipe.needles, len(trained.config.seeds) + job.seed)
    usual = settings(trained.recipe, job)
    config = dataclasses.replace(
        usual, tokens=max(1, round(LONGER * usual.tokens)), lr=LONGER * usual.lr, heldout_every=0
    )
    return Run(model, batches, config, {**origin(job), "tokens": tokens})


# --- tables ---------------------------------------------------------------------------------------


def _tables(config: NeedlesConfig, runs: Runs) -> list[Iterator[str]]:
    parts = [_tried(config, runs)]
    share = _right_share(config, runs)
    if share is not None:
        parts += [_at_length(runs, share), _stops(runs, share)]
        parts += [_long_texts(runs, share), _long_pairs(runs, share)]
    return parts


def _right_share(config: NeedlesConfig, runs: Runs) -> float | None:
    """The share whose baseline writes as many answers as it should; None = none of them does."""
    for share in SHARES:
        result = runs.get(_named("moe", share), {}).get(config.seeds[0])
        if result is not None and _miss(result, config) is None:
            return share
    return None


def _tried(config: NeedlesConfig, runs: Runs) -> Iterator[str]:
    """What the mixture of experts writes, by the share of needle texts."""
    seed = config.seeds[0]
    yield from head(f"rows with needles, seed {seed}", "mean", *TASKS)
    for share in SHARES:
        result = runs.get(_named("moe", share), {}).get(seed)
        if result is not None:
            scores = [fixed(result["needles"][task]["score"], 3) for task in TASKS]
            yield row(f"{share:.0%}", fixed(_score_of(None)(result), 3), *scores)
    low, high = config.sizes.band
    right = _right_share(config, runs)
    yield ""
    asked = f"The mixture of experts has to write {low:.0%} to {high:.0%} of the answers of "
    asked += f"{config.sizes.tasks} tasks or more"
    if right is None:
        yield f"{asked}: no share does that so far, so no other arm is trained."
    else:
        yield f"{asked}: so {right:.0%} of the rows are needle texts for all arms."


def _at_length(runs: Runs, share: float) -> Iterator[str]:
    """Share of the answers written at the length of training, and minus the mixture of experts'."""
    yield from head("answers written", "seeds", "mean", *TASKS)
    moe = runs[_named("moe", share)]
    for kind, recipe in _KINDS.items():
        by_seed = runs.get(_named(kind, share), {})
        if by_seed:
            cells = [_mean(by_seed, _score_of(task)) for task in (None, *TASKS)]
            yield row(recipe.label, str(len(by_seed)), *cells)
    for kind, recipe in _KINDS.items():
        by_seed = runs.get(_named(kind, share), {})
        if kind != "moe" and shared_seeds(by_seed, moe):
            gaps = [_gap(by_seed, moe, _score_of(task)) for task in (None, *TASKS)]
            yield row(f"{recipe.label} minus MoE", str(len(shared_seeds(by_seed, moe))), *gaps)


def _stops(runs: Runs, share: float) -> Iterator[str]:
    """Where the arm that stops at equal loss stopped, beside the loss of the mixture of experts."""
    yield from head("stopped at equal loss", "tokens", "of", "held-out loss", "of MoE", "")
    early, moe = runs.get(_named("early", share), {}), runs[_named("moe", share)]
    for seed in shared_seeds(early, moe):
        (tokens, loss), (whole, aim) = (r[seed]["heldout_curve"][-1] for r in (early, moe))
        reached = "reached" if loss <= aim else "not reached"
        losses = fixed(loss, 4), fixed(aim, 4)
        yield row(f"seed {seed}", f"{tokens:,}", f"{whole:,}", *losses, reached)


def _long_texts(runs: Runs, share: float) -> Iterator[str]:
    """Answers written and held-out loss in texts 4 times as long, by stage."""
    yield from head(f"texts {FACTOR} times as long", "seeds", "held-out loss", "mean", *TASKS)
    for kind in _LONG:
        by_seed = runs.get(_named(kind, share), {})
        for stage, label in STAGES.items() if by_seed else ():
            cells = [_mean(by_seed, _score_of(task, stage)) for task in (None, *TASKS)]
            loss = _mean(by_seed, lambda r, s=stage: r["long"][s]["validation_loss"], 4)
            yield row(f"{_KINDS[kind].label}, {label}", str(len(by_seed)), loss, *cells)


def _long_pairs(runs: Runs, share: float) -> Iterator[str]:
    """The memory minus the experts after the training on longer texts, and what either gained."""
    yield from head("paired by seed, trained on", "seeds", "held-out loss", "mean", *TASKS)
    moe = runs[_named("moe", share)]
    for kind, when in (("memory", "at equal steps"), ("early", "stopped at equal loss")):
        by_seed = runs.get(_named(kind, share), {})
        seeds = shared_seeds(by_seed, moe)
        if seeds:
            cells = [_gap(by_seed, moe, _score_of(task, "trained")) for task in (None, *TASKS)]
            loss = _gap(by_seed, moe, lambda r: r["long"]["trained"]["validation_loss"], 4)
            yield row(f"MoE + memory minus MoE, {when}", str(len(seeds)), loss, *cells)


def _score_of(task: str | None, stage: str | None = None) -> Callable[[Result], float]:
    """Takes a result, returns a score. task: None = the mean over all. stage: None = at the length
    of training."""

    def score(result: Result) -> float:
        scores = result["needles"] if stage is None else result["long"][stage]["needles"]
        if task is None:
            return statistics.fmean(each["score"] for each in scores.values())
        return scores[task]["score"]

    return score


def _mean(by_seed: Mapping[int, Result], value: Callable[[Result], float], digits: int = 3) -> str:
    return fixed(statistics.fmean(map(value, by_seed.values())), digits)


def _gap(
    one: Mapping[int, Result],
    other: Mapping[int, Result],
    value: Callable[[Result], float],
    digits: int = 3,
) -> str:
    values = paired(one, other, value)
    return mean_and_error(values, digits) if values else NONE


def _after() -> Mapping[str, str]:
    return {
        _named(kind, share): _named("moe", share)
        for share in SHARES
        for kind in _KINDS
        if kind != "moe"
    }


NEEDLES = Comparison(
    "needles",
    _arms,
    tuple(
        (_named(kind, share), _named("moe", share))
        for share in SHARES
        for kind in _KINDS
        if kind != "moe"
    ),
    _measure,
    _tables,
    _after(),
    _text,
    _asked,
    config=NeedlesConfig,
).study
"""Needles, with and without a memory."""
