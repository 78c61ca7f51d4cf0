"""The native pass over a chunk computes what the plain formula does, and its gradients, whatever
the threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from engraphy import _native
from engraphy.fusion import chunk
from engraphy.fusion.layer import EngramLayer
from engraphy.fusion.plain import Formula, Norms, Past
from engraphy.spec import LayerSpec
from tests.tools.bounds import fusion

LEVELS = _native.core.levels() if _native.core else ()
pytestmark = pytest.mark.skipif(not LEVELS, reason=_native.reason)

SPECS = {
    "demo": LayerSpec(37, 19, streams=2, bias=True),
    "qwen4": LayerSpec.qwen4(32, 24, streams=1, order=2),
    "deepseek_v41": LayerSpec.deepseek_v41(48, 40, streams=4),
    "one tap": LayerSpec(16, 8, kernel=1),
    "narrow": LayerSpec(3, 8, kernel=16, order=1),
}
TOKENS = (1, 5, 300)  # fewer than the conv looks back; more than two pieces of the work
DTYPES = {  # of x, and of the layer
    "f32": (torch.float32, torch.float32),
    "f32 and bf16": (torch.float32, torch.bfloat16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16 and f32": (torch.bfloat16, torch.float32),
    "f64": (torch.float64, torch.float64),
}


def make(spec: LayerSpec, dtype: torch.dtype) -> EngramLayer:
    torch.manual_seed(0)
    layer = EngramLayer(spec)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.1, 0.4)
    return layer.to(dtype)


def case(spec: LayerSpec, tokens: int, dtype: torch.dtype, past: bool) -> dict[str, Tensor]:
    """Arguments of the layer. past: with a window, dead positions and starts."""
    torch.manual_seed(1)
    shape = (spec.streams, spec.hidden_size)
    found = {
        "x_BTSD": torch.randn(3, tokens, *shape).to(dtype),
        "rows_BTE": torch.randn(3, tokens, spec.width),
    }
    if past:
        found["live"] = torch.rand(3, tokens) < 0.8
        found["starts"] = torch.rand(3, tokens) < 0.1
        if spec.kernel:
            found["window"] = torch.randn(3, spec.window, *shape)
    return found


def run(
    layer: EngramLayer, values: dict[str, Tensor], conv_inputs: bool, dtype: torch.dtype
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and the gradients of everything. Numbers of `values` are `dtype` at least."""
    values = {
        name: value.to(torch.promote_types(value.dtype, dtype), copy=True).requires_grad_()
        if value.is_floating_point()
        else value
        for name, value in values.items()
    }
    layer.zero_grad(set_to_none=True)
    outputs = layer(**values, conv_inputs=conv_inputs, residual=True)
    outputs = [output for output in outputs if output is not None]
    torch.manual_seed(2)
    weights = [torch.randn(output.shape) for output in outputs]
    # Sums in f64, so that the gradients of the outputs are these weights in every dtype.
    total = sum(
        (output.double() * weight.to(output.dtype)).sum()
        for output, weight in zip(outputs, weights, strict=True)
    )
    total.backward()
    grads = {name: value.grad for name, value in values.items() if value.requires_grad}
    grads |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    return [output.detach() for output in outputs], grads


def apart(found: Tensor, exact: Tensor) -> float:
    """Distance of two tensors relative to the size of the second."""
    size = exact.double().norm().item()
    return (found.double() - exact.double()).norm().item() / size if size else found.abs().sum()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", SPECS)
def test_outputs_are_those_of_the_formula(name, dtypes, past, level):
    spec = SPECS[name]
    x_dtype, dtype = DTYPES[dtypes]
    layer = make(spec, dtype)
    for tokens in TOKENS:
        values = case(spec, tokens, x_dtype, past)
        bound = fusion(layer, **values)
        with _native.forced(level), torch.no_grad():
            update, gate, window = layer(**values)
            inputs = layer(**values, conv_inputs=True)[2]
        bound.update.assert_holds(update)
        bound.gate.assert_holds(gate)
        if spec.kernel:
            bound.window.assert_holds(window)
            bound.inputs.assert_holds(inputs)
        assert update.dtype == x_dtype
        assert gate.dtype == torch.promote_types(x_dtype, torch.float32)


def rounded(values: dict[str, Tensor], eps: float) -> dict[str, Tensor]:
    """The same values in float64, each moved by `eps` of itself, up or down."""
    torch.manual_seed(3)

    def moved(value: Tensor) -> Tensor:
        up = torch.randint(0, 2, value.shape, dtype=torch.float64)
        return value.double() * (1 + eps * (2 * up - 1))

    return {
        name: moved(value) if value.is_floating_point() else value for name, value in values.items()
    }


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", SPECS)
def test_gradients_are_as_near_to_the_exact_ones_as_those_of_the_formula(name, dtypes, past, level):
    """Exact: the plain formula in float64, with the same weights and values. A gate near its kink
    magnifies rounding: then its gradients may be as far off as one rounding of the values alone
    makes them, even if those of the formula are not."""
    spec = SPECS[name]
    x_dtype, dtype = DTYPES[dtypes]
    layer, exact_layer = make(spec, dtype), make(spec, dtype).double()
    eps = torch.finfo(torch.promote_types(x_dtype, torch.float32)).eps
    for tokens in TOKENS:
        for conv_inputs in (False, True):
            values = case(spec, tokens, x_dtype, past)
            with _native.forced("off"):
                _, exact = run(exact_layer, values, conv_inputs, torch.float64)
                _, moved = run(exact_layer, rounded(values, eps), conv_inputs, torch.float64)
                _, plain = run(layer, values, conv_inputs, x_dtype)
            with _native.forced(level):
                _, native = run(layer, values, conv_inputs, x_dtype)
            for key, value in native.items():
                near = max(apart(other[key], exact[key]) for other in (plain, moved))
                assert apart(value, exact[key]) <= 2 * near + 10 * eps, key
                assert value.dtype == plain[key].dtype


