"""paged.py: a token gets what `EngramLayer.forward` over its whole sequence gives it, wherever its
conv inputs lie, and whatever else is computed with it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from engraphy import LayerSpec, _native
from engraphy.errors import ConfigError, InputError
from engraphy.fusion.layer import EngramLayer
from engraphy.fusion.paged import Lines, PagedFusion

SPECS = {
    "demo": LayerSpec.demo(8, 6, streams=2, order=2),
    "qwen4": LayerSpec.qwen4(20, 6, streams=1, order=3),
    "deepseek_v41": LayerSpec.deepseek_v41(17, 6, streams=3),
}
LEVELS = ("off", *(_native.core.levels() if _native.core else ()))
TOKENS = 40


@pytest.fixture(params=SPECS)
def layer(request) -> EngramLayer:
    torch.manual_seed(0)
    layer = EngramLayer(SPECS[request.param])
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.2, 0.6)
    return layer.requires_grad_(False)


@pytest.fixture
def chunk(layer) -> tuple[Tensor, Tensor, Tensor]:
    """x, rows and live of one sequence."""
    torch.manual_seed(1)
    spec = layer.spec
    x_TSD = torch.randn(TOKENS, spec.streams, spec.hidden_size)
    return x_TSD, torch.randn(TOKENS, spec.width), torch.rand(TOKENS) < 0.8


def taps_of(spec: LayerSpec, tokens: Tensor, places_T: Tensor) -> Tensor:
    """Offsets [N, K] of some tokens of a sequence whose lines lie at `places_T`."""
    distances_K = torch.arange(spec.kernel).flip(0) * spec.order
    before_NK = tokens[:, None] - distances_K
    return torch.where(before_NK >= 0, places_T[before_NK.clamp_min(0)], -1)


def run(layer: EngramLayer, chunk: tuple[Tensor, Tensor, Tensor], parts: list[Tensor]) -> Tensor:
    """Out [T, S, D], computed part by part: a list of tokens each."""
    x_TSD, rows_TE, live_T = chunk
    fusion = PagedFusion(copy.deepcopy(layer))
    values = x_TSD[0].numel()
    places_T = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(2)) * (values + 3)
    cache = torch.full(
        (TOKENS * (values + 3),), torch.nan
    )  # what nobody wrote spoils what reads it
    out_TSD = torch.empty_like(x_TSD)
    for tokens in parts:
        lines = Lines(cache, taps_of(layer.spec, tokens, places_T)) if layer.spec.kernel else None
        out_TSD[tokens] = fusion(x_TSD[tokens], rows_TE[tokens], live_T[tokens], lines)
    return out_TSD


@pytest.mark.parametrize("level", LEVELS)
def test_tokens_in_any_order_give_what_the_whole_sequence_gives(layer, chunk, level):
    x_TSD, rows_TE, live_T = chunk
    wanted = layer(x_TSD[None], rows_TE[None], None, live_T[None], residual=True)[0][0]
    first = torch.randperm(17)
    rest = torch.arange(17, TOKENS)
    with _native.forced(level):
        torch.testing.assert_close(run(layer, chunk, [first, *rest.split(9)]), wanted)


@pytest.mark.parametrize("level", LEVELS)
def test_bf16_is_as_near_as_the_layer_is(layer, chunk, level):
    exact_TSD = layer(chunk[0][None], chunk[1][None], None, chunk[2][None], residual=True)[0][0]
    layer = layer.bfloat16()
    chunk = (chunk[0].bfloat16(), chunk[1].bfloat16(), chunk[2])
    wanted = layer(chunk[0][None], chunk[1][None], None, chunk[2][None], residual=True)[0][0]
    with _native.forced(level):
        out_TSD = run(layer, chunk, list(torch.arange(TOKENS).split(7)))
    assert out_TSD.dtype is torch.bfloat16
    error, least = (out_TSD - exact_TSD).abs().max(), (wanted - exact_TSD).abs().max()
    assert error < 1.5 * least


def test_another_formula_is_refused(layer):
    class Other(EngramLayer):
        def gate(self, u_BTS: Tensor) -> Tensor:
            return u_BTS

    with pytest.raises(ConfigError, match="expected an EngramLayer with plain projections"):
        PagedFusion(Other(layer.spec))
    layer.key = nn.Linear(layer.spec.width, 1)
    with pytest.raises(ConfigError, match="found EngramLayer with Linear and Projection"):
        PagedFusion(layer)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x_NSD": torch.zeros(3, 1, 20)}, r"x: expected torch.float32 \[2, 1, 20\], found"),
        ({"x_NSD": torch.zeros(2, 1, 20).double()}, "x: expected torch.float32"),
        ({"live_N": torch.ones(3, dtype=torch.bool)}, r"live: expected bool \[2\], found"),
        ({"lines": None}, "lines: expected some if there is a conv"),
        ({"lines": Lines(torch.zeros(60), torch.zeros(2, 3).long())}, r"int64 \[2, 4\], found"),
        ({"lines": Lines(torch.zeros(60), torch.zeros(4, 2).long().T)}, "expected contiguous"),
    ],
)
def test_what_does_not_fit_is_named(wrong, message):
    fusion = PagedFusion(EngramLayer(SPECS["qwen4"]))
    given = {
        "x_NSD": torch.zeros(2, 1, 20),
        "rows_NE": torch.zeros(2, 6),
        "live_N": None,
        "lines": Lines(torch.zeros(60), torch.tensor([[-1, -1, -1, 0], [-1, -1, 0, 20]])),
    }
    assert fusion(**given).shape == (2, 1, 20)
    with pytest.raises(InputError, match=message):
        fusion(**(given | wrong))


def test_the_weights_are_held_once(layer):
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    fusion = PagedFusion(layer)
    state = layer.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert layer.value.weight.untyped_storage().data_ptr() == fusion.weight.data_ptr()
