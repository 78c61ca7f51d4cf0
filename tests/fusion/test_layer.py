"""layer.py: equal to the released layers, and the same whatever the chunks, documents and dead
positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from engraphy.addresses.addresser import Addresser
from engraphy.addresses.vocab import VocabMap
from engraphy.errors import ConfigError, InputError
from engraphy.fusion.layer import EngramLayer
from engraphy.memory.state import SequenceState
from engraphy.spec import HashSpec, LayerSpec
from tests.tools.bounds import fusion
from tests.tools.paths import DATA

GOLDEN = DATA / "demo_layer.safetensors"
PRESETS = {
    "demo": LayerSpec.demo(8, 6, streams=3, order=2),
    "qwen4": LayerSpec.qwen4(8, 6, streams=3, order=2),
    "deepseek_v41": LayerSpec.deepseek_v41(8, 6, streams=3),
}
ORACLE = PRESETS["qwen4"]


def trained(spec: LayerSpec, dtype: torch.dtype = torch.float64, seed: int = 0) -> EngramLayer:
    """A layer whose parameters are all far from their initial values."""
    torch.manual_seed(seed)
    layer = EngramLayer(spec)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.2, 0.6)
    return layer.to(dtype)


def case(
    spec: LayerSpec,
    batch: int = 2,
    tokens: int = 17,
    dtype: torch.dtype = torch.float64,
    seed: int = 1,
):
    torch.manual_seed(seed)
    x_BTSD = torch.randn(batch, tokens, spec.streams, spec.hidden_size, dtype=dtype)
    return x_BTSD, torch.randn(batch, tokens, spec.width, dtype=dtype)


def flags(batch: int, tokens: int, share: float, seed: int) -> torch.Tensor:
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)) < share


def plain(
    layer: EngramLayer,
    x_BTSD: torch.Tensor,
    rows_BTE: torch.Tensor,
    live: torch.Tensor,
    starts: torch.Tensor,
):
    """The formulas of the module's docstring, position by position."""
    spec, (batch, tokens) = layer.spec, x_BTSD.shape[:2]
    offset = 1.0 if spec.unit_offset else 0.0

    def norm(x, weight, eps):
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        return x / (x.square().mean() + eps).sqrt() * (weight + offset)

    update, gates = torch.zeros_like(x_BTSD), x_BTSD.new_zeros(batch, tokens, spec.streams)
    for b in range(batch):
        for s in range(spec.streams):
            inputs: list[torch.Tensor] = []
            begins: list[bool] = []
            for t in range(tokens):
                key = layer.key(rows_BTE[b, t]).view(spec.streams, -1)[s]
                u = norm(x_BTSD[b, t, s], layer.query_norm[s], spec.eps) @ norm(
                    key, layer.key_norm[s], spec.eps
                )
                u = u / spec.hidden_size**0.5
                gate = torch.sigmoid(u.sign() * u.abs().clamp_min(1e-6).sqrt())
                v = gate * layer.value(rows_BTE[b, t])
                begins.append(bool(starts[b, t]))
                if layer.conv is not None:
                    inputs.append(norm(v, layer.conv_norm[s], spec.conv_eps) * live[b, t])
                if not live[b, t]:
                    continue
                gates[b, t, s], update[b, t, s] = gate, v
                if layer.conv is None:
                    continue
                mixed = torch.zeros_like(v)
                for back in range(spec.kernel):
                    then = t - back * spec.order
                    if then >= 0 and not any(begins[then + 1 :]):
                        mixed = mixed + inputs[then] * layer.conv[s, :, spec.kernel - 1 - back]
                update[b, t, s] += torch.nn.functional.silu(mixed)
    return update, gates


# --- equal to the released layers


