"""Says, before hardware is bought, whether a table's reads hide behind the blocks of a model.

`plan` is the formula for one server, `simulate` a rack of servers that share a tier, `layout` has
the sizes of a model's memory, `TIERS` published figures of storage, and `measure` takes those of a
disk. Nothing here needs torch.
"""

from .hits import HIT_RATES, HitRates, hit_rates
from .layouts import LAYOUTS, Layout, layout, layout_of_config
from .planner import LayerPlan, Plan, plan
from .probe import Probe, Sizes, measure
from .simulate import LayerTimes, Load, Shared, Simulation, block_seconds, simulate
from .tiers import TIERS, Batch, Tier, tier

__all__ = [
    "HIT_RATES",
    "LAYOUTS",
    "TIERS",
    "Batch",
    "HitRates",
    "LayerPlan",
    "LayerTimes",
    "Layout",
    "Load",
    "Plan",
    "Probe",
    "Shared",
    "Simulation",
    "Sizes",
    "Tier",
    "block_seconds",
    "hit_rates",
    "layout",
    "layout_of_config",
    "measure",
    "plan",
    "simulate",
    "tier",
]
