"""A plan for one decoded token notices whatever changes what the layer computes."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from engraphy import EngramConfig, EngramMemory, HashSpec, LayerSpec, VocabMap, _native
from engraphy.fusion import tensors
from engraphy.fusion.layer import EngramLayer
from engraphy.memory.lookup import TokenLookup

pytestmark = pytest.mark.skipif(_native.core is None, reason=_native.reason)

LAYERS = (1, 4)


@pytest.fixture(params=["in C", "in Python"])
def answers(request, monkeypatch) -> Iterator[str]:
    """How tensors say where they lie."""
    tensors.introduce_tensors.cache_clear()
    with monkeypatch.context() as patch:
        if request.param == "in Python":
            patch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", None, raising=False)
            assert not tensors.introduce_tensors()
        yield request.param
    tensors.introduce_tensors.cache_clear()
    tensors.introduce_tensors()


def make_memory() -> EngramMemory:
    spec = HashSpec.demo(LAYERS, (2, 3), 2, 53, vocab_size=40, pad_id=0)
    config = EngramConfig(spec, LayerSpec(16, spec.columns * 8, 1, order=3, kernel=4), 8)
    memory = EngramMemory(config, VocabMap.identity(40))
    memory.init_rows(std=1.0, seed=0)
    torch.manual_seed(0)
    for parameter in memory.parameters():
        nn.init.normal_(parameter, std=0.3)
    return memory.eval()


def block_of(memory: EngramMemory) -> EngramLayer:
    block = memory.blocks["1"]
    assert isinstance(block, EngramLayer)
    return block


def moved(block: EngramLayer) -> None:
    block.key.weight.data = block.key.weight.data * 2


def written(block: EngramLayer) -> None:
    block.value.weight.mul_(2)


def replaced(block: EngramLayer) -> None:
    block.query_norm = nn.Parameter(block.query_norm * 2)


def given_a_bias(block: EngramLayer) -> None:
    block.value.bias = nn.Parameter(torch.ones(16))


def hooked(block: EngramLayer) -> None:
    block.value.register_forward_hook(lambda module, args, output: output + 1)


def with_another_projection(block: EngramLayer) -> None:
    other = nn.Linear(32, 16, bias=False)
    nn.init.ones_(other.weight)
    block.value = other  # pyright: ignore[reportAttributeAccessIssue]


def parametrized(block: EngramLayer) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 2

    parametrize.register_parametrization(block.key, "weight", Doubled())


def transposed(block: EngramLayer) -> None:
    conv = block.conv
    assert conv is not None
    conv.data = torch.randn(4, 16, 1).permute(2, 1, 0)


CHANGES = [
    moved,
    written,
    replaced,
    given_a_bias,
    hooked,
    with_another_projection,
    parametrized,
    transposed,
]


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_token_after_a_change_is_what_the_plain_layer_makes_of_it(
    change: Callable[[EngramLayer], None], answers
):
    memory = make_memory()
    block, prompt, token = block_of(memory), torch.tensor([[3, 4, 5]]), torch.tensor([[6]])
    state, x = memory.state(1), torch.randn(1, 3, 1, 16)
    lookup = memory.lookup(prompt, state)
    for layer in LAYERS:
        memory.fuse(layer, x, lookup)
    for step in range(3):
        if step == 2:
            change(block)
        other, x = state.clone(), torch.randn(1, 1, 1, 16)
        lookup = memory.lookup(token, state)
        assert isinstance(lookup, TokenLookup)
        found = [memory.fuse(layer, x, lookup) for layer in LAYERS]
        with _native.forced("off"):
            lookup = memory.lookup(token, other)
            expected = [memory.fuse(layer, x, lookup) for layer in LAYERS]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_plan_holds_until_something_changes(answers):
    for change in CHANGES:
        block = block_of(make_memory())
        plan = block._fuser.renewed(block._parts)
        assert plan is not None and plan.holds() and block._fuser.renewed(block._parts) is plan
        change(block)
        assert plan.holds() == (change is written), change.__name__


@torch.no_grad()
def test_what_x_may_be_is_checked(answers):
    memory = make_memory()
    state = memory.state(1)
    lookup = memory.lookup(torch.tensor([[3, 4, 5]]), state)
    for layer in LAYERS:
        memory.fuse(layer, torch.randn(1, 3, 1, 16), lookup)
    lookup = memory.lookup(torch.tensor([[6]]), state)
    assert isinstance(lookup, TokenLookup)
    block, rest = block_of(memory), (lookup.values, lookup.cursor, 0)
    for x in (
        torch.randn(1, 1, 1, 8),
        torch.randn(1, 2, 1, 16),
        torch.randn(2, 1, 1, 16),
        torch.randn(1, 16),
        torch.randn(1, 1, 1, 1, 16),
        torch.randn(1, 1, 1, 16, dtype=torch.float64),
        torch.randn(1, 1, 1, 32)[..., ::2],
        torch.randn(1, 1, 1, 16, device="meta"),
        nn.Parameter(torch.randn(1, 1, 1, 16)),
    ):
        assert block.decode_next(x, *rest) is None
    x = torch.randn(1, 1, 1, 16)
    with torch.enable_grad():
        assert block.decode_next(x, *rest) is None
    for values in (bytearray(4), lookup.values[:-1]):
        with pytest.raises(ValueError, match="rows"):
            block.decode_next(x, values, lookup.cursor, 1)
    before = x.clone()
    out = block.decode_next(x, *rest)
    assert out is not None and out.shape == x.shape and torch.equal(x, before)
    assert block.decode_next(x, *rest) is None  # the layer has seen the token
    state.crop(0)
    assert block.decode_next(x, lookup.values, lookup.cursor, 1) is None  # it was given up


@pytest.mark.slow
@torch.no_grad()
def test_a_layer_is_let_go_of_with_its_plan_and_is_copied_without_it():
    block = block_of(make_memory())
    block._fuser.renewed(block._parts)
    assert copy.deepcopy(block)._fuser.plan is None
    block.register_forward_hook(lambda module, args, output, owner=block: None)
    kept = weakref.ref(block)
    del block
    gc.collect()
    assert kept() is None