def golden():
    tensors = load_file(GOLDEN)
    own = {
        name: tensor
        for name, tensor in tensors.items()
        if name.split(".")[0] in ("key_projs", "value_proj", "norm1", "norm2", "short_conv")
    }
    spec = HashSpec.demo((1, 4), (2, 3), 3, 101, vocab_size=317, pad_id=2, seed=3)
    addresser = Addresser(spec, VocabMap(np.arange(500) % 317))
    ids_BTC = torch.from_numpy(addresser.rows(tensors["input_ids"].numpy(), layer=4))
    rows_BTE = tensors["multi_head_embedding.embedding.weight"][ids_BTC].flatten(2)
    return own, tensors["hidden_states"], rows_BTE, tensors["output"]


def test_equals_the_demo_layer():
    own, x_BTSD, rows_BTE, expected = golden()
    layer = EngramLayer.from_state(own, "demo", order=3)
    assert layer.spec == LayerSpec.demo(48, 48, streams=4, order=3)
    update, gate, window = layer(x_BTSD, rows_BTE)
    for computed in (update, expected):
        fusion(layer, x_BTSD, rows_BTE).update.assert_holds(computed)
    assert gate.shape == (2, 19, 4) and window.shape == (2, 9, 4, 48)


def qwen_oracle(eps: float):
    modeling = pytest.importorskip(
        "transformers.models.qwen4_exp.modeling_qwen4_exp",
        reason="needs transformers with qwen4_exp",
    )
    from transformers import Qwen4ExpTextConfig

    config = Qwen4ExpTextConfig(
        vocab_size=97,
        hidden_size=24,
        hc_count=4,
        ple_layer_ids=[2],
        ple_embed_dim=32,
        ngram_size=3,
        heads_per_ngram=4,
        ngram_vocab_size_base=50,
        ple_conv_kernel_size=4,
        num_hidden_layers=4,
        eos_token_id=9,
        pad_token_id=9,
        rms_norm_eps=eps,
    )
    torch.manual_seed(0)
    oracle = modeling.Qwen4ExpTextPLELayer(config, layer_idx=1, ple_layer_index=0)
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.normal_(0.1, 0.5)
    own = {
        name: tensor
        for name, tensor in oracle.state_dict().items()
        if not name.startswith("ple_embedding")
    }
    return oracle, own


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_equals_transformers_qwen_layer_with_padding_and_eos(eps):
    oracle, own = qwen_oracle(eps)
    layer = EngramLayer.from_state(own, "qwen4", eps=eps)
    assert layer.spec == LayerSpec.qwen4(24, 32, streams=4, order=3, eps=eps)
    ids = torch.randint(10, 97, (3, 21))
    ids[0, 7] = ids[1, 12] = ids[1, 13] = 9
    live = torch.ones(3, 21, dtype=torch.bool)
    live[1, :4] = live[2, 16:] = False  # left and right padding
    ids[~live] = 9
    x_BTSD = torch.randn(3, 21, 4, 24)
    with torch.no_grad():
        expected = oracle(x_BTSD.flatten(2), ids, None, live.long()).unflatten(-1, (4, 24))
        rows_BTE = oracle.ple_embedding(ids, None)
        update, _, _ = layer(x_BTSD, rows_BTE, live=live)
    for computed in (update, expected):
        fusion(layer, x_BTSD, rows_BTE, live=live).update.assert_holds(computed, where=live)
    assert (update[~live] == 0).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_equals_the_formulas(preset):
    layer = trained(PRESETS[preset])
    x_BTSD, rows_BTE = case(layer.spec)
    live, starts = flags(2, 17, 0.8, 2), flags(2, 17, 0.2, 3)
    everywhere, nowhere = torch.ones_like(live), torch.zeros_like(starts)
    for alive, begins in ((live, starts), (everywhere, nowhere)):
        bound = fusion(layer, x_BTSD, rows_BTE, None, alive, begins)
        update, gate, _ = layer(x_BTSD, rows_BTE, live=alive, starts=begins)
        expected, expected_gate = plain(layer, x_BTSD, rows_BTE, alive, begins)
        assert bound.update.error.max() < 1e-9  # it tells formulas apart
        for computed, computed_gate in ((update, gate), (expected, expected_gate)):
            bound.update.assert_holds(computed)
            bound.gate.assert_holds(computed_gate)


