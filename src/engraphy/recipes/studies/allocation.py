"""The allocation study: which share of the sparse parameters should experts keep (paper, section
3)?

Totals and activated parameters are equal. Arms are named by the share of the experts that is left:
at 1 there is no memory; at the least share, as many are left as a token uses. Tables have the
paper's rho as well. There is a minimum between if a share has a lower loss than both ends.

Both ends and rho 0.75 search their learning rates; the other shares run at the rate of rho 0.75.
Shares that decide where the minimum lies run on all seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ...analysis.fits import fit_parabola
from .arm_recipe import ArmRecipe
from .backbones import Backbone
from .comparison import Comparison, ComparisonConfig
from .comparison_tables import validation_loss
from .queue import Result, ResultsByJob
from .rates import Runs
from .tables import NONE, head, mean_and_error, paired, row

SHARES = (1.0, 0.9, 0.75, 0.5, 0.25)


def _name(rho: float) -> str:
    return f"rho-{rho:g}"


def _least(backbone: Backbone) -> float:
    """The share that leaves the experts of a token."""
    return backbone.moe.top_k / backbone.moe.experts


def shares(backbone: Backbone) -> dict[str, float]:
    """The shares of a backbone by the names of their arms, descending."""
    least = _least(backbone)
    kept = [rho for rho in SHARES if rho > least]
    return {_name(rho): rho for rho in (*kept, least)}


def _arms(backbone: Backbone) -> Mapping[str, ArmRecipe]:
    arms = {}
    for name, rho in shares(backbone).items():
        kind = "moe" if rho == 1 else "memory"
        label = f"{round(rho * backbone.moe.experts)} of {backbone.moe.experts} experts"
        arms[name] = ArmRecipe(label, kind, rho)
    return arms


def _like(backbone: Backbone) -> Mapping[str, str]:
    """Which shares run at the rate of which."""
    names = list(shares(backbone))
    tuned = _name(0.75)
    return {name: tuned for name in names[1:-1] if name != tuned}


def _asked(config: ComparisonConfig, results: ResultsByJob) -> Mapping[str, int]:
    """All seeds of the ends, and of the best share of the first seed once that is known; if it is
    an end, of the share beside it. One seed of the others."""
    names = list(shares(config.base))
    losses = list[float]()
    runs = _COMPARISON.search(config).runs(results)
    for name in names:
        result = runs.get(name, {}).get(config.seeds[0])
        if result is not None:
            losses.append(validation_loss(result))
    deciding = {names[0], names[-1]}
    if len(losses) == len(names):
        best = losses.index(min(losses))
        deciding.add(names[min(max(best, 1), len(names) - 2)])
    return {name: len(config.seeds) if name in deciding else 1 for name in names}


def _tables(config: ComparisonConfig, runs: Runs) -> list[Iterator[str]]:
    return [_curve(config, runs)]


def _curve(config: ComparisonConfig, runs: Runs) -> Iterator[str]:
    """Each share minus both ends, paired by seed, and whether one is below both."""
    by_name = {name: rho for name, rho in shares(config.base).items() if name in runs}
    rhos = {name: _sparse_share(config.base, name, runs[name]) for name in by_name}
    yield from head("share of experts", "rho", "minus all experts", "minus the fewest")
    for name in by_name:
        others = [runs[end] if end in runs and end != name else {} for end in _ends(config)]
        cells = [_difference(runs[name], other) for other in others]
        yield row(f"{by_name[name]:.3g}", f"{rhos[name]:.3f}", *cells)
    yield ""
    yield from _lowest(config, runs, rhos)
    yield from _parabola(runs, rhos)


def _ends(config: ComparisonConfig) -> tuple[str, str]:
    names = list(shares(config.base))
    return names[0], names[-1]


def _sparse_share(backbone: Backbone, name: str, by_seed: Mapping[int, Result]) -> float:
    """rho as the paper has it, as `lm.sizes.expert_share` counts it, from a result: of the
    parameters that a token leaves out, embeddings aside, the share that experts have."""
    moe = backbone.moe
    kept = round(shares(backbone)[name] * moe.experts)
    expert = 3 * moe.hidden_size * moe.expert_ffn * len(moe.moe_layers)
    experts = (kept - moe.top_k) * expert
    table = next(iter(by_seed.values()))["parameters"]["table"]
    left_out = table - backbone.memory.width * len(backbone.memory.layers) if table else 0
    return experts / (experts + left_out)


def _difference(one: Mapping[int, Result], other: Mapping[int, Result]) -> str:
    """The loss of one share minus that of another, over the seeds of both."""
    values = paired(one, other, validation_loss)
    return mean_and_error(values) if values else NONE


def _lowest(config: ComparisonConfig, runs: Runs, rhos: Mapping[str, float]) -> Iterator[str]:
    """The share with the lowest loss on the first seed, beside both ends on the others."""
    first = config.seeds[0]
    losses = {name: validation_loss(runs[name][first]) for name in rhos if first in runs[name]}
    if len(losses) < len(shares(config.base)):
        yield "The lowest loss is not known yet."
        return
    best = min(losses, key=lambda name: losses[name])
    yield f"Lowest on seed {first}: rho {rhos[best]:.2f}."
    if best in _ends(config):
        yield "That is an end: no minimum between."
        return
    unseen = {seed: result for seed, result in runs[best].items() if seed != first}
    most, fewest = (_difference(unseen, runs[end]) for end in _ends(config))
    yield (
        f"On the other seeds, which did not choose it: minus all experts {most}, "
        f"minus the fewest {fewest}."
    )


def _parabola(runs: Runs, rhos: Mapping[str, float]) -> Iterator[str]:
    """A fit over the shares with a memory. Without one the curve may jump: what a small memory
    gains says nothing about where the minimum is."""
    with_memory = {name: rho for name, rho in rhos.items() if rho < 1}
    points = [
        (rho, validation_loss(result), seed)
        for name, rho in with_memory.items()
        for seed, result in runs[name].items()
    ]
    if len(with_memory) < 3 or len(points) < 2 + len({seed for *_, seed in points}):
        yield "Too few runs for a parabola."
        return
    curve = fit_parabola(*zip(*points, strict=True))
    error = "" if curve.square_error is None else f" ± {curve.square_error:.4f}"
    yield f"Parabola over rho, arms with a memory: square term {curve.square:+.4f}{error};"
    if curve.lowest is None:
        yield "it does not open upwards: no minimum."
        return
    error = "" if curve.lowest_error is None else f" ± {curve.lowest_error:.2f}"
    tried = with_memory.values()
    outside = "" if min(tried) < curve.lowest < max(tried) else ", outside of what was tried"
    yield f"lowest at rho {curve.lowest:.2f}{error}{outside}."


_COMPARISON = Comparison(
    "allocation",
    _arms,
    tables=_tables,
    asked=_asked,
    like=_like,
)
ALLOCATION = _COMPARISON.study
"""The allocation study."""
