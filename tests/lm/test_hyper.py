"""Hyper-connections: doubly stochastic mixing, DeepSeek-V4's numbers, and one stream as before."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from engraphy import Trace
from engraphy.errors import ConfigError
from engraphy.lm import LM
from engraphy.lm.hyper import ITERATIONS, HyperConnection, row_error, sinkhorn
from tests.lm.test_model import DENSE, MOE, make_memory, sample

STREAMS = dataclasses.replace(MOE, streams=4)


def logits(scale: float, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(0)
    return scale * torch.randn(500, 4, 4, dtype=dtype)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_sum_to_one_up_to_rounding_whatever_the_logits(scale, dtype):
    matrix = sinkhorn(logits(scale, dtype))
    assert (matrix >= 0).all()
    assert (matrix.sum(-2) - 1).abs().max() <= 4 * torch.finfo(dtype).eps


def test_the_row_error_falls_with_iterations():
    errors = [row_error(logits(1.0), count) for count in (1, 2, 5, 10, ITERATIONS, 40)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.05 and errors[-2] < 1e-4 and errors[-1] < 1e-8
    # Peaked logits are far from it still: 20 iterations do not make every matrix doubly stochastic.
    assert row_error(logits(10.0)) > 0.01


def test_a_doubly_stochastic_matrix_stays_and_permutations_are_reached():
    even = torch.full((4, 4), -2.0, dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(even), torch.full_like(even, 0.25))
    permutation = torch.eye(4, dtype=torch.float64)[[2, 0, 3, 1]]
    # The floor leaves 1e-6 at each of the other three.
    torch.testing.assert_close(sinkhorn(60 * permutation), permutation, rtol=0, atol=4e-6)


def test_weights_and_streams_equal_deepseek_v4s():
    modeling = pytest.importorskip(
        "transformers.models.deepseek_v4.modeling_deepseek_v4", exc_type=ImportError
    )
    config = modeling.DeepseekV4Config(hidden_size=24, hc_mult=4, hc_sinkhorn_iters=20)
    oracle = modeling.DeepseekV4HyperConnection(config)
    ours = HyperConnection(24, 4, config.rms_norm_eps)
    torch.manual_seed(0)
    with torch.no_grad():
        for mine, theirs in ((ours.mix, oracle.fn), (ours.bias, oracle.base)):
            theirs.copy_(torch.nn.init.normal_(mine, std=0.3))
        oracle.scale.copy_(ours.scale.copy_(torch.tensor([1.5, 0.7, 1.1])))
    x = torch.randn(2, 5, 4, 24)
    post, res, read = oracle(x)
    expected = post[..., None] * read.sin()[..., None, :] + res.mT @ x
    # Their divisions add 1e-6 to each sum.
    torch.testing.assert_close(ours(x, torch.sin), expected, rtol=1e-4, atol=1e-4)


def test_one_stream_is_a_plain_residual_without_parameters():
    connection = HyperConnection(8, 1, 1e-6)
    assert not list(connection.parameters())
    x = torch.randn(2, 3, 8)
    assert torch.equal(connection(x, torch.sin), x + torch.sin(x))


def test_equal_streams_with_the_static_start_behave_as_one():
    """So a fresh model of several streams is the plain one, up to its small dynamic parts."""
    torch.manual_seed(0)
    one, several = LM(DENSE), LM(dataclasses.replace(DENSE, streams=4))
    several.load_state_dict(one.state_dict(), strict=False)
    for name, parameter in several.named_parameters():
        if name.endswith("link.scale"):
            torch.nn.init.zeros_(parameter)
    ids, _, starts = sample()
    torch.testing.assert_close(several(ids, starts), one(ids, starts), rtol=1e-4, atol=1e-5)


def test_mixing_keeps_the_sum_of_the_streams():
    connection = HyperConnection(8, 4, 1e-6).double()
    torch.nn.init.normal_(connection.bias)
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    mixed = connection(x, torch.zeros_like)
    # A stream gives away a row, which sums to 1 but for the row error.
    error = float((connection.weights(x)[2].detach().sum(-1) - 1).abs().max())
    bound = (error + 1e-12) * float(x.abs().sum(2).max())
    assert bound < 0.1
    torch.testing.assert_close(mixed.sum(2), x.sum(2), rtol=0, atol=bound)


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    connection = HyperConnection(3, 2, 1e-6, iterations=5).double()
    torch.nn.init.ones_(connection.scale)
    x = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    weights = (connection.mix, connection.bias, connection.scale)

    def mixed(x: Tensor, *_: Tensor) -> Tensor:
        return connection(x, torch.sin)

    assert torch.autograd.gradcheck(mixed, (x, *weights))


def test_the_memory_acts_on_each_stream_through_its_own_gate():
    torch.manual_seed(0)
    model = LM(STREAMS, make_memory(streams=4)).eval()
    ids, targets, starts = sample()
    trace = Trace()
    assert torch.equal(model(ids, starts, trace=trace), model(ids, starts))
    gates = trace.gates[1]
    assert gates.shape == (3, 16, 4)
    assert ((gates[..., 1:] - gates[..., :1]).abs().amax((0, 1)) > 0.01).all()
    seen: dict[str, Tensor] = {}
    model.blocks[0].register_forward_hook(lambda _, __, out: seen.update(before=out))
    model.blocks[1].register_forward_pre_hook(lambda _, args: seen.update(after=args[0]))
    model.train().loss(ids, targets, starts).backward()
    changed = (seen["after"] - seen["before"]).abs().amax((0, 1, 3))
    assert changed.shape == (4,) and (changed > 0.01).all()
    assert model.memory is not None
    (grad,) = model.memory.drain_row_grads()
    assert grad.layer == 1


@pytest.mark.parametrize("streams", [1, 2])
def test_a_memory_with_other_streams_is_refused(streams):
    with pytest.raises(ConfigError, match="streams 4"):
        LM(STREAMS, make_memory(streams=streams))