def test_a_dot_product_of_zero_opens_the_gate_by_half():
    layer = trained(PRESETS["qwen4"])
    x_BTSD, rows_BTE = case(layer.spec)
    _, gate, _ = layer(torch.zeros_like(x_BTSD), rows_BTE)
    assert (gate == 0.5).all()
    _, nearly, _ = layer(x_BTSD * 1e-12, rows_BTE)  # far below the floor, and yet signed
    opened = torch.full_like(nearly, 1e-3).sigmoid()
    for gate in (nearly, torch.where(nearly > 0.5, opened, 1 - opened)):
        fusion(layer, x_BTSD * 1e-12, rows_BTE).gate.assert_holds(gate)


# --- the same whatever the chunks


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_chunks_equal_one_forward(sizes, some_dead, some_starts, seed):
    layer, tokens = trained(ORACLE), sum(sizes)
    x_BTSD, rows_BTE = case(layer.spec, tokens=tokens)
    live = flags(2, tokens, 0.8, seed) if some_dead else None
    starts = flags(2, tokens, 0.2, seed + 1) if some_starts else None
    bound = fusion(layer, x_BTSD, rows_BTE, None, live, starts)
    window, updates, gates, first = None, [], [], 0
    for size in sizes:
        cut = slice(first, first + size)
        first += size
        update, gate, window = layer(
            x_BTSD[:, cut],
            rows_BTE[:, cut],
            window,
            *(None if values is None else values[:, cut] for values in (live, starts)),
        )
        assert window.shape == (2, layer.spec.window, 3, 8)
        updates.append(update)
        gates.append(gate)
    whole = layer(x_BTSD, rows_BTE, live=live, starts=starts)
    for update, gate, after in ((torch.cat(updates, 1), torch.cat(gates, 1), window), whole):
        bound.update.assert_holds(update)
        bound.gate.assert_holds(gate)
        bound.window.assert_holds(after)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=6),
    st.integers(0, 99),
)
def test_decoding_with_a_state_and_tokens_taken_back_equals_one_forward(steps, seed):
    layer, tokens = trained(ORACLE), sum(size for size, _ in steps)
    x_BTSD, rows_BTE = case(layer.spec, tokens=tokens)
    live, starts = flags(2, tokens, 0.8, seed), flags(2, tokens, 0.2, seed + 1)
    bound = fusion(layer, x_BTSD, rows_BTE, None, live, starts).update
    bound.assert_holds(layer(x_BTSD, rows_BTE, live=live, starts=starts)[0])
    state = SequenceState(2, margin=4, order=layer.spec.order, windows={0: layer.spec.window})

    def step(x, rows, alive, begins):
        state.extend(np.ones(alive.shape, np.int64), alive, begins)
        update, _, inputs = layer(x, rows, state.window(0), alive, begins, conv_inputs=True)
        state.push(0, inputs, begins)
        return update

    first = 0
    for size, wrong in steps:
        cut = slice(first, first + size)
        first += size
        update = step(x_BTSD[:, cut], rows_BTE[:, cut], live[:, cut], starts[:, cut])
        bound.map(lambda t, cut=cut: t[:, cut]).assert_holds(update)
        step(
            *case(layer.spec, tokens=wrong, seed=seed),
            flags(2, wrong, 0.8, seed),
            flags(2, wrong, 0.4, seed),
        )
        state.crop(wrong)


