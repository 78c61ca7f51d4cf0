"""MoE: equal to a plain loop over experts, drops nothing, and stays balanced."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engraphy.lm.moe import MoE, grouped_matmul, swiglu

HIDDEN, EXPERTS, TOP_K, WIDTH, SHARED = 12, 6, 2, 5, 7


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh buffers hold NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_moe(seed: int = 0, shared: int = SHARED, experts: int = EXPERTS) -> MoE:
    torch.manual_seed(seed)
    return MoE(HIDDEN, experts, TOP_K, WIDTH, shared)


def plain_loop(moe: MoE, x_BTD: torch.Tensor) -> torch.Tensor:
    """The specification: every expert over its tokens, one after the other."""
    x_ND = x_BTD.reshape(-1, HIDDEN)
    score_NE = torch.sigmoid(x_ND @ moe.router.weight.t())
    chosen_NK = (score_NE + moe.balance).topk(moe.top_k).indices
    weight_NK = score_NE.gather(1, chosen_NK)
    weight_NK = weight_NK / weight_NK.sum(1, keepdim=True)
    out = torch.zeros_like(x_ND) if moe.shared is None else moe.shared(x_ND)
    for expert in range(moe.experts):
        token, slot = (chosen_NK == expert).nonzero(as_tuple=True)
        gate, up = (x_ND[token] @ moe.gate_up[expert]).chunk(2, dim=-1)
        routed = (F.silu(gate) * up) @ moe.down[expert]
        out = out.index_put((token,), routed * weight_NK[token, slot, None], accumulate=True)
    return out.view_as(x_BTD)


def outputs_and_gradients(function, moe: MoE, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    out = function(x)
    weights = [x, *moe.parameters()]
    return [
        out,
        *torch.autograd.grad((out * torch.arange(out.numel()).view_as(out).cos()).sum(), weights),
    ]


@pytest.mark.parametrize("shared", [SHARED, 0])
def test_outputs_and_gradients_equal_a_loop_over_experts(shared):
    moe = make_moe(shared=shared).eval()
    moe.balance.copy_(torch.linspace(-0.3, 0.3, EXPERTS))
    x = torch.randn(3, 11, HIDDEN)
    ours = outputs_and_gradients(moe, moe, x)
    plain = outputs_and_gradients(lambda x: plain_loop(moe, x), moe, x)
    for found, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_experts_without_tokens_get_zero_gradients():
    moe = make_moe().eval()
    moe.balance.copy_(torch.tensor([9.0, 9, 0, 0, 0, 0]))
    x = torch.randn(2, 4, HIDDEN)
    ours = outputs_and_gradients(moe, moe, x)
    plain = outputs_and_gradients(lambda x: plain_loop(moe, x), moe, x)
    for found, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    grad_gate_up = ours[1 + 1 + [name for name, _ in moe.named_parameters()].index("gate_up")]
    assert grad_gate_up[:2].abs().sum() > 0 and grad_gate_up[2:].abs().sum() == 0


def test_grouped_matmul_passes_gradcheck_with_empty_groups():
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: grouped_matmul(x, w, [3, 0, 4, 0]), (x, weight))


def test_no_token_is_dropped_when_all_choose_the_same_experts():
    moe = make_moe(shared=0).eval()
    moe.balance.copy_(torch.tensor([9.0, 9, 0, 0, 0, 0]))
    x = torch.randn(1, 40, HIDDEN)
    out = moe(x)
    assert (out.abs().sum(-1) > 0).all()
    torch.testing.assert_close(out, plain_loop(moe, x), rtol=1e-4, atol=1e-5)


def test_balance_changes_the_choice_but_not_the_weights():
    moe = make_moe(shared=0).eval()
    x = torch.randn(1, 9, HIDDEN)
    before = moe(x)
    moe.balance.add_(5.0)
    torch.testing.assert_close(moe(x), before)
    moe.balance[0] += 100.0
    chosen_NK, _ = moe._route(x.flatten(0, 1))
    assert (chosen_NK == 0).any(dim=1).all()


def test_balance_moves_by_the_clamped_load_error_in_training_only():
    moe = make_moe(experts=8)
    x = torch.randn(2, 16, HIDDEN)
    moe.eval()(x)
    with torch.no_grad():
        moe.train()(x)
    moe.rebalance()
    assert moe.balance.abs().sum() == 0 and moe.load is None
    moe.balance[0] = 9.0
    before = moe.balance.clone()
    moe(x)
    assert torch.equal(
        moe.balance, before
    )  # a forward alone moves nothing: activation checkpointing runs it twice
    moe.rebalance()
    load = torch.bincount(plain_choice(moe, x, before), minlength=8)
    torch.testing.assert_close(moe.load, load)
    expected = before + 0.02 * (1 - load / load.float().mean()).clamp(-3, 1)
    torch.testing.assert_close(moe.balance, expected)
    assert load[0] == 32 and moe.balance[0] == pytest.approx(9.0 - 0.02 * 3)


def plain_choice(moe: MoE, x: torch.Tensor, balance: torch.Tensor) -> torch.Tensor:
    scores = torch.sigmoid(x.flatten(0, 1) @ moe.router.weight.t()).detach()
    return (scores + balance).topk(moe.top_k).indices.flatten()


def worst_load(steps: int, first: int) -> float:
    """The largest share of an expert over its equal share from step `first` on, while a toy problem
    is learnt."""
    torch.manual_seed(0)
    moe = MoE(16, experts=16, top_k=2, expert_width=8, shared_width=8)
    teacher, centres = torch.randn(16, 16), torch.randn(3, 16)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=6e-3)
    worst = 0.0
    for step in range(steps):
        # Few kinds of tokens: left alone, few experts take them all.
        x = centres[torch.randint(3, (4, 64))] + 0.5 * torch.randn(4, 64, 16)
        F.mse_loss(moe(x), torch.tanh(x @ teacher)).backward()
        optimizer.step()
        optimizer.zero_grad()
        moe.rebalance()
        assert moe.load is not None
        if step >= first:
            worst = max(worst, float(moe.load.max() / moe.load.float().mean()))
    return worst


def test_after_warm_up_no_expert_takes_more_than_two_and_a_half_shares(monkeypatch):
    assert worst_load(steps=150, first=60) < 2.5
    monkeypatch.setattr("engraphy.lm.moe.BALANCE_RATE", 0.0)
    assert worst_load(steps=150, first=60) > 3


def test_activation_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    moe, x = make_moe(experts=8).train(), torch.randn(2, 64, HIDDEN)
    moe(x).square().sum().backward()
    plain = moe.gate_up.grad.clone()
    moe.gate_up.grad = None
    torch.utils.checkpoint.checkpoint(moe, x, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(moe.gate_up.grad, plain)


def test_state_dict_carries_the_balance():
    moe = make_moe()
    for _ in range(3):
        moe(torch.randn(2, 16, HIDDEN))
        moe.rebalance()
    assert moe.balance.abs().sum() > 0
    other = make_moe(seed=1)
    other.load_state_dict(moe.state_dict())
    x = torch.randn(1, 5, HIDDEN)
    assert torch.equal(other.balance, moe.balance) and torch.equal(other.eval()(x), moe.eval()(x))


def test_autocast_to_bfloat16_stays_close_and_learns():
    moe = make_moe().train()
    x = torch.randn(2, 8, HIDDEN)
    expected = plain_loop(moe, x)
    with torch.autocast("cpu", torch.bfloat16):
        out = moe(x)
    out.float().sum().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == p.dtype
        for p in moe.parameters()
    )
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 64), (0, 8)])
def test_swiglu_and_its_gradient_are_torchs_bit_for_bit(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator).to(dtype)
    mine, theirs = (values.clone().requires_grad_() for _ in range(2))
    gate, up = theirs.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    found = swiglu(mine)
    grad = torch.randn(found.shape, generator=generator).to(dtype)
    expected.backward(grad)
    found.backward(grad)
    assert torch.equal(found, expected) and torch.equal(mine.grad, theirs.grad)
