"""Does a memory make a model deeper (paper, section 5.1)? Pairs of one seed and one rate.

LogitLens: how far each layer is from the end, KL(layer || final). CKA: which layer of the mixture
of experts each layer of the memory arm resembles, a soft alignment over the five most similar. The
mean of five places is not the layer's own place even for equal models, and two starts of one model
differ by chance. So a second mixture of experts, the same but for its initial weights, is aligned
with the first as well, and the difference counts: a layer of the memory arm that resembles a later
one than that has more done already. Layers before the memory are marked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import fmean

import torch
from torch import Tensor

from ...analysis.cka import MinibatchCKA
from ...analysis.logitlens import before_memory, logit_lens
from ...data.packing import Batch, Batches
from ...lm import LM
from ...memory.lookup import Trace
from ...memory.recording import recorded
from .arm_recipe import ArmRecipe
from .backbones import Backbone
from .comparison import Comparison, ComparisonConfig
from .queue import Result
from .rates import Runs
from .tables import fixed, head, mean_and_error, row
from .trained import Trained

READ = 256
"""Held-out rows that are read, evenly spread over all sources."""
ROWS = 4
"""Rows of a minibatch of CKA."""


def _arms(backbone: Backbone) -> Mapping[str, ArmRecipe]:
    return {
        "moe": ArmRecipe("MoE", "moe"),
        "memory": ArmRecipe("MoE + memory"),
        "again": ArmRecipe("MoE, other initial weights", "moe", draw=1),
    }


def _measure(trained: Trained) -> Result:
    """LogitLens of the arm, and its alignment with the first mixture of experts."""
    batches = [spread(trained.corpus.heldout_batches(), READ)]
    result: Result = {"kl_by_layer": kl_by_layer(trained.model, batches)}
    if trained.job.arm != "moe":
        other = trained.partner("moe").model
        cka = MinibatchCKA(len(other.blocks), len(other.blocks))
        for batch in _parts(batches):
            cka.add(states(trained.model, batch), states(other, batch))
        memory = trained.model.memory
        alignment = cka.alignment(() if memory is None else memory.layers)
        result["aligned"] = alignment.aligned_L.tolist()
        result["similarity"] = [
            [round(value, 4) for value in line] for line in alignment.similarity_LR.tolist()
        ]
    return result


def spread(batches: Batches, count: int) -> Batch:
    """`count` rows, evenly spread, or all if there are fewer. Documents stand source by source, so
    the first rows would be of one language."""
    whole = Batch(*(torch.cat(values) for values in zip(*batches, strict=True)))
    rows = len(whole.ids_BT)
    chosen = torch.linspace(0, rows - 1, min(count, rows)).long()
    return Batch(*(values[chosen] for values in whole))


def kl_by_layer(model: LM, batches: list[Batch]) -> list[float]:
    """Mean KL(layer || final) over all tokens of some batches, in nats, for each layer."""
    sums = torch.zeros(len(model.blocks), dtype=torch.float64)
    tokens = 0
    for batch in _parts(batches):
        lens = logit_lens(states(model, batch), model.logits)
        sums += lens.kl_LBT.flatten(1).sum(1)
        tokens += batch.ids_BT.numel()
    return (sums / tokens).tolist()


@torch.no_grad()
def states(model: LM, batch: Batch) -> list[Tensor]:
    """What each block returns for a batch, [B, T, ...] each."""
    trace = Trace(states=True)
    with recorded(list(model.blocks), trace):
        model(batch.ids_BT, batch.starts_BT)
    return [trace.hidden[layer] for layer in range(len(model.blocks))]


def _parts(batches: list[Batch]) -> Iterator[Batch]:
    """The batches in parts of ROWS rows."""
    for batch in batches:
        for first in range(0, len(batch.ids_BT), ROWS):
            yield Batch(*(values[first : first + ROWS] for values in batch))


def _tables(config: ComparisonConfig, runs: Runs) -> list[Iterator[str]]:
    return [_layers(config, runs)]


def _layers(config: ComparisonConfig, runs: Runs) -> Iterator[str]:
    """KL(layer || final) of all arms, and where layers lie among those of the first mixture of
    experts."""
    moe, memory, again = (runs.get(arm, {}) for arm in ("moe", "memory", "again"))
    seeds = sorted(moe.keys() & memory.keys() & again.keys())
    if not seeds:
        yield "No seed has all arms."
        return
    marks = before_memory(config.base.moe.layers, config.base.memory.layers)
    yield from head(
        *("layer", "KL, MoE", "other weights minus MoE", "memory minus MoE"),
        *("other weights resemble", "memory resembles", "difference"),
    )

    def each(by_seed: Mapping[int, Result], key: str, layer: int) -> list[float]:
        return [by_seed[seed][key][layer] for seed in seeds]

    for layer, before in enumerate(marks):
        mark = " (before the memory)" if before else ""
        kls = [each(arm, "kl_by_layer", layer) for arm in (moe, again, memory)]
        places = [each(arm, "aligned", layer) for arm in (again, memory)]
        yield row(
            f"{layer}{mark}",
            fixed(fmean(kls[0]), 4),
            *(mean_and_error(_minus(more, kls[0]), 4) for more in kls[1:]),
            *(fixed(fmean(place), 2) for place in places),
            mean_and_error(_minus(places[1], places[0]), 2),
        )


def _minus(ones: list[float], others: list[float]) -> list[float]:
    return [one - other for one, other in zip(ones, others, strict=True)]


DEPTH = Comparison(
    "depth",
    _arms,
    (("memory", "moe"), ("again", "moe")),
    _measure,
    _tables,
    after={"memory": "moe", "again": "moe"},
).study
"""The depth of a memory."""
