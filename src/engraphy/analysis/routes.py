"""Losses and gates by route: whether the n-grams that end at a token are among some frequent ones.

The routes depend on the text and the frequent n-grams alone. So models with and without a memory,
whatever it does with these n-grams, are compared on the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..addresses.addresser import Addresser
from ..addresses.hot import HotIndex
from ..data.packing import Batch
from ..lm.controls import fixed_gate
from ..lm.model import LM
from ..memory.lookup import Trace

ALL = "all"
"""All tokens."""
HOT = "hot"
"""Tokens at which an n-gram of any order is frequent."""
COLD = "cold"
"""Tokens at which none is."""
BUCKETS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Bounds of the buckets of gates."""


class Readings(NamedTuple):
    """What a model does at some tokens.

    Attributes:
        losses_M: Nats of the next token, f64.
        gates_M: Mean gate over layers and streams, f64; None without a memory.
    """

    losses_M: np.ndarray
    gates_M: np.ndarray | None


@dataclass(frozen=True)
class RoutedText:
    """Batches of a text, and the route of each token that has a target.

    Attributes:
        batches: The batches.
        orders: Orders of n-grams, ascending.
        routes_M: int64, the highest order whose n-gram is frequent; 0 = none.
    """

    batches: list[Batch]
    orders: tuple[int, ...]
    routes_M: np.ndarray

    @classmethod
    def of(cls, batches: Iterable[Batch], addresser: Addresser, frequent: HotIndex) -> RoutedText:
        """The routes of batches.

        Args:
            batches: The text.
            addresser: Says which n-grams end at a token.
            frequent: The frequent n-grams.
        """
        kept = list(batches)
        parts = [_routes(batch, addresser, frequent) for batch in kept]
        return cls(kept, frequent.orders, np.concatenate(parts))

    def groups(self) -> dict[str, np.ndarray]:
        """bool [M] by the name of a group: ALL, HOT, by the highest order, COLD. Empty ones are
        left out."""
        named = {ALL: self.routes_M >= 0, HOT: self.routes_M > 0}
        for order in reversed(self.orders):
            named[f"{order}-gram"] = self.routes_M == order
        named[COLD] = self.routes_M == 0
        return {name: inside_M for name, inside_M in named.items() if inside_M.any()}

    def shares(self) -> dict[str, float]:
        """The share of the tokens in each group."""
        return {name: float(inside_M.mean()) for name, inside_M in self.groups().items()}

    def means(self, values_M: np.ndarray) -> dict[str, float]:
        """The mean of each group."""
        groups = self.groups().items()
        return {name: float(values_M[inside_M].mean()) for name, inside_M in groups}

    def read(self, model: LM) -> Readings:
        """Runs a model over the text."""
        losses: list[Tensor] = []
        gates: list[Tensor] = []
        model.eval()
        for batch in self.batches:
            trace = None if model.memory is None else Trace()
            kept_BT = batch.targets_BT >= 0
            losses.append(model.token_losses(*batch, trace=trace)[kept_BT])
            if trace is not None:
                gate_BT = torch.stack([gate_BTS.mean(-1) for gate_BTS in trace.gates.values()])
                gates.append(gate_BT.mean(0)[kept_BT])
        return Readings(_joined(losses), _joined(gates) if gates else None)


def by_route(model: LM, text: RoutedText) -> dict[str, dict[str, float]]:
    """Mean losses and gates by route; gates are missing without a memory."""
    readings = text.read(model)
    means = {"loss": text.means(readings.losses_M)}
    if readings.gates_M is not None:
        means["gate"] = text.means(readings.gates_M)
    return means


def gate_report(model: LM, text: RoutedText) -> dict[str, Any]:
    """What the gates of a model with a memory are worth, token by token.

    The gate of all tokens is fixed at 0, then at 1. A gate is wrong if it lies nearer to the end
    with the higher loss. What is known afterwards: the lowest of the three losses at each token.

    Returns:
        A dict of JSON values:
        buckets: by bounds of the gate: share of the tokens, loss, and the losses at 0 and 1.
        by_route: by route: mean gate, loss, losses at 0 and 1, share of wrong gates, and the loss
        at the best of the three gates of each token.
    """
    assert model.memory is not None
    learned = text.read(model)
    ends = []
    for alpha in (0.0, 1.0):
        with fixed_gate(model.memory, alpha):
            ends.append(text.read(model).losses_M)
    closed_M, opened_M = ends
    assert learned.gates_M is not None
    gates_M, losses_M = learned.gates_M, learned.losses_M
    wrong_M = np.where(gates_M < 0.5, opened_M < closed_M, closed_M < opened_M)
    values = {
        "gate": gates_M,
        "loss": losses_M,
        "closed": closed_M,
        "opened": opened_M,
        "wrong": wrong_M.astype(np.float64),
        "best": np.minimum(np.minimum(closed_M, opened_M), losses_M),
    }
    buckets = {
        f"{low:g}-{high:g}": (gates_M >= low) & ((gates_M < high) | (high == 1))
        for low, high in zip(BUCKETS, BUCKETS[1:], strict=False)
    }
    return {"by_route": _means(text.groups(), values), "buckets": _means(buckets, values)}


def _means(
    groups: dict[str, np.ndarray], values: dict[str, np.ndarray]
) -> dict[str, dict[str, float]]:
    means: dict[str, dict[str, float]] = {}
    for name, inside_M in groups.items():
        if inside_M.any():
            mean = {what: float(values_M[inside_M].mean()) for what, values_M in values.items()}
            means[name] = {"share": float(inside_M.mean()), **mean}
    return means


def _routes(batch: Batch, addresser: Addresser, frequent: HotIndex) -> np.ndarray:
    """Routes of the tokens of a batch that have a target, int64 [M]."""
    windows_BTN, _ = addresser.windows(batch.ids_BT.numpy(), starts=batch.starts_BT.numpy())
    routes_BT = np.zeros(batch.ids_BT.shape, dtype=np.int64)
    for order in frequent.orders:
        hot_BT = frequent.slots_of(windows_BTN[..., -order:]) >= 0
        routes_BT[hot_BT] = order
    return routes_BT[batch.targets_BT.numpy() >= 0]


def _joined(parts: list[Tensor]) -> np.ndarray:
    return torch.cat(parts).double().numpy()
