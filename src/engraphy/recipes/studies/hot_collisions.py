"""How far collisions move the rows of frequent n-grams in a memory that hashes all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ...addresses.hot import HotIndex
from ...lm.loop import Run
from ...memory.memory import EngramMemory
from ...rows.read import read

STEPS = 100
"""Steps that are watched."""
PROGRESS = 0.5
"""These steps train at the rate that a run has at this share of it."""


class Collisions(NamedTuple):
    """What others did to the rows of frequent n-grams between two readings.

    Attributes:
        share: Root mean square of the change, as a share of the rows' own.
        change: Root mean square of the change.
        readings: Rows that were read again.
    """

    share: float
    change: float
    readings: int


class _Reading(NamedTuple):
    """The frequent n-grams of one order in a batch, each once, and their rows in one layer.

    Attributes:
        slots: Their slots [N].
        ids_NK: Their rows.
        rows_NKd: What these hold, f32.
        slots_M: The slot of the n-gram at each position, -1 = none.
    """

    slots: np.ndarray
    ids_NK: np.ndarray
    rows_NKd: np.ndarray
    slots_M: np.ndarray


class _Watched:
    """Rows of the n-grams of one order in one layer, as each n-gram itself left them."""

    def __init__(self, slots: int, heads: int, dim: int) -> None:
        self.left_SKd = np.zeros((slots, heads, dim), dtype=np.float32)
        self.seen_S = np.zeros(slots, dtype=bool)
        self.squares = np.zeros(3)  # of changes, of values; and the number of values

    def compare(self, reading: _Reading) -> None:
        """Adds what others have changed."""
        again_N = self.seen_S[reading.slots]
        rows_NKd = reading.rows_NKd[again_N]
        changes_NKd = rows_NKd - self.left_SKd[reading.slots[again_N]]
        self.squares += (np.square(changes_NKd).sum(), np.square(rows_NKd).sum(), rows_NKd.size)

    def keep(self, reading: _Reading, others_NK: np.ndarray, rows_NKd: np.ndarray) -> None:
        """Notes the rows after a step, less what others did to them in it.

        Args:
            reading: Before the step.
            others_NK: Share of the step that is due to others.
            rows_NKd: After it.
        """
        step_NKd = rows_NKd - reading.rows_NKd
        self.left_SKd[reading.slots] = rows_NKd - others_NK[..., None] * step_NKd
        self.seen_S[reading.slots] = True


def collisions(run: Run, frequent: HotIndex, steps: int = STEPS) -> Collisions:
    """Trains a run on, and watches the rows that frequent n-grams read.

    The next time that an n-gram reads a row, the row differs from what the n-gram itself left
    there: other n-grams have moved it, in later steps and in the same one. That is the noise of
    collisions as a reader meets it. A step with gradients of several n-grams is divided by their
    norms: others have |G - g| / (|G - g| + |g|) of it, if g is the n-gram's own and G the row's.

    Args:
        run: A memory that hashes all n-grams, at the end of its training. It is trained further.
        frequent: The n-grams to watch.
        steps: Steps to train.
    """
    memory = run.model.memory
    assert memory is not None
    slots, heads, dim = frequent.spec.slots, memory.config.hash.heads, memory.config.dim
    watched = {
        (layer, order): _Watched(slots, heads, dim)
        for layer in memory.layers
        for order in frequent.orders
    }
    for step in range(run.step_index, run.step_index + steps):
        batch = run.batches[step]
        ids_BT, starts_BT = batch.ids_BT.numpy(), batch.starts_BT.numpy()
        windows_BTN, _ = memory.addresser.windows(ids_BT, starts=starts_BT)
        windows_MN = windows_BTN.reshape(-1, windows_BTN.shape[-1])
        readings = {
            (layer, order): _reading(memory, layer, windows_MN[:, -order:], frequent)
            for layer, order in watched
        }
        for key, rows in watched.items():
            rows.compare(readings[key])
        run.model.train()
        run.model.loss(*batch).backward()
        others = {key: _others(memory, *key, readings[key]) for key in watched}
        run.pair.step(PROGRESS)
        run.model.rebalance()
        for (layer, order), rows in watched.items():
            reading = readings[layer, order]
            after_NKd = _read(memory, layer, reading.ids_NK)
            rows.keep(reading, others[layer, order], after_NKd)
    run.model.eval()
    return _summed([rows.squares for rows in watched.values()], dim)


def _summed(squares: Sequence[np.ndarray], dim: int) -> Collisions:
    changed, squared, values = np.sum(squares, axis=0).tolist()
    if not values:
        return Collisions(0.0, 0.0, 0)
    share = math.sqrt(changed / squared) if squared else 0.0
    return Collisions(share, math.sqrt(changed / values), int(values) // dim)


def _reading(memory: EngramMemory, layer: int, ids_Mn: np.ndarray, frequent: HotIndex) -> _Reading:
    slots_M = frequent.slots_of(ids_Mn)
    slots, places = np.unique(slots_M, return_index=True)
    hot_N = slots >= 0
    ids_NK = memory.addresser.ngram_rows(ids_Mn[places[hot_N]], layer)
    return _Reading(slots[hot_N], ids_NK, _read(memory, layer, ids_NK), slots_M)


def _read(memory: EngramMemory, layer: int, ids_NK: np.ndarray) -> np.ndarray:
    """Rows, f32 [N, K, d]."""
    out = np.empty((*ids_NK.shape, memory.config.dim), dtype=np.float32)
    return read(memory.stores[layer], ids_NK, memory.format, out)


def _others(memory: EngramMemory, layer: int, order: int, reading: _Reading) -> np.ndarray:
    """f32 [N, K]: the share of the coming step of each row that is due to other n-grams."""
    spec = memory.config.hash
    (waiting,) = [entry for entry in memory.row_grads if entry.layer == layer]
    columns = (len(reading.slots_M), spec.columns)
    ids_MC, grad_MCd = waiting.ids.reshape(columns), waiting.grad.reshape(*columns, -1)
    hot_M = reading.slots_M >= 0
    owners = np.searchsorted(reading.slots, reading.slots_M[hot_M])
    first = spec.orders.index(order) * spec.heads
    shares = np.empty(reading.ids_NK.shape, dtype=np.float32)
    for head in range(spec.heads):
        ids_M, grad_Md = ids_MC[:, first + head], grad_MCd[:, first + head]
        rows, places = np.unique(ids_M, return_inverse=True)
        whole_Rd = _sums(len(rows), places, grad_Md)
        own_Nd = _sums(len(reading.slots), owners, grad_Md[hot_M])
        rest_Nd = whole_Rd[np.searchsorted(rows, reading.ids_NK[:, head])] - own_Nd
        own_N, rest_N = np.linalg.norm(own_Nd, axis=-1), np.linalg.norm(rest_Nd, axis=-1)
        shares[:, head] = rest_N / np.maximum(own_N + rest_N, np.finfo(np.float32).tiny)
    return shares


def _sums(count: int, places_M: np.ndarray, values_Md: np.ndarray) -> np.ndarray:
    """Sums of the values at each place, f64 [count, d]."""
    sums = np.zeros((count, values_Md.shape[-1]))
    np.add.at(sums, places_M, values_Md)
    return sums