def test_documents_packed_into_one_sequence_equal_documents_alone():
    layer = trained(ORACLE)
    x_BTSD, rows_BTE = case(layer.spec, batch=1, tokens=20)
    starts = torch.zeros(1, 20, dtype=torch.bool)
    starts[0, 0] = starts[0, 7] = starts[0, 8] = True
    packed, _, window = layer(x_BTSD, rows_BTE, starts=starts)
    for cut in (slice(0, 7), slice(7, 8), slice(8, 20)):
        alone = fusion(layer, x_BTSD[:, cut], rows_BTE[:, cut])
        alone.update.assert_holds(packed[:, cut])
        alone.update.assert_holds(layer(x_BTSD[:, cut], rows_BTE[:, cut])[0])
    alone.window.assert_holds(window)


def test_a_start_hides_the_window_that_came_in():
    layer = trained(ORACLE)
    x_BTSD, rows_BTE = case(layer.spec, tokens=3)
    starts = torch.tensor([[True, False, False], [False, False, False]])
    window = torch.randn(2, layer.spec.window, 3, 8, dtype=torch.float64)
    seen, fresh = (layer(x_BTSD, rows_BTE, past, starts=starts)[0] for past in (window, None))
    torch.testing.assert_close(seen[0], fresh[0], rtol=0, atol=0)
    assert not torch.allclose(seen[1], fresh[1])


def test_left_padding_equals_no_padding():
    layer = trained(ORACLE)
    x_BTSD, rows_BTE = case(layer.spec, tokens=9)
    garbage = case(layer.spec, tokens=5, seed=8)
    garbage[0].fill_(float("nan"))
    live = torch.arange(14).expand(2, 14) >= 5
    padded, gate, window = layer(
        torch.cat([garbage[0], x_BTSD], 1), torch.cat([garbage[1], rows_BTE], 1), live=live
    )
    clean = fusion(layer, x_BTSD, rows_BTE)
    for update, after in ((padded[:, 5:], window), layer(x_BTSD, rows_BTE)[::2]):
        clean.update.assert_holds(update)
        clean.window.assert_holds(after)
    assert (padded[:, :5] == 0).all() and (gate[:, :5] == 0).all()


def test_streams_do_not_see_each_other():
    layer = trained(ORACLE)
    x_BTSD, rows_BTE = case(layer.spec)
    other = x_BTSD.clone()
    other[:, :, 1] += 1.0
    before, after = layer(x_BTSD, rows_BTE)[0], layer(other, rows_BTE)[0]
    torch.testing.assert_close(before[:, :, [0, 2]], after[:, :, [0, 2]], rtol=0, atol=0)
    assert not torch.allclose(before[:, :, 1], after[:, :, 1])


def test_later_tokens_do_not_change_earlier_ones():
    layer = trained(ORACLE)
    x_BTSD, rows_BTE = case(layer.spec)
    changed = rows_BTE.clone()
    changed[:, 9:] += 1.0
    before, after = layer(x_BTSD, rows_BTE)[0], layer(x_BTSD, changed)[0]
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=0)


# --- training


@pytest.mark.parametrize("preset", PRESETS)
def test_gradients_are_those_of_the_formulas(preset):
    spec = PRESETS[preset]
    layer = trained(
        LayerSpec(
            4, 3, 2, 2, spec.kernel and 2, spec.bias, spec.eps, spec.conv_eps, spec.unit_offset
        )
    )
    x_BTSD, rows_BTE = (values.requires_grad_() for values in case(layer.spec, tokens=4))
    window = (
        torch.randn(2, layer.spec.window, 2, 4, dtype=torch.float64).requires_grad_()
        if spec.kernel
        else None
    )
    live, starts = flags(2, 4, 0.7, 5), flags(2, 4, 0.3, 6)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x, rows, window, *values):
        arguments = (x, rows, window, live, starts)
        outputs = torch.func.functional_call(
            layer, dict(zip(names, values, strict=True)), arguments
        )
        return tuple(output for output in outputs if output is not None)

    assert torch.autograd.gradcheck(run, (x_BTSD, rows_BTE, window, *parameters))


