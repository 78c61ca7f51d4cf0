"""CKA equals cases solved by hand, and does not change where the definition says so."""

from __future__ import annotations

import math

import pytest
import torch

from engraphy.analysis.cka import MinibatchCKA, hsic, soft_alignment
from engraphy.errors import ConfigError, InputError

# Four samples of one value. The kernel of x has one pair of entries off the diagonal, at (1, 2);
# that of y has one at (1, 3).
X = torch.tensor([[1.0], [1.0], [0.0], [0.0]], dtype=torch.float64)
Y = torch.tensor([[1.0], [0.0], [1.0], [0.0]], dtype=torch.float64)


def cka(*batches) -> float:
    sums = MinibatchCKA(1, 1)
    for left, right in batches:
        sums.add([left], [right])
    return float(sums.similarity())


def test_hsic_is_that_of_a_case_solved_by_hand():
    # n = 4. K = L = xx' without its diagonal: ones at (1, 2) and (2, 1).
    #   tr(KL) = 2;  1'K1 1'L1 / ((n-1)(n-2)) = 2*2/6 = 2/3;  2/(n-2) 1'KL1 = 2/2 * 2 = 2
    #   HSIC(K, K) = (2 + 2/3 - 2) / (4*1) = 1/6
    # L of y: ones at (1, 3) and (3, 1).
    #   tr(KL) = 0;  2*2/6 = 2/3;  K1 = (1,1,0,0), L1 = (1,0,1,0): 2/2 * 1 = 1
    #   HSIC(K, L) = (0 + 2/3 - 1) / 4 = -1/12
    assert hsic(X @ X.T, X @ X.T) == pytest.approx(1 / 6)
    assert hsic(X @ X.T, Y @ Y.T) == pytest.approx(-1 / 12)


def test_cka_sums_the_batches_before_it_divides():
    # One batch (x, y): (-1/12) / sqrt(1/6 * 1/6) = -1/2: an unbiased estimate may be negative.
    assert cka((X, Y)) == pytest.approx(-1 / 2)
    # Batches (x, x) and (x, y): (1/6 - 1/12) / sqrt((1/6 + 1/6)(1/6 + 1/6)) = (1/12) / (1/3) = 1/4.
    # The mean of the two CKAs, 1 and -1/2, would give 1/4 as well, so the second batch is scaled:
    # (x, 2y): HSIC(K, L) is linear in L = 4 yy', so cross = -1/3, self = 1/6 and 16/6.
    #   (1/6 - 1/3) / sqrt((1/6 + 1/6)(1/6 + 16/6)) = (-1/6) / sqrt(1/3 * 17/6) = -1 / sqrt(34)
    assert cka((X, X), (X, Y)) == pytest.approx(1 / 4)
    assert cka((X, X), (X, 2 * Y)) == pytest.approx(-1 / math.sqrt(34))


def test_the_soft_alignment_is_that_of_a_case_solved_by_hand():
    # The five most similar of six layers: 0.1, 0.2, 0.3, 0.4, 0.5 at the places 0 to 4.
    #   (0*0.1 + 1*0.2 + 2*0.3 + 3*0.4 + 4*0.5) / 1.5 = 4.0 / 1.5 = 8/3
    row = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.05]])
    assert float(soft_alignment(row)) == pytest.approx(8 / 3)
    # The two most similar: (3*0.4 + 4*0.5) / 0.9 = 32/9.
    assert float(soft_alignment(row, top=2)) == pytest.approx(32 / 9)
    # A similarity below zero has no weight; no similarity at all has no place.
    assert float(soft_alignment(torch.tensor([[0.5, -0.5, 0.5]]))) == pytest.approx(1.0)
    assert math.isnan(float(soft_alignment(torch.tensor([[-0.5, 0.0]]))))
    with pytest.raises(ConfigError, match="top"):
        soft_alignment(row, top=0)


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_rotation_scaling_and_shift_of_the_states_change_nothing():
    left, right = random(2, 15, 6), random(2, 15, 4, seed=1)
    right = right + left[..., :4]
    turn = torch.linalg.qr(random(6, 6, seed=2))[0]
    assert cka((left, left)) == pytest.approx(1.0, abs=1e-12)
    similarity = cka((left, right))
    assert 0.1 < similarity < 0.95
    for changed in (left @ turn, 1e3 * left, left + random(6, seed=3), left @ turn / 7 + 5):
        assert cka((changed, right)) == pytest.approx(similarity, abs=1e-9)
    stretch = torch.diag(torch.arange(1.0, 7.0, dtype=torch.float64))
    assert abs(cka((left @ stretch, right)) - similarity) > 1e-3


def test_independent_states_are_not_similar_on_average_however_wide_they_are():
    """The biased estimator would give 0.97 here: 64 values a sample, 16 samples."""
    found = cka(*((random(16, 64, seed=at), random(16, 64, seed=100 + at)) for at in range(60)))
    assert abs(found) < 0.05


def test_the_layers_of_a_model_are_placed_among_those_of_a_deeper_one():
    deep = [random(40, 8)]
    for seed in range(1, 7):
        deep.append(deep[-1] + 0.7 * random(40, 8, seed=seed))
    sums = MinibatchCKA(2, 7)
    sums.add([deep[1], deep[5]], deep)
    alignment = sums.alignment(memory_layers=(1,))
    assert alignment.similarity_LR.argmax(1).tolist() == [1, 5]
    assert alignment.similarity_LR[0, 1] == pytest.approx(1.0)
    assert alignment.aligned_L[0] + 1 < alignment.aligned_L[1]
    assert alignment.before_memory == (True, False)


def test_what_does_not_fit_is_refused():
    sums = MinibatchCKA(1, 1)
    with pytest.raises(InputError, match="4 or more samples"):
        sums.add([X[:3]], [Y[:3]])
    with pytest.raises(InputError, match="same"):
        sums.add([random(5, 2)], [random(6, 2)])
    with pytest.raises(InputError, match=r"\(1, 1\) layers, found \(2, 1\)"):
        sums.add([X, X], [Y])
    with pytest.raises(InputError, match="left layers .0.: expected states that vary"):
        sums.similarity()
    sums.add([X], [torch.ones(4, 3)])
    with pytest.raises(InputError, match="right layers .0."):
        sums.similarity()
