"""Tables in GGUF files are found under the names of every fork, or by their shape, and checked."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engraphy.addresses.vocab import VocabMap
from engraphy.errors import ConfigError, DigestMismatch, EngraphyError, ShardMissing, TableError
from engraphy.released.checkpoint import Checkpoint
from engraphy.released.gguf_config import Metadata, describe, find_dialect, roundest
from engraphy.rows import RowFormat
from engraphy.spec import EngramConfig, HashSpec
from engraphy.table.gguf import Gguf, GgufTensor, Strings

gguf = pytest.importorskip("gguf")
from tests.tools.gguf_files import (  # noqa: E402
    DEEPSEEK,
    QWEN4,
    QWEN_WIDE,
    V41_WIDE,
    constants_of,
    drawn_rows,
    renamed,
    rows_of,
    token_map,
    write_gguf,
)
from tests.tools.releases import QWEN, V41, tokenizer, write_v41  # noqa: E402

V41_KINDS = ("bf16", "q8_0", "mxfp4", "q2_k", "q3_k", "q4_k", "q5_k")
QWEN_KINDS = ("bf16", "q8_0", "q4_0", "iq4_nl")
# What ds4 writes: the whole config as one text, its own names, and rows of 264 bytes.
DS4 = renamed(
    DEEPSEEK,
    keys={"engram_layer_ids": "engram.layer_ids", "engram_pad_token_id": "engram.pad_id"},
    extra={"deepseek41.config": json.dumps({**V41_WIDE})},
)
# The least that a fork could write: neither layers nor sizes.
BARE = renamed(
    DEEPSEEK,
    keys={name: DEEPSEEK.keys[name] for name in ("hidden_size", "rms_norm_eps", "hc_mult")},
    extra={"deepseek41.engram.pad_id": 2},
)
OTHER_NAMES = renamed(
    DEEPSEEK,
    keys={
        **DEEPSEEK.keys,
        "engram_layer_ids": "engram.layers",
        "engram_n_heads": "engram.n_heads",
        "engram_head_dim": "engram.head_dim",
        "engram_max_ngram_size": "engram.ngram_size",
        "engram_pad_token_id": "engram.pad_token_id",
        "engram_compressed_vocab_size": "engram.compressed_vocab_size",
    },
    constants={
        "multipliers": "engram_multipliers.weight",
        "primes": "engram_primes.weight",
        "offsets": "engram.hash_offsets",
        "token_map": "engram.token_map",
    },
    as_tensors=True,
)


def records(checkpoint: Checkpoint, layer: int) -> np.ndarray:
    out = np.empty((checkpoint.config.hash.row_count(layer), checkpoint.fmt.row_bytes), np.uint8)
    checkpoint.read_rows(layer, 0, out)
    return out


def write(path: Path, kind: str = "q8_0", config: Mapping[str, Any] = V41, **options: Any) -> Path:
    return write_gguf(path / "m.gguf", rows_of(kind, config), kind, config, **options)


def hash_of(config: Mapping[str, Any]) -> Any:
    return EngramConfig.from_hf(dict(config)).hash


# What is there is found.


@pytest.mark.parametrize("kind", V41_KINDS)
@pytest.mark.parametrize("split_tensors", [0, 2])
def test_a_deepseek_file_is_its_tensors(tmp_path, kind, split_tensors):
    path = write(tmp_path, kind, V41_WIDE, split_tensors=split_tensors)
    checkpoint = Checkpoint.open(path)
    assert checkpoint.fmt == RowFormat(kind, 256)
    assert checkpoint.config == EngramConfig.from_hf(dict(V41_WIDE))
    assert checkpoint.raw_vocab == V41["vocab_size"]
    for layer, expected in rows_of(kind, V41_WIDE).items():
        np.testing.assert_array_equal(records(checkpoint, layer), expected)


@pytest.mark.parametrize("kind", QWEN_KINDS)
def test_a_qwen_file_is_its_one_tensor(tmp_path, kind):
    checkpoint = Checkpoint.open(write(tmp_path, kind, QWEN_WIDE, spelling=QWEN4))
    assert checkpoint.fmt == RowFormat(kind, 160)
    assert checkpoint.config == EngramConfig.from_hf(dict(QWEN_WIDE))
    np.testing.assert_array_equal(records(checkpoint, 1), rows_of(kind, QWEN_WIDE)[1])


def test_several_layers_follow_one_another_in_qwens_tensor(tmp_path):
    config = QWEN | {"ple_layer_ids": [2, 4]}
    rows = rows_of("q8_0", config)
    joined = np.concatenate([rows[1], rows[3]])
    path = write_gguf(tmp_path / "m.gguf", {1: joined}, "q8_0", config, QWEN4)
    checkpoint = Checkpoint.open(path)
    for layer in (1, 3):
        np.testing.assert_array_equal(records(checkpoint, layer), rows[layer])
    assert any("rows of layers [1, 3] in order" in line for line in checkpoint.assumed)


@pytest.mark.parametrize("spelling", [DEEPSEEK, OTHER_NAMES, BARE])
def test_forks_with_other_names_describe_the_same_memory(tmp_path, spelling):
    checkpoint = Checkpoint.open(write(tmp_path, spelling=spelling))
    assert checkpoint.config.hash == hash_of(V41)
    assert checkpoint.config.dim == 64
    assert checkpoint.vocab().digest == VocabMap.from_tokenizer(tokenizer()).digest


def test_rows_with_their_fp8_scales_are_served_as_fp8(tmp_path):
    rows = rows_of("fp8", V41_WIDE)
    spelling = renamed(DS4, extra=DS4.extra | {"deepseek41.engram.encoding": "e4m3_e8m0_32_row264"})
    path = write_gguf(
        tmp_path / "m.gguf",
        {layer: raw.view(np.int8) for layer, raw in rows.items()},
        "q8_0",
        V41_WIDE,
        spelling,
        raw_type=gguf.GGMLQuantizationType.I8,
    )
    checkpoint = Checkpoint.open(path)
    assert checkpoint.fmt == RowFormat("fp8", 256)
    assert checkpoint.config == EngramConfig.from_hf(dict(V41_WIDE))
    np.testing.assert_array_equal(records(checkpoint, 3), rows[3])
    (tmp_path / "o").mkdir()
    other = renamed(DS4, extra=DS4.extra | {"deepseek41.engram.encoding": "lloyd4_e5m3_32_r136"})
    path = write_gguf(
        tmp_path / "o/m.gguf",
        {layer: raw.view(np.int8) for layer, raw in rows.items()},
        "q8_0",
        V41_WIDE,
        other,
        raw_type=gguf.GGMLQuantizationType.I8,
    )
    with pytest.raises(
        TableError, match="expected e4m3_e8m0_32_row264 .*found 'lloyd4_e5m3_32_r136'"
    ):
        Checkpoint.open(path)


def test_a_tensor_with_an_unknown_name_is_found_by_its_shape(tmp_path, caplog):
    path = write(tmp_path, spelling=renamed(DEEPSEEK, table="ngrams.{layer}"))
    with caplog.at_level(logging.INFO, "engraphy"):
        checkpoint = Checkpoint.open(path)
    np.testing.assert_array_equal(records(checkpoint, 3), rows_of("q8_0", V41)[3])
    expected = "ngrams.3 is the table of layer 3, since it alone has 306 rows of 64"
    assert any(expected in line for line in checkpoint.assumed)
    assert expected in caplog.text and expected in checkpoint.describe()


def test_sizes_that_no_key_has_follow_from_the_primes_or_the_row_counts(tmp_path):
    first = Checkpoint.open(write(tmp_path))
    assert "engram_vocab_size = 50, since the first prime is 53" in first.describe()
    (tmp_path / "o").mkdir()
    constants = constants_of(V41, has_map=True)
    del constants["primes"], constants["offsets"]
    second = Checkpoint.open(write(tmp_path / "o", constants=constants))
    assert second.config == first.config
    assert "engram_vocab_size = 50, since the row counts of tensors follow from it" in (
        second.describe()
    )


@pytest.mark.parametrize(
    ("prime", "rows"),
    [(16_000_057, 16_000_000), (53, 50), (3001, 3000), (101, 100), (3, 3), (2, 2)],
)
def test_a_size_is_the_roundest_that_leads_to_the_first_prime(prime, rows):
    assert roundest(prime, 16_000_000) == rows


def published(metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, int]]) -> EngramConfig:
    """The memory that a file of a published size describes."""
    path = Path("m.gguf")
    found = {
        name: GgufTensor(path, name, "Q8_0", shape, 0, shape[1] // 32 * 34)
        for name, shape in tensors.items()
    }
    file = Gguf(path, (path,), metadata, found)
    keys = Metadata(file)
    dialect = find_dialect(file, keys)
    fields, _ = describe(file, keys, dialect)
    return EngramConfig.from_hf(fields)


def test_the_metadata_of_published_files_describe_the_published_memories():
    """Keys and numbers as public listings of GGUF headers have them."""
    arch = "qwen4exp"
    qwen = {
        f"{arch}.block_count": 48,
        f"{arch}.embedding_length": 2560,
        f"{arch}.attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
        f"{arch}.hyper_connection.count": 4,
        f"{arch}.embedding_length_per_layer_input": 160,
        f"{arch}.ple.layers": np.array([1], np.int32),
        f"{arch}.ple.ngram_size": 3,
        f"{arch}.ple.heads_per_ngram": 8,
        f"{arch}.ple.conv_kernel": 4,
        f"{arch}.ple.eos_token_id": 248_044,
        f"{arch}.ple.head_vocab_sizes": np.array([20_000_003], np.uint64),
        "tokenizer.ggml.tokens": Strings(248_320),
    }
    config = published(qwen, {"per_layer_token_embd.weight": (320_001_536, 160)})
    spec = config.hash
    assert spec == HashSpec.qwen4((1,), (2, 3), 8, 20_000_000, 248_320, 248_044)
    assert (config.dim, config.layer.eps, spec.row_count(1)) == (160, 1e-6, 320_001_536)
    assert spec.multipliers(1) == (23703573157769, 20109073645365, 8052911324071)
    assert spec.primes(1)[:3] == (20000003, 20000023, 20000033)
    assert spec.primes(1)[-1] == 20000171 and spec.offsets(1)[-1] == 300001275
    arch = "deepseek41"
    token_map = np.arange(129_280) % 99_092
    deepseek = {
        f"{arch}.block_count": 40,
        f"{arch}.embedding_length": 5120,
        f"{arch}.attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
        f"{arch}.hyper_connection.count": 4,
        f"{arch}.engram.layer_ids": np.array([1, 14], np.int32),
        f"{arch}.engram.head_count": 8,
        f"{arch}.engram.key_length": 256,
        f"{arch}.engram.max_ngram_size": 4,
        f"{arch}.engram.pad_id": 2,
        f"{arch}.engram.token_map": token_map.astype(np.int32),
        f"{arch}.engram.primes": np.array(HashSpec.deepseek_v41().primes(1), np.uint64),
        "tokenizer.ggml.tokens": Strings(129_280),
    }
    counts = {1: 384_006_168, 14: 384_016_682}
    tensors = {f"blk.{layer}.engram_embd.weight": (rows, 256) for layer, rows in counts.items()}
    for without in ("", f"{arch}.engram.primes"):
        metadata = {key: value for key, value in deepseek.items() if key != without}
        config = published(metadata, tensors)
        assert config.hash == HashSpec.deepseek_v41() and config.dim == 256
        assert {layer: config.hash.row_count(layer) for layer in (1, 14)} == counts


def test_a_config_beside_the_file_describes_the_memory(tmp_path):
    path = write(tmp_path, spelling=renamed(DEEPSEEK, keys={}, constants={}))
    with pytest.raises(ConfigError, match="put the release's config.json beside"):
        Checkpoint.open(path)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": dict(V41)}))
    checkpoint = Checkpoint.open(path)
    assert checkpoint.config == EngramConfig.from_hf(dict(V41)) and checkpoint.assumed == ()


# The vocabulary map.


def test_the_map_is_the_files_the_tokenizers_or_a_saved_one(tmp_path):
    expected = VocabMap.from_tokenizer(tokenizer())
    checkpoint = Checkpoint.open(write(tmp_path))
    assert checkpoint.vocab().digest == expected.digest
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert checkpoint.vocab().digest == expected.digest
    expected.save(tmp_path / "v.json")
    assert checkpoint.vocab(tmp_path / "v.json").digest == expected.digest
    other = expected.table.copy()
    other[[3, 4]] = other[[4, 3]]
    VocabMap(other).save(tmp_path / "w.json")
    with pytest.raises(
        DigestMismatch,
        match=r"deepseek41.engram.token_map: id 3: expected 4, as .*w.json has, found 3; 2 ids",
    ):
        checkpoint.vocab(tmp_path / "w.json")


def test_a_file_without_a_map_needs_one(tmp_path):
    spelling = renamed(
        DEEPSEEK,
        keys={**DEEPSEEK.keys, "engram_compressed_vocab_size": "engram.compressed_vocab_size"}
        | {"engram_pad_token_id": "engram.pad_token_id"},
        constants={"primes": "engram.primes"},
    )
    checkpoint = Checkpoint.open(write(tmp_path, spelling=spelling))
    with pytest.raises(ConfigError, match="tokenizer.json: expected the tokenizer"):
        checkpoint.vocab()
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert len(checkpoint.vocab()) == 40


# Every contradiction has its name.


@pytest.mark.parametrize("name", ["multipliers", "primes", "offsets"])
@pytest.mark.parametrize(
    ("spelling", "config"), [(DEEPSEEK, V41), (QWEN4, QWEN), (OTHER_NAMES, V41)]
)
def test_constants_that_differ_are_named(tmp_path, name, spelling, config):
    constants = constants_of(config, has_map=spelling is not QWEN4)
    expected = int(constants[name][1])
    constants[name][1] += 2
    path = write(tmp_path, config=config, spelling=spelling, constants=constants)
    key = spelling.constants[name]
    with pytest.raises(
        DigestMismatch, match=rf"{key}: number 1: expected {expected}, .*found {expected + 2}"
    ):
        Checkpoint.open(path)


def test_constants_of_another_number_are_named(tmp_path):
    constants = constants_of(V41, has_map=True)
    constants["offsets"] = constants["offsets"][:-1]
    with pytest.raises(DigestMismatch, match="expected 8 offsets of 2 layers, found 7"):
        Checkpoint.open(write(tmp_path, constants=constants))


def test_a_token_map_that_differs_is_named(tmp_path):
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    constants = constants_of(V41, has_map=True)
    constants["token_map"] = token_map()[::-1].copy()
    checkpoint = Checkpoint.open(
        write(
            tmp_path,
            constants=constants,
            spelling=renamed(
                DEEPSEEK, keys=DEEPSEEK.keys | {"engram_pad_token_id": "engram.pad_token_id"}
            ),
        )
    )
    with pytest.raises(
        DigestMismatch, match=r"token_map: id 0: expected 0, as .*tokenizer.json has"
    ):
        checkpoint.vocab()


def with_config(path: Path, **change: Any) -> None:
    (path / "config.json").write_text(json.dumps({**V41, **change}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engram_layer_ids": [1, 2]}, r"engram.layer_ids: expected \[1, 2\].*found \[1, 3\]"),
        ({"engram_n_heads": 4}, "engram.head_count: expected 4.*found 2"),
        ({"engram_head_dim": 32}, "engram.key_length: expected 32.*found 64"),
        ({"engram_max_ngram_size": 4}, "engram.max_ngram_size: expected 4.*found 3"),
        ({"engram_vocab_size": 60}, "engram.primes: number 0: expected 61.*config.json.*found 53"),
        ({"engram_compressed_vocab_size": 41}, "engram.multipliers: number 0"),
        ({"engram_pad_token_id": 5}, "engram.pad_id: expected 5, .*filler 5, found 2"),
    ],
)
def test_metadata_that_differ_from_the_config_beside_it_are_named(tmp_path, change, message):
    with_config(tmp_path, **change)
    with pytest.raises(DigestMismatch, match=message):
        Checkpoint.open(write(tmp_path))


def changed_rows(change: Any, kind: str = "q8_0") -> dict[int, np.ndarray]:
    return {layer: change(raw) for layer, raw in rows_of(kind, V41).items()}


def test_a_wrong_row_count_is_named(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", changed_rows(lambda raw: raw[1:]), "q8_0")
    with pytest.raises(TableError, match="rows of layer 1: expected 240, .*metadata, found 239"):
        Checkpoint.open(path)


def test_a_wrong_row_width_is_named(tmp_path):
    rows = {layer: drawn_rows("q8_0", len(raw), 32) for layer, raw in rows_of("q8_0", V41).items()}
    path = write_gguf(tmp_path / "m.gguf", rows, "q8_0")
    with pytest.raises(TableError, match=r"row width: expected \[rows, 64\].* found \[240, 32\]"):
        Checkpoint.open(path)


def test_a_type_without_rows_is_named(tmp_path):
    rows = {
        layer: np.zeros((len(raw), 40), np.uint8) for layer, raw in rows_of("q8_0", V41).items()
    }
    kind = gguf.GGMLQuantizationType.Q4_1
    path = write_gguf(tmp_path / "m.gguf", rows, "q8_0", raw_type=kind)
    with pytest.raises(TableError, match="type: expected one of F32, .*Q5_K, found Q4_1"):
        Checkpoint.open(path)


def test_an_unknown_type_is_named(tmp_path):
    path = write(tmp_path)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"blk.1.engram_embd.weight") + len("blk.1.engram_embd.weight") + 4 + 16
    raw[at : at + 4] = (143).to_bytes(4, "little")
    path.write_bytes(raw)
    with pytest.raises(TableError, match="blk.1.engram_embd.weight: type: .*found type 143"):
        Checkpoint.open(path)


def test_layers_of_two_kinds_are_refused(tmp_path):
    rows = {1: rows_of("q8_0", V41)[1], 3: rows_of("bf16", V41)[3]}
    path = write_gguf_mixed(tmp_path / "m.gguf", rows)
    with pytest.raises(TableError, match="rows of one format in all layers"):
        Checkpoint.open(path)


def write_gguf_mixed(path: Path, rows: dict[int, np.ndarray]) -> Path:
    """Layer 1 is Q8_0 and layer 3 is BF16."""
    original = gguf.GGUFWriter.add_tensor

    def add_tensor(self: Any, name: str, tensor: np.ndarray, raw_dtype: Any = None) -> None:
        if name.startswith("blk.3.engram"):
            raw_dtype = gguf.GGMLQuantizationType.BF16
        original(self, name, tensor, raw_dtype=raw_dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", add_tensor)
        return write_gguf(path, rows, "q8_0")


def test_two_tensors_of_one_shape_are_no_answer(tmp_path):
    rows = rows_of("q8_0", V41)
    spelling = renamed(DEEPSEEK, table="t{layer}", keys=DEEPSEEK.keys)
    path = write_gguf(
        tmp_path / "m.gguf", {1: rows[1], 2: rows[1], 3: rows[3]}, "q8_0", V41, spelling
    )
    with pytest.raises(
        TableError, match=r"240 rows of 64 values, for layer 1; found 2 .*\['t1', 't2'\]"
    ):
        Checkpoint.open(path)


def test_a_file_without_tables_is_named(tmp_path):
    spelling = renamed(DEEPSEEK, keys={}, constants={})
    path = write_gguf(tmp_path / "m.gguf", {}, "q8_0", V41, spelling)
    with pytest.raises(ConfigError, match=r"expected a tensor per_layer_token_embd.weight \(Qwen4"):
        Checkpoint.open(path)


def test_a_missing_split_is_named(tmp_path):
    path = write(tmp_path, split_tensors=2)
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(ShardMissing, match="m-00002-of-00003.gguf"):
        Checkpoint.open(path)


def test_a_source_is_known_again_and_another_one_is_not(tmp_path):
    first = Checkpoint.open(write(tmp_path)).source_id
    assert Checkpoint.open(tmp_path / "m.gguf").source_id == first
    (tmp_path / "o").mkdir()
    other = write_gguf(tmp_path / "o/m.gguf", rows_of("q8_0", V41, seed=5), "q8_0")
    assert Checkpoint.open(other).source_id != first


def test_a_folder_of_safetensors_says_what_it_holds(tmp_path):
    text = Checkpoint.open(write_v41(tmp_path / "c")).describe()
    assert "DeepSeek-V4.1 in" in text and "layer 3: 306 rows of 66 bytes (fp8, d = 64)" in text


@pytest.mark.parametrize("missing", ["hidden_size", "engram_head_dim", "rms_norm_eps", "hc_mult"])
def test_metadata_without_a_size_say_what_is_missing(tmp_path, missing):
    keys = {name: key for name, key in DEEPSEEK.keys.items() if name != missing}
    path = write(tmp_path, spelling=renamed(DEEPSEEK, keys=keys))
    try:
        config = Checkpoint.open(path).config
    except EngraphyError as error:
        assert "config.json" in str(error) and missing != "engram_head_dim"
    else:
        assert config.dim == 64 and missing == "engram_head_dim"
