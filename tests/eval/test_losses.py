"""The held-out loop, against walking the documents by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engraphy.data.packing import IGNORED, Batch, Batches
from engraphy.eval.bands import NgramCounts
from engraphy.eval.losses import Losses, heldout_losses, heldout_parts

END, VOCAB = 0, 7


def batches_of(documents: list[np.ndarray]) -> Batches:
    return Batches(documents, END, batch=3, tokens=5, seed=None)


@pytest.fixture
def documents():
    random = np.random.default_rng(0)
    return [random.integers(1, VOCAB, size=n).astype(np.int32) for n in (1, 12, 4, 5, 9, 2)]


def by_ids(batch: Batch) -> torch.Tensor:
    """Losses that tell which token predicted which: 10 * token + target. Anything where there is
    none."""
    losses_BT = 10.0 * batch.ids_BT + batch.targets_BT
    return losses_BT.where(batch.targets_BT != IGNORED, torch.nan)


class Model:
    """What `Losses` needs of a model."""

    def __init__(self):
        self.training = True

    def eval(self):
        self.training = False
        return self

    def token_losses(self, ids_BT, targets_BT, starts_BT):
        assert not self.training and not torch.is_grad_enabled()
        return by_ids(Batch(ids_BT, targets_BT, starts_BT))


@pytest.mark.parametrize("ends", [True, False])
def test_every_target_is_measured_once_and_belongs_to_its_document(documents, ends):
    losses, owners = heldout_losses(by_ids, batches_of(documents), ends=ends)
    expected, documents_of = [], []
    for index, ids in enumerate(documents, start=1):
        whole = [END, *ids.tolist(), *([END] if ends else [])]
        expected += [10 * a + b for a, b in zip(whole[:-1], whole[1:], strict=True)]
        documents_of += [index] * (len(whole) - 1)
    assert losses.tolist() == expected and losses.dtype == np.float64
    assert owners.tolist() == documents_of


def test_the_loop_asks_a_batch_at_a_time_without_gradients(documents):
    weight, seen = torch.ones((), requires_grad=True), []

    def measured(batch: Batch) -> torch.Tensor:
        seen.append(batch)
        return by_ids(batch) * weight

    parts = heldout_parts(measured, batches_of(documents))
    first = next(parts)
    assert len(seen) == 1 and not first.losses_M.requires_grad
    assert 1 + len(list(parts)) == len(seen) == len(batches_of(documents))


def test_a_function_and_a_model_give_the_same_losses(documents):
    counts = NgramCounts(documents[:3], END, VOCAB)
    one = Losses(Model(), batches_of(documents), counts)
    other = Losses(by_ids, batches_of(documents), counts)
    assert one.mean() == other.mean() and one.by_bucket() == other.by_bucket()
    assert one.documents.tolist() == other.documents.tolist()
    # Each count is the one of the target it stands beside.
    trained = {tuple(gram) for ids in documents[:3] for gram in grams([END, *ids.tolist(), END])}
    assert (one.counts > 0).any() and (one.counts == 0).any() and (one.counts == -1).any()
    for part in heldout_parts(by_ids, batches_of(documents)):
        found = counts.count(*part.batch)
        for row, at in np.argwhere(found > 0):
            ids = part.batch.ids_BT[row, at - 1 : at + 1].tolist()
            assert (*ids, int(part.batch.targets_BT[row, at])) in trained


def grams(ids: list[int]) -> list[list[int]]:
    return [ids[at : at + 3] for at in range(len(ids) - 2)]


def test_a_batch_without_a_target_keeps_its_other_targets(documents):
    batch = batches_of(documents)[0]
    found = batch.without_target(END)
    gone = batch.targets_BT == END
    assert gone.any() and (found.targets_BT[gone] == IGNORED).all()
    assert torch.equal(found.targets_BT[~gone], batch.targets_BT[~gone])
    assert torch.equal(found.ids_BT, batch.ids_BT) and torch.equal(found.starts_BT, batch.starts_BT)