def test_every_parameter_and_the_rows_learn():
    layer = trained(PRESETS["demo"])
    x_BTSD, rows_BTE = (values.requires_grad_() for values in case(layer.spec))
    layer(x_BTSD, rows_BTE)[0].square().sum().backward()
    for name, tensor in [*layer.named_parameters(), ("x", x_BTSD), ("rows", rows_BTE)]:
        assert tensor.grad is not None and (tensor.grad != 0).any(), name


@pytest.mark.parametrize("preset", PRESETS)
def test_with_a_value_of_zero_it_adds_exactly_nothing_and_can_learn(preset):
    spec = PRESETS[preset]
    layer = EngramLayer(spec)
    layer.zero_value()
    x_BTSD, rows_BTE = case(spec, dtype=torch.float32)
    update, _, _ = layer(x_BTSD, rows_BTE)
    assert (update == 0).all()
    (update * torch.randn_like(update)).sum().backward()
    assert (layer.value.weight.grad != 0).any()


def test_with_the_conv_active_a_value_of_zero_still_adds_nothing():
    layer = trained(PRESETS["demo"])
    layer.zero_value()
    assert (layer(*case(layer.spec))[0] == 0).all()


def test_a_layer_from_scratch_has_a_silent_conv_and_values_of_the_scale_of_the_rows():
    torch.manual_seed(0)
    spec = LayerSpec.demo(256, 128, streams=2)
    layer = EngramLayer(spec)
    x_BTSD, rows_BTE = case(spec, tokens=32, dtype=torch.float32)
    update, gate, _ = layer(x_BTSD, rows_BTE)
    for computed in (update, gate[..., None] * layer.value(rows_BTE)[:, :, None]):
        fusion(layer, x_BTSD, rows_BTE).update.assert_holds(computed)
    assert 0.95 < layer.value(rows_BTE).std() < 1.05
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(float("nan"))
    layer.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())


def test_gradient_checkpointing_changes_no_gradient():
    layer = trained(ORACLE)
    x_BTSD, rows_BTE = case(layer.spec)
    found = []
    for run in (layer, lambda *values: checkpoint(layer, *values, use_reentrant=False)):
        leaf = rows_BTE.clone().requires_grad_()
        run(x_BTSD, leaf)[0].square().sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("autocast", [True, False])
def test_in_bf16_the_projections_alone_are_less_than_f32_and_x_keeps_its_dtype(preset, autocast):
    layer = trained(PRESETS[preset], torch.float32)
    x_BTSD, rows_BTE = case(layer.spec, dtype=torch.float32)
    x_BTSD = x_BTSD.bfloat16()
    window = torch.randn(2, layer.spec.window, 3, 8) if layer.spec.kernel else None
    if not autocast:
        layer = layer.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        update, gate, after = layer(x_BTSD, rows_BTE, window)
    assert update.dtype == torch.bfloat16 and gate.dtype == torch.float32
    assert after is None or after.dtype == torch.float32
    layer.key.bfloat16(), layer.value.bfloat16()  # what autocast makes of them
    bound = fusion(layer, x_BTSD, rows_BTE, window)
    bound.update.assert_holds(update)
    bound.gate.assert_holds(gate)


