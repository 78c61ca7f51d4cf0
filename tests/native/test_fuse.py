"""A token that is decoded natively is changed as the layer's plain version changes it, and its past
goes on."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from engraphy import _native
from engraphy.fusion.decode import NO_COLUMNS, Columns
from engraphy.fusion.layer import EngramLayer
from engraphy.memory.state import SequenceState
from engraphy.spec import LayerSpec
from tests.tools.bounds import Bounded, fusion, joined, unit

LEVELS = _native.core.levels() if _native.core else ()
pytestmark = pytest.mark.skipif(not LEVELS, reason=_native.reason)

LAYER, MARGIN = 4, 5
SPECS = {
    "demo": LayerSpec.demo(37, 19),
    "demo, streams": LayerSpec.demo(24, 64, streams=3),
    "qwen4": LayerSpec.qwen4(40, 33),
    "deepseek_v41": LayerSpec.deepseek_v41(48, 40, streams=4),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def make(spec: LayerSpec, dtype: torch.dtype) -> EngramLayer:
    torch.manual_seed(0)
    layer = EngramLayer(spec).to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer


def sample(layer: EngramLayer, batch: int, tokens: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    spec, dtype = layer.spec, layer.value.weight.dtype
    return (
        torch.randn(batch, tokens, spec.streams, spec.hidden_size, dtype=dtype),
        torch.randn(batch, tokens, spec.width),
    )


def filled(layer: EngramLayer, batch: int, tokens: int = 20) -> SequenceState:
    """A state that has seen tokens."""
    state = SequenceState(batch, MARGIN, order=layer.spec.order, windows={LAYER: layer.spec.window})
    state.extend(torch.zeros(batch, tokens, dtype=torch.int64))
    if layer.spec.kernel:
        state.push(
            LAYER,
            torch.randn(
                batch,
                tokens,
                layer.spec.streams,
                layer.spec.hidden_size,
                dtype=computed(layer.value.weight.dtype),
            ),
        )
    return state


def computed(dtype: torch.dtype) -> torch.dtype:
    """What gates and conv inputs have."""
    return torch.promote_types(dtype, torch.float32)


def plain(
    layer: EngramLayer,
    x: torch.Tensor,
    rows: torch.Tensor,
    live: torch.Tensor | None,
    state: SequenceState,
) -> tuple[torch.Tensor, torch.Tensor]:
    update, gate, inputs = layer(x, rows, state.window(LAYER), live, conv_inputs=True)
    if inputs is not None:
        state.push(LAYER, inputs)
    return x + update, gate


def native(
    layer: EngramLayer,
    x: torch.Tensor,
    rows: torch.Tensor,
    live: torch.Tensor | None,
    state: SequenceState,
) -> tuple[torch.Tensor, torch.Tensor]:
    columns = state.columns(LAYER, x)
    assert columns is not None
    gate = torch.full((len(x), 1, layer.spec.streams), torch.nan, dtype=computed(x.dtype))
    out = layer.decode(x, rows, live, columns, gate)
    assert out is not None
    unasked = layer.decode(x, rows, live, columns)
    torch.testing.assert_close(unasked, out, rtol=0, atol=0, equal_nan=True)
    state.advance(LAYER)
    return out, gate


class Reference:
    """The layer in float64, token by token, with bounds for a computation in its own dtype."""

    def __init__(self, layer: EngramLayer, state: SequenceState) -> None:
        self.layer, self.u = layer, unit(computed(layer.value.weight.dtype))
        self.past = self.column(state.window(LAYER)) if layer.spec.kernel else []

    def column(self, inputs: torch.Tensor) -> list[Bounded]:
        return [Bounded.exact(column, self.u) for column in inputs.split(1, dim=1)]

    def window(self) -> Bounded | None:
        if not self.layer.spec.window:
            return None
        return joined(torch.cat, self.past[-self.layer.spec.window :], 1)

    def token(
        self, x: torch.Tensor, rows: torch.Tensor, live: torch.Tensor | None
    ) -> tuple[Bounded, Bounded]:
        """x + update and the gate."""
        found = fusion(self.layer, x, rows, self.window(), live)
        if found.inputs is not None:
            self.past.append(found.inputs)
        return (Bounded.exact(x, self.u) + found.update).stored(x.dtype), found.gate

    def crop(self, tokens: int) -> None:
        del self.past[len(self.past) - tokens :]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_native_tokens_follow_the_plain_ones_through_refilled_and_cropped_buffers(
    name, dtype, level
):
    layer, batch = make(SPECS[name], dtype), 3
    ours = filled(layer, batch)
    theirs, native_tokens, reference = ours.clone(), 0, Reference(layer, ours)
    for step in range(60):
        x, rows = sample(layer, batch)
        live = torch.tensor([[True], [False], [True]]) if step % 7 == 0 else None
        for state in (ours, theirs):
            state.extend(torch.full((batch, 1), step), live)
        expected = plain(layer, x, rows, live, theirs)
        with _native.forced(level):
            if ours.columns(LAYER, x) is None:  # the buffer is full
                found = plain(layer, x, rows, live, ours)
            else:
                native_tokens += 1
                found = native(layer, x, rows, live, ours)
        bounds = reference.token(x, rows, live)
        for one, other, bound in zip(found, expected, bounds, strict=True):
            bound.assert_holds(one)
            bound.assert_holds(other)
        if step % 10 == 5:
            ours.crop(3), theirs.crop(3), reference.crop(3)
    assert native_tokens >= 45
    if layer.spec.kernel:
        for state in (ours, theirs):
            reference.window().assert_holds(state.window(LAYER))


@torch.no_grad()
@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda state: pickle.loads(pickle.dumps(state)),
        SequenceState.clone,
        lambda state: state.clone().select([1, 0]).select([1, 0]),
    ],
)
def test_a_copy_of_a_state_and_the_state_write_to_buffers_of_their_own(copied):
    layer = make(SPECS["demo"], torch.float32)
    state = filled(layer, 2).extend([[1], [2]])
    first, rows = sample(layer, 2)
    native(layer, first, rows, None, state)
    other = copied(state)
    reference = Reference(layer, state)
    for each in (state, other):
        each.extend([[3], [4]])
    x, rows = sample(layer, 2)
    out = native(layer, x, rows, None, other)[0]
    reference.token(x, rows, None)[0].assert_holds(out)
    assert torch.equal(native(layer, x, rows, None, state)[0], out)
    assert torch.equal(state.window(LAYER), other.window(LAYER))


@torch.no_grad()
def test_a_dead_token_is_not_changed_even_by_rows_that_are_not_finite():
    layer = make(SPECS["demo"], torch.float32)
    state = filled(layer, 2).extend([[1], [1]])
    x, rows = sample(layer, 2)
    rows[1] = float("inf")
    out, gate = native(layer, x, rows, torch.tensor([[True], [False]]), state)
    assert (
        torch.isfinite(out).all()
        and torch.equal(out[1], x[1])
        and not gate[1].any()
        and not (out[0] == x[0]).any()
    )


@torch.no_grad()
def test_nan_in_a_row_reaches_the_gate_as_in_the_plain_version():
    layer = make(SPECS["deepseek_v41"], torch.float32)
    state = filled(layer, 1).extend([[1]])
    x, rows = sample(layer, 1)
    rows[0, 0, 3] = float("nan")
    out, gate = native(layer, x, rows, None, state)
    assert gate.isnan().all() and out.isnan().all()


@torch.no_grad()
def test_a_fresh_memory_adds_exactly_nothing():
    layer = make(SPECS["demo"], torch.float32)
    layer.zero_value()
    state = filled(layer, 1, 1).extend([[1]])
    state._windows[LAYER].inputs.zero_()
    x, rows = sample(layer, 1)
    out, _ = native(layer, x, rows, None, state)
    assert torch.equal(out, x)


@pytest.mark.parametrize(
    "case",
    [
        "gradients",
        "float16",
        "float32 beside bfloat16",
        "many sequences",
        "hook",
        "key hook",
        "other key",
        "transposed weight",
        "other shape",
        "switched off",
    ],
)
def test_what_the_kernel_does_not_do_is_left_to_the_plain_version(case):
    layer = make(SPECS["demo"], torch.float16 if case == "float16" else torch.float32)
    batch = 9 if case == "many sequences" else 2
    x, rows = sample(layer, batch)
    if case == "float32 beside bfloat16":
        x = x.bfloat16()
    if case == "hook":
        layer.register_forward_hook(lambda *_: None)
    if case == "key hook":
        layer.key.register_forward_pre_hook(lambda *_: None)
    if case == "other key":
        layer.key = nn.Sequential(layer.key)
    if case == "transposed weight":
        layer.value.weight = nn.Parameter(layer.value.weight.T.contiguous().T)
    if case == "other shape":
        x = x[..., :-1]
    columns = Columns(0, 0, 0)  # never used
    if case == "gradients":
        assert layer.decode(x, rows, None, columns) is None
        return
    with torch.no_grad(), _native.forced("off" if case == "switched off" else "auto"):
        assert layer.decode(x, rows, None, columns) is None


def test_columns_are_refused_where_a_document_begins_in_sight_or_the_chunk_is_another():
    layer = make(SPECS["demo"], torch.float32)
    x, _ = sample(layer, 1)
    state = filled(layer, 1)
    assert state.columns(LAYER, x) is None  # no token's ids are known
    state.extend([[1, 2]])
    assert state.columns(LAYER, x) is None
    state = filled(layer, 1).extend([[1]], starts=torch.tensor([[True]]))
    state.push(LAYER, x, torch.tensor([[True]]))
    state.extend([[2]])
    assert state.columns(LAYER, x) is None
    for _ in range(layer.spec.window):
        state.push(LAYER, x).extend([[3]])
    assert state.columns(LAYER, x) is not None
    assert state.columns(LAYER, x.bfloat16()) is not None  # whose conv inputs are float32
    assert state.columns(LAYER, x.double()) is None


def test_the_kernel_refuses_what_is_missing():
    make, no_weights, weights = _native.core.FusePlan, [0] * 8, [64] * 6
    with pytest.raises(ValueError, match="positive"):
        make(0, 1, 0, 1, 0, 1, 1e-6, 1e-6, False, *no_weights)
    with pytest.raises(ValueError, match="kind"):
        make(3, 1, 1, 1, 0, 1, 1e-6, 1e-6, False, *no_weights)
    with pytest.raises(ValueError, match="present"):
        make(0, 1, 1, 1, 0, 1, 1e-6, 1e-6, False, *no_weights)
    with pytest.raises(ValueError, match="present"):
        make(0, 1, 1, 1, 4, 3, 1e-6, 1e-6, False, *weights, 0, 0)
    plan = make(0, 1, 1, 1, 0, 1, 1e-6, 1e-6, False, *weights, 0, 0)
    with pytest.raises(ValueError, match="positive"):
        plan.fuse(0, *[0] * 8)
    with pytest.raises(ValueError, match="present"):
        plan.fuse(1, *[0] * 8)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copied_layer_decodes_with_weights_of_its_own(copied):
    layer = make(SPECS["deepseek_v41"], torch.float32)
    x, rows = sample(layer, 1)
    before = layer.decode(x, rows, None, NO_COLUMNS)
    other = copied(layer)
    assert torch.equal(other.decode(x, rows, None, NO_COLUMNS), before)
    other.zero_value()
    assert torch.equal(other.decode(x, rows, None, NO_COLUMNS), x)
    assert torch.equal(layer.decode(x, rows, None, NO_COLUMNS), before)


@torch.no_grad()
def test_weights_that_have_moved_are_used_where_they_are_now():
    layer = make(SPECS["deepseek_v41"], torch.float32)
    x, rows = sample(layer, 1)
    before = layer.decode(x, rows, None, NO_COLUMNS)
    layer.value.weight = nn.Parameter(torch.zeros_like(layer.value.weight))
    assert not torch.equal(before, x) and torch.equal(layer.decode(x, rows, None, NO_COLUMNS), x)
    layer.double()
    assert layer.decode(x, rows, None, NO_COLUMNS) is None
    out = layer.decode(x.double(), rows, None, NO_COLUMNS)
    assert out.dtype == torch.float64 and torch.equal(out, x.double())


def test_weights_in_another_order_at_the_same_place_are_not_decoded_by_the_old_plan():
    layer = make(LayerSpec.deepseek_v41(40, 40, streams=1), torch.float32)
    x, rows = sample(layer, 2)
    with torch.no_grad():
        assert layer.decode(x, rows, None, NO_COLUMNS) is not None
        layer.value.weight.data = layer.value.weight.data.t()  # the same address, other strides
        assert layer.decode(x, rows, None, NO_COLUMNS) is None
        layer.value.weight.data = layer.value.weight.data.t()
        assert layer.decode(x, rows, None, NO_COLUMNS) is not None
