"""LogitLens equals a case solved by hand, and what a model says at its last layer."""

from __future__ import annotations

import math

import pytest
import torch

from engraphy.analysis.logitlens import before_memory, logit_lens
from engraphy.errors import InputError


def test_the_divergence_is_that_of_a_case_solved_by_hand():
    # Two tokens in the vocabulary; the head returns the state as logits.
    #   layer 0: logits (0, 0)      -> p = (1/2, 1/2)
    #   final:   logits (ln 3, 0)   -> q = (3/4, 1/4)
    #   KL(p || q) = 1/2 ln((1/2) / (3/4)) + 1/2 ln((1/2) / (1/4))
    #              = 1/2 ln(2/3) + 1/2 ln 2 = 1/2 ln(4/3) = 0.143841...
    # KL(q || p) would be 3/4 ln(3/2) + 1/4 ln(1/2) = 0.130812...
    first = torch.tensor([[[0.0, 0.0]]])
    last = torch.tensor([[[math.log(3), 0.0]]])
    lens = logit_lens([first, last], lambda state: state)
    assert lens.kl_LBT.flatten().tolist() == pytest.approx([0.5 * math.log(4 / 3), 0.0], abs=1e-7)
    assert lens.top_LBT[1, 0, 0] == 0


def test_a_head_is_applied_to_the_states_and_not_to_their_sum():
    # Two tokens, a head that doubles. Token 0: layer (0, 0), final (ln 3, 0) / 2, so the logits are
    # those of the case above: 1/2 ln(4/3). Token 1: both layers equal: 0. Mean: 1/4 ln(4/3).
    first = torch.tensor([[[0.0, 0.0], [1.0, -1.0]]])
    last = torch.tensor([[[math.log(3) / 2, 0.0], [1.0, -1.0]]])
    lens = logit_lens([first, last], lambda state: 2 * state)
    assert lens.by_layer() == pytest.approx([0.25 * math.log(4 / 3), 0.0], abs=1e-7)


def test_a_shift_of_all_logits_changes_nothing_and_no_divergence_is_negative():
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(2, 5, 7, generator=generator) for _ in range(4)]
    one = logit_lens(states, lambda state: state)
    other = logit_lens(states, lambda state: state + 3)
    torch.testing.assert_close(one.kl_LBT, other.kl_LBT, atol=1e-6, rtol=0)
    assert one.kl_LBT.shape == (4, 2, 5)
    assert (one.kl_LBT[:-1] > 0).all() and (one.kl_LBT[-1] == 0).all()


def test_layers_before_the_first_memory_are_marked():
    assert before_memory(4, (1, 3)) == (True, False, False, False)
    assert before_memory(3, (2,)) == (True, True, False)
    assert before_memory(3, (0,)) == before_memory(3, ()) == (False, False, False)
    states = [torch.zeros(1, 1, 2)] * 3
    assert logit_lens(states, lambda state: state, (1,)).before_memory == (True, False, False)
    with pytest.raises(InputError, match="at least one layer"):
        logit_lens([], lambda state: state)