def test_a_bf16_hidden_state_is_computed_with_as_if_it_were_f32():
    layer = trained(ORACLE, torch.float32)
    x_BTSD, rows_BTE = case(layer.spec, dtype=torch.bfloat16)
    update, gate, window = layer(x_BTSD, rows_BTE)
    expected, expected_gate, expected_window = layer(x_BTSD.float(), rows_BTE.float())
    torch.testing.assert_close(update, expected.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(gate, expected_gate, rtol=0, atol=0)
    torch.testing.assert_close(window, expected_window, rtol=0, atol=0)


def test_compiles_to_one_graph():
    layer = trained(ORACLE)
    x_BTSD, rows_BTE = case(layer.spec)
    live, starts = flags(2, 17, 0.8, 2), flags(2, 17, 0.2, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    fusion(layer, x_BTSD, rows_BTE, None, live, starts).update.assert_holds(
        compiled(x_BTSD, rows_BTE, None, live, starts)[0]
    )


# --- released names


@pytest.mark.parametrize("preset", PRESETS)
def test_released_tensors_survive_the_round_trip(preset):
    layer = trained(PRESETS[preset], torch.bfloat16)
    tensors = layer.to_state(preset)
    sizes = {} if preset == "deepseek_v41" else {"order": 2}
    again = EngramLayer.from_state(tensors, preset, **sizes)
    assert again.spec == layer.spec
    copied = again.to_state(preset)
    assert copied.keys() == tensors.keys()
    assert all(
        torch.equal(copied[name], tensors[name]) and copied[name].dtype == torch.bfloat16
        for name in tensors
    )
    x_BTSD, rows_BTE = case(layer.spec)
    torch.testing.assert_close(
        again(x_BTSD, rows_BTE)[0], layer(x_BTSD, rows_BTE)[0], rtol=0, atol=0
    )
    with torch.no_grad():
        for tensor in copied.values():
            tensor.fill_(float("nan"))
    assert all(parameter.isfinite().all() for parameter in again.parameters())


def test_golden_tensors_survive_the_round_trip():
    own, _, _, _ = golden()
    copied = EngramLayer.from_state(own, "demo").to_state("demo")
    assert copied.keys() == own.keys() and all(torch.equal(copied[name], own[name]) for name in own)


def test_deepseek_fuses_the_keys_and_then_the_value():
    layer = trained(PRESETS["deepseek_v41"])
    tensors = layer.to_state("deepseek_v41")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "wkv.weight": (32, 6),
        "q_weight": (3, 8),
        "k_weight": (3, 8),
    }
    torch.testing.assert_close(tensors["wkv.weight"][:24], layer.key.weight, rtol=0, atol=0)
    torch.testing.assert_close(tensors["wkv.weight"][24:], layer.value.weight, rtol=0, atol=0)
    assert EngramLayer.from_state(tensors, "deepseek_v41").spec.eps == 1e-20


def test_deepseek_fp8_weights_are_scaled_by_blocks():
    torch.manual_seed(0)
    weight = torch.randn(80, 96).to(
        torch.float8_e4m3fn
    )  # S=1, D=40: blocks that do not end with the matrix
    exponents = torch.randint(-6, 3, (3, 3))
    tensors = {
        "wkv.weight": weight,
        "wkv.scale": torch.exp2(exponents.float()).to(torch.float8_e8m0fnu),
        "q_weight": torch.ones(1, 40).bfloat16(),
        "k_weight": torch.ones(1, 40).bfloat16(),
    }
    whole = EngramLayer.from_state(tensors, "deepseek_v41").to_state("deepseek_v41")["wkv.weight"]
    for row, column in ((0, 0), (31, 95), (32, 31), (79, 64)):
        assert (
            whole[row, column]
            == weight[row, column].float() * 2.0 ** exponents[row // 32, column // 32]
        )
    with pytest.raises(
        ConfigError, match=r"wkv.weight: expected floats .* found torch.float8_e4m3fn"
    ):
        EngramLayer.from_state(
            {name: t for name, t in tensors.items() if name != "wkv.scale"}, "deepseek_v41"
        )
    with pytest.raises(ConfigError, match=r"wkv.scale: expected \[3, 3\]"):
        EngramLayer.from_state({**tensors, "wkv.scale": tensors["wkv.scale"][:2]}, "deepseek_v41")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_missing_unknown_or_misshaped_tensor_is_named(preset):
    tensors = trained(PRESETS[preset]).to_state(preset)
    for name, tensor in tensors.items():
        rest = {other: values for other, values in tensors.items() if other != name}
        with pytest.raises(ConfigError, match=name.split(".")[0]):
            EngramLayer.from_state(rest, preset)
        with pytest.raises(ConfigError, match="expected"):
            EngramLayer.from_state({**rest, name: tensor[:-1]}, preset)
        with pytest.raises(ConfigError, match=f"{name}: expected floats .* found torch.int64"):
            EngramLayer.from_state({**rest, name: tensor.long()}, preset)
    with pytest.raises(ConfigError, match=r"unknown tensors \['surplus'\]"):
        EngramLayer.from_state({**tensors, "surplus": torch.ones(1)}, preset)


def test_sizes_that_differ_from_the_tensors_are_refused():
    tensors = trained(PRESETS["qwen4"]).to_state("qwen4")
    with pytest.raises(
        ConfigError, match=r"key_proj.weight: expected floats \[16, 6\], found .* \[24, 6\]"
    ):
        EngramLayer.from_state(tensors, "qwen4", streams=2)
    with pytest.raises(ConfigError, match="colour"):
        EngramLayer.from_state(tensors, "qwen4", colour=1)


def test_unknown_presets_and_presets_that_cannot_express_a_layer_are_refused():
    layer = trained(PRESETS["demo"])
    with pytest.raises(ConfigError, match="expected one of .*'demo'.* found 'paper'"):
        layer.to_state("paper")
    with pytest.raises(ConfigError, match="found 'paper'"):
        EngramLayer.from_state(layer.to_state("demo"), "paper")
    for preset in ("qwen4", "deepseek_v41"):
        with pytest.raises(
            ConfigError, match=f"preset {preset}: expected .bias, unit_offset, conv."
        ):
            layer.to_state(preset)


# --- what does not fit


@pytest.mark.parametrize(
    "change",
    [
        {"x": lambda x: x[:, :, 0]},
        {"x": lambda x: x[..., :-1]},
        {"x": lambda x: x.long()},
        {"rows": lambda rows: rows[:, 1:]},
        {"rows": lambda rows: rows[..., 1:]},
        {"rows": lambda rows: rows.int()},
        {"window": lambda window: window[:, 1:]},
        {"window": lambda window: window[:1]},
        {"live": lambda live: live.long()},
        {"live": lambda live: live[:, 1:]},
        {"starts": lambda starts: starts[0]},
        {"starts": lambda starts: starts.float()},
    ],
)
def test_what_does_not_fit_is_refused_by_name(change):
    x_BTSD, rows_BTE = case(ORACLE)
    arguments = {
        "x": x_BTSD,
        "rows": rows_BTE,
        "window": torch.zeros(2, ORACLE.window, 3, 8),
        "live": flags(2, 17, 0.5, 0),
        "starts": flags(2, 17, 0.5, 1),
    }
    layer = trained(ORACLE)
    layer(*arguments.values())
    ((name, wrong),) = change.items()
    arguments[name] = wrong(arguments[name])
    with pytest.raises(InputError, match=f"^{name}: expected .* found"):
        layer(*arguments.values())


def test_a_layer_without_conv_takes_and_gives_no_window():
    layer = trained(PRESETS["deepseek_v41"])
    x_BTSD, rows_BTE = case(layer.spec)
    assert layer(x_BTSD, rows_BTE)[2] is None
    with pytest.raises(InputError, match="window: expected None"):
        layer(x_BTSD, rows_BTE, torch.zeros(2, 0, 3, 8))


def test_a_conv_of_one_tap_has_a_window_of_no_positions():
    layer = trained(LayerSpec(8, 6, kernel=1))
    x_BTSD, rows_BTE = case(layer.spec)
    update, _, window = layer(x_BTSD, rows_BTE, starts=flags(2, 17, 0.5, 1))
    assert window.shape == (2, 0, 1, 8)
    torch.testing.assert_close(update, layer(x_BTSD, rows_BTE, window)[0], rtol=0, atol=0)
