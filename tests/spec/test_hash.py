"""hash.py and dialects/: released constants, JSON form, digests, and every specification that
cannot be meant."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engraphy.errors import ConfigError
from engraphy.fusion.layer import EngramLayer
from engraphy.spec import EngramConfig, HashSpec, LayerSpec
from engraphy.spec.dialects import is_prime

MODEL = {"num_hidden_layers": 30, "hidden_size": 2560, "vocab_size": 129_280, "pad_token_id": 2}
# The fields of DeepSeek-V4.1-Flash's config that concern the memory.
DEEPSEEK = {
    "engram_layer_ids": [1, 14],
    "engram_num_embeddings": [384_006_168, 384_016_682],
    "engram_max_ngram_size": 4,
    "engram_vocab_size": 16_000_000,
    "engram_n_heads": 8,
    "engram_head_dim": 256,
    "engram_pad_token_id": 2,
    "engram_compressed_vocab_size": 99_092,
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "vocab_size": 129_280,
    "hc_mult": 4,
    "rms_norm_eps": 1e-20,
}


def demo(**changes) -> HashSpec:
    """A small valid spec with some arguments changed."""
    arguments = {
        "layer_ids": (1, 4),
        "orders": (2, 3),
        "heads": 2,
        "rows_per_head": 50,
        "vocab_size": 90,
        "pad_id": 2,
    }
    return HashSpec.demo(**{**arguments, **changes})


def qwen(**changes):
    from transformers import Qwen4ExpTextConfig

    return Qwen4ExpTextConfig(
        **{"ple_layer_ids": [2], "eos_token_id": 9, "num_hidden_layers": 8, **changes}
    )


@st.composite
def hash_specs(draw) -> HashSpec:
    layers = draw(st.lists(st.integers(0, 90), min_size=1, max_size=3, unique=True))
    orders = sorted(draw(st.sets(st.integers(1, 6), min_size=1, max_size=3)))
    heads, rows = draw(st.integers(1, 4)), draw(st.integers(1, 10_000))
    vocab_size, filler = draw(st.integers(10, 300_000)), draw(st.integers(0, 9))
    dialect = draw(st.sampled_from(["demo", "deepseek_v41", "qwen4"]))
    if dialect == "deepseek_v41":
        return HashSpec.deepseek_v41(layers, orders, heads, rows, vocab_size, filler)
    seed = draw(st.integers(0, 2**40))
    if dialect == "qwen4":
        return HashSpec.qwen4(
            layers, orders, heads, rows, vocab_size, filler, seed, draw(st.integers(1, 300))
        )
    rows_each = [draw(st.integers(1, 10_000)) for _ in orders]
    return HashSpec.demo(layers, orders, heads, rows_each, vocab_size, filler, seed)


# --- the released constants
# ----------------------------------------------------------------------


def test_demo_multipliers_are_those_of_the_reference():
    spec = HashSpec.demo((1, 15), (2, 3), 8, 646_400, 99_092, pad_id=2)
    assert spec.multipliers(1) == (76632096046245, 4839876093313, 35959672319349)
    assert spec.multipliers(15) == (28919099099511, 56020370062535, 53929037264533)


def test_qwen_multipliers_are_those_of_the_reference():
    spec = HashSpec.qwen4((1,), (2, 3), 8, 20_000_000, 248_320, eos_id=9)
    assert spec.multipliers(1) == (23703573157769, 20109073645365, 8052911324071)


def test_deepseek_v41_has_the_row_counts_of_the_release():
    spec = HashSpec.deepseek_v41()
    assert [spec.row_count(layer) for layer in (1, 14)] == [384_006_168, 384_016_682]
    assert spec.columns == 24 and spec.order == 4


def test_the_27b_layout_has_the_row_counts_of_the_paper():
    spec = HashSpec.demo((1, 14), (2, 3), 8, 2_262_400, 99_092, pad_id=2)
    assert [spec.row_count(layer) for layer in (1, 14)] == [36_199_972, 36_204_260]
    config = EngramConfig(spec, LayerSpec.demo(2560, spec.columns * 80), 80)
    assert config.table_parameters() == (36_199_972 + 36_204_260) * 80
    assert round(config.table_parameters() / 1e9, 2) == 5.79


def test_the_40b_layout_has_the_table_size_of_the_paper():
    spec = HashSpec.demo((1, 14), (2, 3), 8, 7_239_680, 99_092, pad_id=2)
    config = EngramConfig(spec, LayerSpec.demo(2560, spec.columns * 80), 80)
    assert round(config.table_parameters() / 1e9, 2) == 18.53


def test_qwen_rows_are_padded_to_a_multiple_of_128():
    spec = HashSpec.qwen4((1,), (2, 3), 8, 20_000_000, 248_320, eos_id=9)
    assert sum(spec.primes(1)) == 320_001_446
    assert spec.row_count(1) == 320_001_536


# --- primes and multipliers
# ----------------------------------------------------------------------


def test_is_prime_agrees_with_a_sieve():
    sieve = np.ones(100_000, dtype=bool)
    sieve[:2] = False
    for value in range(2, 317):
        sieve[value * value :: value] = False
    assert [value for value in range(-5, 100_000) if is_prime(value)] == list(np.flatnonzero(sieve))


@pytest.mark.parametrize(
    "value",
    [
        2047,
        3277,
        561,
        1105,
        8911,
        1_373_653,
        25_326_001,
        3_215_031_751,
        2_152_302_898_747,
        3_474_749_660_383,
        341_550_071_728_321,
        3_825_123_056_546_413_051,
        318_665_857_834_031_151_167_461,
        16_000_057**2,
        20_000_003 * 16_000_057,
    ],
)
def test_strong_pseudoprimes_and_carmichael_numbers_are_not_prime(value):
    assert not is_prime(value)


@pytest.mark.parametrize(
    "value", [2**31 - 1, 2**61 - 1, 16_000_057, 20_000_003, 18_446_744_073_709_551_557]
)
def test_large_primes_are_prime(value):
    assert is_prime(value)


@given(hash_specs())
@settings(max_examples=40, deadline=None)
def test_no_product_with_a_multiplier_overflows_and_all_are_odd(spec):
    for layer in spec.layer_ids:
        multipliers = spec.multipliers(layer)
        assert len(multipliers) == spec.order
        assert all(m > 0 and m % 2 == 1 and m * (spec.vocab_size - 1) < 2**63 for m in multipliers)


@given(hash_specs())
@settings(max_examples=40, deadline=None)
def test_every_head_has_its_own_prime_of_at_least_its_rows(spec):
    primes = [prime for layer in spec.layer_ids for prime in spec.primes(layer)]
    assert len(set(primes)) == len(primes) == len(spec.layer_ids) * spec.columns
    for layer in spec.layer_ids:
        for column, prime in enumerate(spec.primes(layer)):
            assert is_prime(prime) and prime >= spec.rows_per_head[column // spec.heads]


@given(hash_specs())
@settings(max_examples=40, deadline=None)
def test_offsets_leave_neither_gap_nor_overlap(spec):
    for layer in spec.layer_ids:
        offsets, primes = spec.offsets(layer), spec.primes(layer)
        assert offsets[0] == 0
        assert all(offsets[c] + primes[c] == offsets[c + 1] for c in range(spec.columns - 1))
        used = offsets[-1] + primes[-1]
        assert (
            0 <= spec.row_count(layer) - used < spec.pad_to
            and spec.row_count(layer) % spec.pad_to == 0
        )


def test_primes_start_anew_at_each_order_and_skip_what_is_taken():
    spec = demo(layer_ids=(7, 3), heads=3, rows_per_head=(10, 12))
    assert spec.primes(7) == (
        11,
        13,
        17,
        19,
        23,
        29,
    )  # order 2 from 10 on, order 3 from 12 on without 13 and 17
    assert spec.primes(3) == (31, 37, 41, 43, 47, 53)


def test_a_rows_per_head_that_is_prime_is_used_itself():
    assert demo(rows_per_head=53).primes(1)[0] == 53
    assert HashSpec.qwen4((1,), (2,), 1, 53, 90, 2).primes(1) == (53,)


def test_qwen_counts_heads_through_all_layers_by_position_in_the_list():
    both = HashSpec.qwen4((5, 2), (2, 3), 2, 53, 90, eos_id=2)
    assert both.primes(5) + both.primes(2) == (53, 59, 61, 67, 71, 73, 79, 83)
    assert both.multipliers(5) == HashSpec.qwen4((0,), (2, 3), 2, 53, 90, eos_id=2).multipliers(0)
    assert both.multipliers(2) != both.multipliers(5)


def test_demo_multipliers_depend_on_the_layer_not_on_its_place():
    expected = demo(layer_ids=(4,)).multipliers(4)
    assert (
        demo(layer_ids=(4, 1)).multipliers(4) == demo(layer_ids=(1, 4)).multipliers(4) == expected
    )


# --- JSON and digests
# ----------------------------------------------------------------------


@given(hash_specs())
@settings(max_examples=40, deadline=None)
def test_a_spec_survives_json(spec):
    again = HashSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec and hash(again) == hash(spec) and again.digest() == spec.digest()


@given(hash_specs(), st.integers(1, 64), st.integers(1, 4), st.integers(0, 5), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_config_survives_json(spec, dim, streams, kernel, flag):
    layer = LayerSpec(
        64,
        spec.columns * dim,
        streams,
        spec.order,
        kernel,
        flag,
        None if flag else 1e-20,
        1e-3,
        flag,
    )
    config = EngramConfig(spec, layer, dim)
    assert EngramConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_the_digest_is_pinned():
    """A change of the canonical form would disown every table that exists."""
    assert (
        HashSpec.deepseek_v41().digest()
        == "19efc0f9a67e8ca8435b14cc6b8def3fd79774a7a32293ba45371f9fe02c48ba"
    )


def test_the_digest_does_not_depend_on_how_numbers_were_given():
    given_otherwise = HashSpec.demo(
        [np.int64(1), 4], np.array([2, 3]), np.int32(2), [50, 50], 90, 2
    )
    assert given_otherwise == demo() and given_otherwise.digest() == demo().digest()


@pytest.mark.parametrize(
    "field, value",
    [
        ("dialect", "deepseek_v41"),
        ("layer_ids", (1, 5)),
        ("layer_ids", (4, 1)),
        ("layer_ids", (1,)),
        ("orders", (2, 4)),
        ("heads", 3),
        ("rows_per_head", (51, 50)),
        ("vocab_size", 91),
        ("filler_id", 3),
        ("seed", 1),
        ("pad_to", 2),
    ],
)
def test_the_digest_is_sensitive_to_every_field(field, value):
    assert dataclasses.replace(demo(), **{field: value}).digest() != demo().digest()


def test_the_digest_test_above_knows_every_field():
    assert {field.name for field in dataclasses.fields(HashSpec)} == {
        "dialect",
        "layer_ids",
        "orders",
        "heads",
        "rows_per_head",
        "vocab_size",
        "filler_id",
        "seed",
        "pad_to",
    }


def test_the_address_digest_covers_spec_vocabulary_and_width():
    def config(dim=4, **changes):
        spec = demo(**changes)
        return EngramConfig(spec, LayerSpec(16, spec.columns * dim), dim)

    digests = {
        config().address_digest("v"),
        config().address_digest("w"),
        config(dim=5).address_digest("v"),
        config(seed=1).address_digest("v"),
    }
    assert len(digests) == 4
    assert config().address_digest("v") == config().address_digest("v")


def test_the_address_digest_does_not_cover_the_fusion_layer():
    spec = demo()
    with_conv, without = (
        EngramConfig(spec, LayerSpec(16, 16, kernel=kernel), 4) for kernel in (4, 0)
    )
    assert with_conv.address_digest("v") == without.address_digest("v")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("heads"),
        lambda data: data.update(head=8),
        lambda data: data.update(orders=None),
        lambda data: data.update(orders="23"),
        lambda data: data.update(dialect=None),
        lambda data: data.update(heads=2.0),
        lambda data: data.update(rows_per_head=[50]),
        lambda data: data.update(layer_ids=[1, "4"]),
    ],
)
def test_from_json_refuses_a_damaged_spec(change):
    data = demo().to_json()
    change(data)
    with pytest.raises(ConfigError):
        HashSpec.from_json(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("dim"),
        lambda data: data.update(dims=4),
        lambda data: data.update(dim=5),
        lambda data: data.update(hash=None),
        lambda data: data["hash"].pop("seed"),
        lambda data: data["layer"].pop("width"),
        lambda data: data["layer"].update(stream=4),
        lambda data: data["layer"].update(order=2),
        lambda data: data["layer"].update(bias="no"),
        lambda data: data["layer"].update(eps=0.0),
    ],
)
def test_from_json_refuses_a_damaged_config(change):
    data = EngramConfig(demo(), LayerSpec(16, 16), 4).to_json()
    change(data)
    with pytest.raises(ConfigError):
        EngramConfig.from_json(data)


# --- specifications that cannot be meant
# ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"orders": [0]}, "orders.*0"),
        ({"orders": []}, "orders"),
        ({"orders": [3, 2]}, "orders.*3, 2"),
        ({"orders": [2, 2]}, "orders.*2, 2"),
        ({"orders": [-1, 2]}, "orders.*-1"),
        ({"orders": 3}, "orders.*3"),
        ({"orders": [2.0]}, "orders.*2.0"),
        ({"orders": [True, 2]}, "orders.*True"),
        ({"orders": {2, 3}}, "orders"),
        ({"orders": [2, 33]}, "orders.*33"),
        ({"rows_per_head": 0}, "rows_per_head.*0"),
        ({"rows_per_head": [50, 0]}, "rows_per_head.*0"),
        ({"rows_per_head": -5}, "rows_per_head.*-5"),
        ({"rows_per_head": [50]}, "rows_per_head.*2"),
        ({"rows_per_head": [50, 50, 50]}, "rows_per_head.*2"),
        ({"rows_per_head": 5e3}, "rows_per_head.*5000.0"),
        ({"rows_per_head": 2**62}, "rows_per_head.*int64"),
        ({"layer_ids": [1, 1]}, r"layer_ids.*\[1, 1\]"),
        ({"layer_ids": [-1]}, "layer_ids.*-1"),
        ({"layer_ids": []}, "layer_ids"),
        ({"layer_ids": {1, 4}}, "layer_ids"),
        ({"layer_ids": 1}, "layer_ids.*1"),
        ({"layer_ids": "14"}, "layer_ids"),
        ({"layer_ids": [None]}, "layer_ids.*None"),
        ({"heads": 0}, "heads.*0"),
        ({"heads": -8}, "heads.*-8"),
        ({"heads": 8.0}, "heads.*8.0"),
        ({"heads": True}, "heads.*True"),
        ({"vocab_size": 0}, "vocab_size.*0"),
        ({"vocab_size": None}, "vocab_size.*None"),
        ({"pad_id": -1}, "filler_id.*-1"),
        ({"pad_id": None}, "filler_id.*None"),
        ({"seed": -1}, "seed.*-1"),
    ],
)
def test_a_spec_that_cannot_be_meant_is_refused_by_name(changes, told):
    with pytest.raises(ConfigError, match=told):
        demo(**changes)


def test_an_unknown_dialect_is_refused():
    with pytest.raises(ConfigError, match="deepseek_v4'"):
        dataclasses.replace(demo(), dialect="deepseek_v4")


def test_a_padding_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="pad_to.*0"):
        HashSpec.qwen4((1,), (2, 3), 2, 50, 90, 2, pad_to=0)


@pytest.mark.parametrize("dialect", ["deepseek_v41", "qwen4"])
def test_dialects_with_one_size_for_all_orders_refuse_several(dialect):
    with pytest.raises(ConfigError, match="one size for all orders"):
        dataclasses.replace(demo(), dialect=dialect, rows_per_head=(50, 60))


@pytest.mark.parametrize("layer", [0, 99, -1, "1", None, True, 1.0, [1]])
@pytest.mark.parametrize("method", ["multipliers", "primes", "offsets", "row_count"])
def test_a_layer_without_a_memory_is_refused(method, layer):
    with pytest.raises(ConfigError, match="layer"):
        getattr(demo(), method)(layer)


def test_a_misspelt_option_is_refused():
    with pytest.raises(TypeError, match="ordres"):
        demo(ordres=(2, 3))
    with pytest.raises(TypeError, match="row_per_head"):
        EngramConfig.for_model(MODEL, row_per_head=100)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"width": 0}, "width"),
        ({"streams": 0}, "streams"),
        ({"order": 0}, "order"),
        ({"kernel": -1}, "kernel"),
        ({"kernel": 4.0}, "kernel"),
        ({"bias": 1}, "bias"),
        ({"unit_offset": None}, "unit_offset"),
        ({"eps": 0.0}, "eps"),
        ({"eps": "1e-6"}, "eps"),
        ({"conv_eps": -1e-5}, "conv_eps"),
        ({"conv_eps": None}, "conv_eps"),
        ({"conv_eps": float("nan")}, "conv_eps"),
        ({"eps": float("inf")}, "eps"),
    ],
)
def test_a_layer_that_cannot_be_meant_is_refused_by_name(changes, told):
    with pytest.raises(ConfigError, match=told):
        LayerSpec(**{"hidden_size": 16, "width": 16, **changes})


@pytest.mark.parametrize(
    "layer, dim, told",
    [
        (LayerSpec(16, 20), 4, "width.*4 \\* 4 = 16.*20"),
        (LayerSpec(16, 16, order=2), 4, "order.*3.*2"),
        (LayerSpec(16, 16), 0, "dim"),
        (LayerSpec(16, 16), 4.0, "dim"),
    ],
)
def test_parts_of_a_config_that_do_not_fit_are_refused(layer, dim, told):
    with pytest.raises(ConfigError, match=told):
        EngramConfig(demo(), layer, dim)


# --- configs of released checkpoints
# ----------------------------------------------------------------------


def test_from_hf_reads_a_qwen_config():
    config = qwen(
        ple_layer_ids=[3, 2],
        heads_per_ngram=2,
        ngram_size=4,
        ngram_vocab_size_base=5003,
        vocab_size=700,
        seed=99,
        make_ngram_vocab_size_divisible_by=64,
        ple_embed_dim=60,
    )
    expected = HashSpec.qwen4((1, 2), (2, 3, 4), 2, 5003, 700, 9, seed=99, pad_to=64)
    assert HashSpec.from_hf(config) == HashSpec.from_hf(config.to_dict()) == expected


def test_from_hf_takes_the_first_of_several_eos_ids_as_qwen_does():
    assert HashSpec.from_hf(qwen(eos_token_id=[7, 9])).filler_id == 7


def test_from_hf_reads_a_qwen_config_inside_a_multimodal_one():
    from transformers import Qwen4ExpConfig

    config = Qwen4ExpConfig(text_config=qwen(ngram_vocab_size_base=5003).to_dict())
    assert HashSpec.from_hf(config) == HashSpec.qwen4((1,), (2, 3), 8, 5003, 248_320, 9)


def test_from_hf_reads_the_released_deepseek_config():
    assert HashSpec.from_hf(DEEPSEEK) == HashSpec.deepseek_v41()


def test_from_hf_reads_a_deepseek_config_inside_a_multimodal_one():
    assert (
        HashSpec.from_hf({"model_type": "outer", "text_config": DEEPSEEK})
        == HashSpec.deepseek_v41()
    )
    as_objects = SimpleNamespace(text_config=SimpleNamespace(**DEEPSEEK))
    assert HashSpec.from_hf(as_objects) == HashSpec.deepseek_v41()


def test_from_hf_reads_the_pad_id_under_both_its_names():
    fields = {key: value for key, value in DEEPSEEK.items() if key != "engram_pad_token_id"}
    assert HashSpec.from_hf({**fields, "engram_pad_id": 2}) == HashSpec.deepseek_v41()


def test_from_hf_reads_the_names_of_deepseeks_inference_config():
    other = {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "rms_norm_eps": "norm_eps",
        "engram_pad_token_id": "engram_pad_id",
    }
    config = {other.get(name, name): value for name, value in DEEPSEEK.items()}
    assert EngramConfig.from_hf(config) == EngramConfig.from_hf(DEEPSEEK)


@pytest.mark.parametrize(
    "name, other, value",
    [
        ("engram_pad_token_id", "engram_pad_id", 3),
        ("hidden_size", "dim", 64),
        ("rms_norm_eps", "norm_eps", 1e-6),
    ],
)
def test_from_hf_refuses_two_names_with_two_values(name, other, value):
    assert EngramConfig.from_hf({**DEEPSEEK, other: DEEPSEEK[name]}) == EngramConfig.from_hf(
        DEEPSEEK
    )
    with pytest.raises(ConfigError, match=f"contradicts itself.*{name}.*{other}"):
        EngramConfig.from_hf({**DEEPSEEK, other: value})


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"engram_layer_ids": [1, 40]}, r"engram_layer_ids: expected 0 to 39, found \[1, 40\]"),
        ({"engram_layer_ids": [-1, 1]}, r"engram_layer_ids: expected 0 to 39, found \[-1, 1\]"),
        ({"num_hidden_layers": 14}, "engram_layer_ids: expected 0 to 13"),
        ({"num_hidden_layers": None, "n_layers": 14}, "engram_layer_ids: expected 0 to 13"),
        ({"engram_compressed_vocab_size": 129_281}, "engram_compressed_vocab_size.*129280.*129281"),
        ({"engram_compressed_vocab_size": "99092"}, "engram_compressed_vocab_size.*'99092'"),
        ({"engram_n_heads": 0}, "heads.*0"),
        ({"engram_max_ngram_size": 1}, "orders"),
    ],
)
def test_from_hf_refuses_a_deepseek_config_that_cannot_be_meant(changes, told):
    with pytest.raises(ConfigError, match=told):
        HashSpec.from_hf({**DEEPSEEK, **changes})


def test_from_hf_gives_the_whole_memory_of_the_releases():
    v41 = EngramConfig.from_hf({"text_config": DEEPSEEK})
    assert v41 == EngramConfig(HashSpec.deepseek_v41(), LayerSpec.deepseek_v41(5120, 24 * 256), 256)
    config = qwen(
        hidden_size=2560, ple_embed_dim=2560, rms_norm_eps=1e-5, hc_count=2, ple_conv_kernel_size=3
    )
    spec = HashSpec.qwen4((1,), (2, 3), 8, 20_000_000, 248_320, 9)
    expected = EngramConfig(spec, LayerSpec.qwen4(2560, 2560, 2, 3, 1e-5, 3), 160)
    assert EngramConfig.from_hf(config) == EngramConfig.from_hf(config.to_dict()) == expected
    without = {name: value for name, value in config.to_dict().items() if name != "ple_embed_dim"}
    assert EngramConfig.from_hf(without) == expected  # it is the hidden size where it is not given


@pytest.mark.parametrize("missing", ["engram_head_dim", "hc_mult", "rms_norm_eps", "hidden_size"])
def test_from_hf_names_the_size_that_is_missing(missing):
    with pytest.raises(ConfigError, match=missing):
        EngramConfig.from_hf({**DEEPSEEK, missing: None})


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"ple_embed_dim": 100}, "ple_embed_dim.*16 columns.*100"),
        ({"ple_embed_dim": 0}, "ple_embed_dim.*0"),
        ({"hc_count": 0}, "streams.*0"),
        ({"hidden_size": None}, "hidden_size"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"ple_conv_kernel_size": -1}, "kernel.*-1"),
    ],
)
def test_from_hf_refuses_sizes_of_qwen_that_cannot_be_meant(fields, told):
    known = {
        "ple_layer_ids": [2],
        "eos_token_id": 9,
        "vocab_size": 700,
        "hidden_size": 64,
        "rms_norm_eps": 1e-6,
    }
    assert EngramConfig.from_hf(known).dim == 4
    with pytest.raises(ConfigError, match=told):
        EngramConfig.from_hf({**known, **fields})


def test_from_hf_refuses_a_qwen_layer_beyond_the_model():
    fields = {"ple_layer_ids": [2, 9], "eos_token_id": 9, "vocab_size": 700}
    assert HashSpec.from_hf(fields | {"num_hidden_layers": 9}).layer_ids == (1, 8)
    with pytest.raises(ConfigError, match=r"ple_layer_ids: expected 1 to 8, found \[2, 9\]"):
        HashSpec.from_hf(fields | {"num_hidden_layers": 8})


@pytest.mark.parametrize(
    "told", [[384_006_168, 384_016_681], [384_006_168], [384_016_682, 384_006_168], []]
)
def test_from_hf_refuses_row_counts_that_do_not_fit(told):
    with pytest.raises(ConfigError, match="engram_num_embeddings.*384006168, 384016682"):
        HashSpec.from_hf({**DEEPSEEK, "engram_num_embeddings": told})


@pytest.mark.parametrize(
    "missing",
    [
        "engram_max_ngram_size",
        "engram_n_heads",
        "engram_vocab_size",
        "engram_compressed_vocab_size",
        "engram_pad_token_id",
    ],
)
def test_from_hf_names_the_deepseek_field_that_is_missing(missing):
    with pytest.raises(ConfigError, match=missing.replace("_token", ".*")):
        HashSpec.from_hf({key: value for key, value in DEEPSEEK.items() if key != missing})


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"eos_token_id": None}, "eos_token_id"),
        ({"eos_token_id": []}, "filler_id"),
        ({"vocab_size": None}, "vocab_size"),
        ({"ple_layer_ids": [0, 2]}, "ple_layer_ids.*0"),
        ({"ple_layer_ids": 2}, "ple_layer_ids"),
        ({"ngram_size": 1}, "orders"),
        ({"ngram_size": "3"}, "ngram_size"),
    ],
)
def test_from_hf_refuses_a_qwen_config_that_cannot_be_meant(fields, told):
    with pytest.raises(ConfigError, match=told):
        HashSpec.from_hf({"ple_layer_ids": [2], "eos_token_id": 9, "vocab_size": 700, **fields})


@pytest.mark.parametrize(
    "config",
    [
        {},
        MODEL,
        {"ple_layer_ids": []},
        {"text_config": MODEL},
        None,
        5,
        SimpleNamespace(),
    ],
)
def test_from_hf_refuses_a_config_without_a_memory(config):
    with pytest.raises(ConfigError, match="config"):
        HashSpec.from_hf(config)


# --- a config for a model that has none
# ----------------------------------------------------------------------


def test_for_model_has_the_papers_proportions():
    config = EngramConfig.for_model(MODEL, vocab_size=99_092)
    assert (
        config.hash.dialect == "demo"
        and config.hash.layer_ids[0] == 1
        and len(config.hash.layer_ids) == 2
    )
    assert config.hash.rows_per_head == (646_400, 646_400)
    assert (config.dim, config.layer.width) == (80, 1280)
    assert config.hash.filler_id == 2 and not config.layer.bias


@given(
    st.integers(1, 100),
    st.sampled_from([8, 64, 100, 576, 5120]),
    st.integers(1, 4),
    st.integers(1, 9),
)
@settings(max_examples=30, deadline=None)
def test_for_model_fits_models_of_any_size(depth, hidden, last_order, heads):
    config = EngramConfig.for_model(
        {"num_hidden_layers": depth, "hidden_size": hidden, "vocab_size": 50},
        orders=range(1, last_order + 1),
        heads=heads,
        pad_id=0,
    )
    assert all(0 <= layer < depth for layer in config.hash.layer_ids)
    assert (
        config.layer.width == config.hash.columns * config.dim
        and config.layer.hidden_size == hidden
    )


def test_for_model_takes_the_filler_from_the_model_or_asks_for_it():
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 50}
    for ids, filler in (
        ({"pad_token_id": 3, "eos_token_id": 4}, 3),
        ({"pad_token_id": -1, "eos_token_id": [4, 5]}, 4),
    ):
        assert EngramConfig.for_model(sizes | ids).hash.filler_id == filler
    with pytest.raises(
        ConfigError, match="neither a pad_token_id nor an eos_token_id; give pad_id="
    ):
        EngramConfig.for_model(sizes)


def test_for_model_reads_a_transformers_config_and_a_nested_one():
    from transformers import LlamaConfig

    config = LlamaConfig(
        num_hidden_layers=6,
        hidden_size=64,
        vocab_size=300,
        eos_token_id=[5, 6],
        num_attention_heads=4,
    )
    made = EngramConfig.for_model(
        config, layers=[0, 5], orders=(2,), heads=4, rows_per_head=1000, dim=8
    )
    assert made.hash == HashSpec.demo((0, 5), (2,), 4, 1000, 300, pad_id=5)
    assert made == EngramConfig.for_model(
        {"text_config": config.to_dict()},
        layers=[0, 5],
        orders=(2,),
        heads=4,
        rows_per_head=1000,
        dim=8,
    )


@pytest.mark.parametrize(
    "options, told",
    [
        ({"layers": [99]}, "layers.*29.*99"),
        ({"layers": [30]}, "layers.*29.*30"),
        ({"layers": [-1]}, "layers.*-1"),
        ({"layers": [1, 1]}, "layer_ids"),
        ({"layers": []}, "layer_ids"),
        ({"layers": 1}, "layers"),
        ({"orders": [0]}, "orders"),
        ({"orders": ()}, "orders"),
        ({"orders": 3}, "orders"),
        ({"heads": 0}, "heads"),
        ({"heads": "8"}, "heads"),
        ({"rows_per_head": 0}, "rows_per_head"),
        ({"dim": 0}, "dim"),
        ({"dim": "80"}, "dim"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"streams": 0}, "streams"),
        ({"kernel": -1}, "kernel"),
    ],
)
def test_for_model_refuses_what_cannot_be_meant_by_name(options, told):
    with pytest.raises(ConfigError, match=told):
        EngramConfig.for_model(MODEL, **options)


@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "vocab_size"])
def test_for_model_names_the_field_that_the_model_lacks(field):
    with pytest.raises(ConfigError, match=field):
        EngramConfig.for_model({**MODEL, field: None})
    with pytest.raises(ConfigError, match=field):
        EngramConfig.for_model({**MODEL, field: "30"})


# --- costs
# ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [
        LayerSpec(24, 32, streams=1, bias=False),
        LayerSpec(24, 32, streams=4, bias=True),
        LayerSpec(24, 32, streams=2, kernel=0),
        LayerSpec.demo(24, 32, streams=4),
        LayerSpec.deepseek_v41(24, 32, order=3),
        LayerSpec.qwen4(24, 32),
    ],
)
def test_dense_parameters_are_those_of_the_layers_that_are_built(layer):
    config = EngramConfig(demo(), layer, 8)
    built = sum(parameter.numel() for parameter in EngramLayer(layer).parameters())
    assert config.dense_parameters() == 2 * built


def test_table_costs_count_rows_of_all_layers():
    config = EngramConfig(demo(), LayerSpec(16, 16), 4)
    rows = sum(demo().row_count(layer) for layer in (1, 4))
    assert (config.row_count(), config.table_parameters(), config.table_bytes(6)) == (
        rows,
        4 * rows,
        6 * rows,
    )
    # The release: 196.6e9 parameters in rows of 256 fp8 values and 8 scales.
    v41 = EngramConfig(HashSpec.deepseek_v41(), LayerSpec.deepseek_v41(5120, 24 * 256), 256)
    assert v41.table_parameters() == (384_006_168 + 384_016_682) * 256
    assert v41.table_bytes(264) == 98_305_579_008 + 3_072_049_344 + 98_308_270_592 + 384_016_682 * 8


@pytest.mark.parametrize(
    "layer, window",
    [
        (LayerSpec(8, 8, order=3, kernel=4), 9),
        (LayerSpec(8, 8, order=4, kernel=0), 0),
        (LayerSpec(8, 8, order=2, kernel=1), 0),
        (LayerSpec.qwen4(8, 8), 9),
    ],
)
def test_the_conv_looks_back_by_its_dilated_taps(layer, window):
    assert layer.window == window
