"""The allocation study: which share of the sparse parameters should experts keep (paper, section
3)?

Totals and activated parameters are equal. At rho = 1 there is no memory; at the least rho, as many
experts are left as a token uses. A parabola says whether there is a minimum between.

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
from .queue import ResultsByJob
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
        label = f"rho {rho:.3g}, {round(rho * backbone.moe.experts)} experts"
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
    """Each share minus both ends, paired by seed, and the fitted minimum."""
    by_name = {name: rho for name, rho in shares(config.base).items() if name in runs}
    ends = [_name(1.0), _name(_least(config.base))]
    yield from head("share of experts", "minus rho 1", "minus the least rho")
    for name in by_name:
        cells = []
        for end in ends:
            values = paired(runs[name], runs[end], validation_loss) if end in runs else []
            cells.append(mean_and_error(values) if values and name != end else NONE)
        yield row(f"{by_name[name]:.3g}", *cells)
    yield ""
    points = [
        (rho, validation_loss(result), seed)
        for name, rho in by_name.items()
        for seed, result in runs[name].items()
    ]
    if len(by_name) < 3 or len(points) < 2 + len({seed for *_, seed in points}):
        yield "Too few runs for a parabola."
        return
    curve = fit_parabola(*zip(*points, strict=True))
    error = "" if curve.square_error is None else f" ± {curve.square_error:.4f}"
    yield f"Parabola over rho: square term {curve.square:+.4f}{error};"
    if curve.lowest is None:
        yield "it does not open upwards: no minimum."
        return
    error = "" if curve.lowest_error is None else f" ± {curve.lowest_error:.2f}"
    inside = "between" if _least(config.base) < curve.lowest < 1 else "outside of"
    yield f"lowest at rho {curve.lowest:.2f}{error}, {inside} the ends."


_COMPARISON = Comparison(
    "allocation",
    _arms,
    tables=_tables,
    asked=_asked,
    like=_like,
)
ALLOCATION = _COMPARISON.study
"""The allocation study."""
