"""Does a memory make a model deeper (paper, section 5.1)? Pairs of one seed and one rate.

LogitLens: how far each layer is from the end, KL(layer || final). CKA: which layer of the mixture
of experts each layer of the memory arm resembles, a soft alignment over the five most similar. The
mean of five places is not the layer's own place even for equal models. So the mixture of experts is
aligned with itself, too, and the difference counts: a layer that resembles a later one than that
has more done already. Layers before the memory are marked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

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
    return {"moe": ArmRecipe("MoE", "moe"), "memory": ArmRecipe("MoE + memory")}


def _measure(trained: Trained) -> Result:
    """LogitLens of the arm; of the memory arm its alignment with the mixture of experts, too."""
    batches = [spread(trained.corpus.heldout_batches(), READ)]
    result: Result = {"kl_by_layer": kl_by_layer(trained.model, batches)}
    memory = trained.model.memory
    if memory is not None:
        other = trained.partner("moe").model
        depth = len(other.blocks)
        cka, itself = MinibatchCKA(depth, depth), MinibatchCKA(depth, depth)
        for batch in _parts(batches):
            others = states(other, batch)
            cka.add(states(trained.model, batch), others)
            itself.add(others, others)
        alignment = cka.alignment(memory.layers)
        result["aligned"] = alignment.aligned_L.tolist()
        result["itself_aligned"] = itself.alignment().aligned_L.tolist()
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
    """KL of both arms, and where the memory arm's layers lie among the other's."""
    moe, memory = runs.get("moe", {}), runs.get("memory", {})
    seeds = sorted(moe.keys() & memory.keys())
    if not seeds:
        yield "No pair has run."
        return
    marks = before_memory(config.base.moe.layers, config.base.memory.layers)
    yield from head(
        *("layer", "KL, MoE", "KL, MoE + memory", "difference"),
        *("memory resembles", "MoE resembles itself", "difference"),
    )
    for layer, before in enumerate(marks):
        mark = " (before the memory)" if before else ""
        cells = []
        for results, key, other, digits in (
            (moe, "kl_by_layer", "kl_by_layer", 4),
            (memory, "itself_aligned", "aligned", 2),
        ):
            one = [results[seed][key][layer] for seed in seeds]
            two = [memory[seed][other][layer] for seed in seeds]
            more = [b - a for a, b in zip(one, two, strict=True)]
            means = [fixed(sum(values) / len(seeds), digits) for values in (one, two)]
            cells.append((*means, mean_and_error(more, digits)))
        (kl_moe, kl_memory, kl_more), (itself, resembles, later) = cells
        yield row(f"{layer}{mark}", kl_moe, kl_memory, kl_more, resembles, itself, later)


DEPTH = Comparison(
    "depth", _arms, (("memory", "moe"),), _measure, _tables, after={"memory": "moe"}
).study
"""The depth of a memory."""