@pytest.mark.parametrize("dtypes", ["f32", "f32 and bf16", "f64"])
def test_nothing_depends_on_the_threads(dtypes, threads):
    x_dtype, dtype = DTYPES[dtypes]
    layer = make(SPECS["demo"], dtype)
    values = case(layer.spec, 700, x_dtype, past=True)
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            threads(count)
            with _native.forced("auto"):
                found.append(passes(layer, values, dtype))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one, two)


def passes(layer: EngramLayer, values: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Everything that the native passes give, for the same projections: a matrix product may depend
    on the threads."""
    x_BTSD = values["x_BTSD"]
    norms = Norms(layer.query_norm, layer.key_norm, layer.conv_norm, layer.conv)
    past = Past(values["window"], values["live"], values["starts"])
    formula = Formula(layer.spec.order, 1e-6, 1e-5, False, True, True)
    with torch.no_grad():
        torch.manual_seed(3)
        key_BTSD = torch.randn(x_BTSD.shape).to(dtype)
        value_BTD = torch.randn(3, 700, 37).to(dtype)
        fused = chunk.forward(x_BTSD, key_BTSD, value_BTD, norms, past, formula)
        grads = [torch.randn(part.shape).to(part.dtype) for part in fused[:3]]
        back = chunk.backward(
            *grads,
            x_BTSD,
            key_BTSD,
            value_BTD,
            norms,
            past,
            formula,
            fused.gate_BTS,
            fused.stats_BTS4,
            needs_x=True,
            needs_window=True,
        )
    return [*fused, *back]


@pytest.mark.parametrize("level", LEVELS)
def test_dead_positions_are_not_read(level):
    layer = make(SPECS["demo"], torch.float32)
    values = case(layer.spec, 40, torch.float32, past=True)
    live = values["live"]
    clean = {name: value.clone() for name, value in values.items()}
    values["x_BTSD"][~live] = torch.nan
    values["rows_BTE"][~live] = torch.inf
    with _native.forced(level), torch.no_grad():
        found, expected = layer(**values), layer(**clean)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("level", LEVELS)
def test_nan_in_a_row_reaches_gate_and_gradients(level):
    layer = make(SPECS["demo"], torch.float32)
    values = case(layer.spec, 4, torch.float32, past=False)
    values["rows_BTE"][0, 1, 3] = torch.nan
    with _native.forced(level):
        (out, gate, _), grads = run(layer, values, False, torch.float32)
    assert gate[0, 1].isnan().all() and out[0, 1].isnan().all()
    assert gate[1:].isfinite().all() and out[1:].isfinite().all()
    assert grads["rows_BTE"][0, 1].isnan().all() and grads["key.weight"].isnan().any()


@pytest.mark.parametrize("level", LEVELS)
def test_large_values_stay_numbers(level):
    layer = make(SPECS["demo"], torch.float32)
    with torch.no_grad():
        layer.conv.mul_(1e6)
        for sign in (-1, 1):
            layer.conv.copy_(layer.conv.abs() * sign)
            values = case(layer.spec, 30, torch.float32, past=False)
            with _native.forced(level):
                update = layer(**values)[0]
            fusion(layer, **values).update.assert_holds(update)


SIZES = {
    "kind": 0,
    "batch": 1,
    "tokens": 1,
    "streams": 1,
    "hidden": 1,
    "taps": 0,
    "dilation": 1,
    "eps": 1e-6,
    "conv_eps": 1e-6,
    "residual": False,
    "columns": 0,
    "masked": False,
    "threads": 1,
}
ARRAYS = ("scale", "conv_norm", "conv", "normed_conv", "x", "key", "value", "window", "live")
ARRAYS += ("starts", "gate", "stats")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": 5}, "kind"),
        ({"tokens": 0}, "positive"),
        ({"taps": 17}, "taps"),
        ({"columns": 2}, "columns"),
        ({"scale": 0}, "arrays must be present"),
        ({"stats": 0}, "arrays must be present"),
        ({"taps": 1, "conv": 0}, "conv's weights"),
    ],
)
def test_wrong_sizes_and_missing_arrays_are_refused(wrong, message):
    values = np.zeros(1)
    arguments = SIZES | dict.fromkeys(ARRAYS, values.ctypes.data) | wrong
    with pytest.raises(ValueError, match=message):
        _native.core.ChunkFusion(**arguments)


def test_missing_outputs_and_gradients_are_refused():
    values = np.zeros(1)
    arrays = dict.fromkeys(ARRAYS, values.ctypes.data) | {"window": 0}
    fusion_of_one = _native.core.ChunkFusion(**SIZES, **arrays)
    with pytest.raises(ValueError, match="outputs"):
        fusion_of_one.forward(out=0, inputs=0)
    grads = ("out_grad", "gate_grad", "inputs_grad", "x_grad", "key_grad", "value_grad")
    grads += ("window_grad", "sums")
    present = dict.fromkeys(grads, values.ctypes.data)
    with pytest.raises(ValueError, match="gradients must be present"):
        fusion_of_one.backward(**present | {"sums": 0})
    with pytest.raises(ValueError, match="a window must be present"):
        fusion_of_one.backward(**present)
