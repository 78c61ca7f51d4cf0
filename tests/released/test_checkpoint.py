"""A released checkpoint: its tables are found under the released names, and every contradiction has
its name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from engraphy.addresses.vocab import VocabMap
from engraphy.errors import (
    ConfigError,
    DigestMismatch,
    EngraphyError,
    ShardCorrupt,
    ShardMissing,
    ShardTruncated,
    TableError,
)
from engraphy.released.checkpoint import Checkpoint
from engraphy.rows import RowFormat
from engraphy.spec import EngramConfig
from engraphy.table.safetensors import read_header
from tests.tools.releases import (
    QWEN,
    V41,
    qwen_tensors,
    records,
    tokenizer,
    v41_tensors,
    write_qwen,
    write_release,
    write_safetensors,
    write_v41,
)

WEIGHT, SCALE = "layers.1.engram.embed.weight", "layers.1.engram.embed.scale"
BASE = "model.language_model.layers.1.ple.ple_embedding"


def read(
    checkpoint: Checkpoint, layer: int, first: int = 0, count: int | None = None
) -> np.ndarray:
    count = checkpoint.config.hash.row_count(layer) - first if count is None else count
    out = np.full((count, checkpoint.fmt.row_bytes), 0xA5, np.uint8)
    checkpoint.read_rows(layer, first, out)
    return out


# What is there is found.


@pytest.mark.parametrize("scale_dtype", ["F8_E8M0", "U8"])
def test_a_deepseek_release_is_weights_and_scales_joined_to_records(tmp_path, scale_dtype):
    checkpoint = Checkpoint.open(write_v41(tmp_path / "c", scale_dtype=scale_dtype))
    assert checkpoint.fmt == RowFormat("fp8", 64) and checkpoint.fmt.row_bytes == 66
    assert checkpoint.config == EngramConfig.from_hf(V41) and checkpoint.config.hash.layer_ids == (
        1,
        3,
    )
    for layer in (1, 3):
        np.testing.assert_array_equal(read(checkpoint, layer), records(v41_tensors(), layer))


@pytest.mark.parametrize(
    ("fp8", "fmt"), [(False, RowFormat("bf16", 32)), (True, RowFormat("fp8_scaled", 32, 2**-6))]
)
def test_a_qwen_release_is_its_parts_in_the_order_of_their_numbers(tmp_path, fp8, fmt):
    config = QWEN | {"split_ngram_parts": 12}  # shard_10 comes after shard_9, not after shard_1
    checkpoint = Checkpoint.open(write_qwen(tmp_path / "c", config, fp8=fp8))
    expected = records(qwen_tensors(config, fp8=fp8), 1)
    assert (
        checkpoint.fmt == fmt
        and len(checkpoint.weights[1]) == 12
        and checkpoint.config.hash.layer_ids == (1,)
    )
    np.testing.assert_array_equal(read(checkpoint, 1), expected)
    for first, count in (
        (0, 1),
        (21, 3),
        (20, 45),
        (255, 1),
        (7, 0),
    ):  # within, at and over the ends of parts
        np.testing.assert_array_equal(
            read(checkpoint, 1, first, count), expected[first : first + count]
        )


def test_every_layer_that_the_config_names_has_its_table(tmp_path):
    config, scale = (
        QWEN | {"ple_layer_ids": [2, 4]},
        "model.language_model.layers.3.ple.ple_embedding.ngram_embedding.weight_scale",
    )
    tensors = qwen_tensors(config, fp8=True)
    checkpoint = Checkpoint.open(write_qwen(tmp_path / "c", config, tensors=tensors))
    for layer in (1, 3):
        np.testing.assert_array_equal(read(checkpoint, layer), records(tensors, layer))
    other = tensors | {scale: ("BF16", np.array([0, 0x3D], np.uint8))}
    with pytest.raises(TableError, match="rows of one format in all layers"):
        Checkpoint.open(write_qwen(tmp_path / "d", config, tensors=other))


def test_one_tensor_and_one_file_without_an_index_are_a_release_too(tmp_path):
    path, tensors = tmp_path / "c", qwen_tensors()
    names = sorted(name for name in tensors if "shard_" in name)
    whole = {f"{BASE}.ngram_embedding.weight": ("BF16", records(tensors, 1))}
    write_release(path, QWEN, {}, [])
    (path / "model.safetensors.index.json").unlink()
    write_safetensors(
        path / "model.safetensors", {k: v for k, v in tensors.items() if k not in names} | whole
    )
    np.testing.assert_array_equal(read(Checkpoint.open(path), 1), records(tensors, 1))


def test_names_may_have_any_prefix(tmp_path):
    tensors = {f"model.language_model.{name}": value for name, value in v41_tensors().items()}
    write_release(tmp_path / "c", V41, tensors, [list(tensors)])
    np.testing.assert_array_equal(
        read(Checkpoint.open(tmp_path / "c"), 3), records(v41_tensors(), 3)
    )


def test_a_file_whose_header_ends_at_an_odd_byte_is_read(tmp_path):
    path = write_v41(tmp_path / "c")
    file = path / "model-00002-of-00003.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    file.write_bytes(
        (length + 3).to_bytes(8, "little") + raw[8 : 8 + length] + b"   " + raw[8 + length :]
    )
    np.testing.assert_array_equal(read(Checkpoint.open(path), 1), records(v41_tensors(), 1))


# The vocabulary map.


def test_the_map_is_the_tokenizers_or_a_saved_one(tmp_path):
    path = write_v41(tmp_path / "c")
    expected = VocabMap.from_tokenizer(tokenizer())
    assert Checkpoint.open(path).vocab().digest == expected.digest
    expected.save(tmp_path / "v.json")
    (path / "tokenizer.json").unlink()
    assert Checkpoint.open(path).vocab(tmp_path / "v.json").digest == expected.digest
    with pytest.raises(ConfigError, match="tokenizer.json: expected the tokenizer"):
        Checkpoint.open(path).vocab()


def test_ids_beyond_the_tokenizer_are_dead(tmp_path):
    vocab = Checkpoint.open(write_v41(tmp_path / "c", V41 | {"vocab_size": 64})).vocab()
    assert (vocab.raw_size, len(vocab), vocab.table[60:].tolist()) == (64, 40, [-1] * 4)


def test_a_map_that_is_not_the_checkpoints_is_refused(tmp_path):
    deepseek = Checkpoint.open(write_v41(tmp_path / "c"))
    VocabMap.identity(60).save(tmp_path / "v.json")
    with pytest.raises(
        DigestMismatch, match="expected 40 compressed ids, as config.json says, found 60"
    ):
        deepseek.vocab(tmp_path / "v.json")
    (tmp_path / "c/tokenizer.json").write_text("{}")
    for wrong, message in (
        (None, "tokenizer.json: expected a tokenizer"),
        (tmp_path / "none", "No such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            deepseek.vocab(wrong)
    qwen = Checkpoint.open(write_qwen(tmp_path / "q"))
    assert (
        qwen.vocab().digest
        == qwen.vocab(tmp_path / "v.json").digest
        == VocabMap.identity(60).digest
    )
    VocabMap(np.arange(60)[::-1]).save(tmp_path / "w.json")
    with pytest.raises(DigestMismatch, match="expected the identity map of 60 ids"):
        qwen.vocab(tmp_path / "w.json")


# The identity of a source.


def test_a_source_is_known_again_elsewhere_and_another_one_is_not(tmp_path):
    path = write_v41(tmp_path / "c")
    first = Checkpoint.open(path).source_id
    assert Checkpoint.open(shutil.copytree(path, tmp_path / "moved")).source_id == first
    others = [
        write_v41(tmp_path / "trained", seed=1),
        write_v41(tmp_path / "u8", scale_dtype="U8"),
        write_v41(tmp_path / "config", V41 | {"hc_mult": 2}),
    ]
    assert len({first} | {Checkpoint.open(other).source_id for other in others}) == 4


# Every contradiction has its name.


def index(path: Path, change) -> None:
    file = path / "model.safetensors.index.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def config(path: Path, **change) -> None:
    data = json.loads((path / "config.json").read_text())
    data["text_config"] |= change
    (path / "config.json").write_text(json.dumps(data))


def resize(path: Path, change: int) -> None:
    os.truncate(path, path.stat().st_size + change)


def patch(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


FILE = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
FILES = {
    "no config.json": (lambda c: (c / "config.json").unlink(), ConfigError, "found no file"),
    "config.json that is not JSON": (
        lambda c: resize(c / "config.json", -1),
        ConfigError,
        "expected JSON",
    ),
    "config.json that is a list": (
        lambda c: (c / "config.json").write_text("[]"),
        ConfigError,
        "found list",
    ),
    "the config of another model": (
        lambda c: config(c, engram_layer_ids=None),
        ConfigError,
        "engram_layer_ids",
    ),
    "a config without a width": (
        lambda c: config(c, engram_head_dim=None),
        ConfigError,
        "engram_head_dim",
    ),
    "a config that contradicts itself": (
        lambda c: config(c, engram_num_embeddings=[240, 307]),
        ConfigError,
        r"engram_num_embeddings.*240, 306",
    ),
    "a config of other sizes": (
        lambda c: config(c, engram_vocab_size=60),
        TableError,
        "rows of layer 1: expected 272.* found 240",
    ),
    "a config of another width": (
        lambda c: config(c, engram_head_dim=32),
        TableError,
        r"row width: expected \[rows, 32\].*found \[240, 64\]",
    ),
    "no directory": (lambda c: shutil.rmtree(c), ConfigError, "found no file"),
    "neither index nor file": (lambda c: (c / INDEX).unlink(), TableError, "found neither"),
    "an index that is not JSON": (lambda c: resize(c / INDEX, -1), TableError, "expected an index"),
    "an index without a map": (lambda c: (c / INDEX).write_text("{}"), TableError, "KeyError"),
    "an index of numbers": (
        lambda c: (c / INDEX).write_text('{"weight_map": {"a": 1}}'),
        TableError,
        "expected an in",
    ),
    "an index that leads elsewhere": (
        lambda c: index(c, lambda i: i["weight_map"].update({WEIGHT: "../x"})),
        TableError,
        r"found '\.\./x'",
    ),
    "an index without the weight": (
        lambda c: index(c, lambda i: i["weight_map"].pop(WEIGHT)),
        TableError,
        "expected one table .* found 0",
    ),
    "an index without the scale": (
        lambda c: index(c, lambda i: i["weight_map"].pop(SCALE)),
        TableError,
        f"expected the tensor {SCALE}",
    ),
    "an index that names another file": (
        lambda c: index(
            c, lambda i: i["weight_map"].update({SCALE: "model-00001-of-00003.safetensors"})
        ),
        TableError,
        "which the index puts here, found none",
    ),
    "two tables for one layer": (
        lambda c: index(c, lambda i: i["weight_map"].update({"mtp." + WEIGHT: FILE})),
        TableError,
        "found 2 among",
    ),
    "a missing shard": (lambda c: (c / FILE).unlink(), ShardMissing, "found none"),
    "a truncated shard": (
        lambda c: resize(c / FILE, -1),
        ShardTruncated,
        "as its header says, found",
    ),
    "an extended shard": (
        lambda c: resize(c / FILE, 1),
        ShardTruncated,
        "as its header says, found",
    ),
    "a shard shorter than its header": (
        lambda c: os.truncate(c / FILE, 100),
        ShardTruncated,
        "less than its header",
    ),
    "a shard of a few bytes": (
        lambda c: os.truncate(c / FILE, 7),
        ShardTruncated,
        "less than its header",
    ),
    "a garbage header": (
        lambda c: patch(c / FILE, 8, b"\xfe" * 64),
        ShardCorrupt,
        "expected a safetensors header",
    ),
    "a header that is a list": (
        lambda c: patch(
            c / FILE, 8, b"[]".ljust(int.from_bytes((c / FILE).read_bytes()[:8], "little"))
        ),
        ShardCorrupt,
        "expected a safetensors header",
    ),
    "a header too long to be one": (
        lambda c: patch(c / FILE, 0, b"\xff" * 8),
        ShardCorrupt,
        "header of at most",
    ),
}


@pytest.mark.parametrize("damage", FILES)
def test_a_damaged_folder_is_named(tmp_path, damage):
    path = write_v41(tmp_path / "c")
    apply, error, message = FILES[damage]
    apply(path)
    with pytest.raises(error, match=message):
        Checkpoint.open(path)


def retyped(tensors, name, dtype):
    return tensors | {name: (dtype, tensors[name][1])}


def reshaped(tensors, name, raw):
    return tensors | {name: (tensors[name][0], raw)}


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


PART, LAST = f"{BASE}.ngram_embedding.shard_1.weight", f"{BASE}.ngram_embedding.shard_2.weight"
ONE_SCALE = f"{BASE}.ngram_embedding.weight_scale"
DEEPSEEK = {
    "weights that are not e4m3": (
        lambda t: retyped(t, WEIGHT, "U8"),
        TableError,
        "expected F8_E4M3, found U8",
    ),
    "weights of another width": (
        lambda t: retyped(t, WEIGHT, "BF16"),
        TableError,
        r"expected \[rows, 64\].*found \[240, 32\]",
    ),
    "scales that are not ue8m0": (
        lambda t: retyped(t, SCALE, "F8_E4M3"),
        TableError,
        "expected F8_E8M0 or U8, found F8_E4M3",
    ),
    "scales of blocks of rows": (
        lambda t: reshaped(t, SCALE, t[SCALE][1][:8]),
        TableError,
        r"scales: expected \[240, 2\].* found \[8, 2\]",
    ),
    "scales of another block size": (
        lambda t: reshaped(t, SCALE, t[SCALE][1][:, :1]),
        TableError,
        r"scales: expected \[240, 2\].*\[240, 1\]",
    ),
    "a row less": (
        lambda t: reshaped(t, WEIGHT, t[WEIGHT][1][1:]),
        TableError,
        "rows of layer 1: expected 240.* found 239",
    ),
    "one dimension": (
        lambda t: reshaped(t, WEIGHT, t[WEIGHT][1].reshape(-1)),
        TableError,
        r"row width.* found \[15360\]",
    ),
}
QWENS = {
    "a part in the middle missing": (
        lambda t: without(t, PART),
        TableError,
        r"shard_0 to shard_2, found \[",
    ),
    "the last part missing": (
        lambda t: without(t, LAST),
        TableError,
        "expected 256.* found 172 in 2 tensors",
    ),
    "parts of other sizes": (
        lambda t: reshaped(t, PART, t[PART][1][:40]),
        TableError,
        "rows: expected 86 as in .*shard_0.*, found 40",
    ),
    "a whole table beside its parts": (
        lambda t: t | {f"{BASE}.ngram_embedding.weight": t[PART]},
        TableError,
        "expected one tensor, or shard_0",
    ),
    "parts of two dtypes": (
        lambda t: retyped(t, PART, "F16"),
        TableError,
        "expected BF16 as in .*, found F16",
    ),
    "integers": (
        lambda t: {k: ("U8", v[1][:, :32]) if "shard_" in k else v for k, v in t.items()},
        TableError,
        "expected BF16, F16, F32, or F8_E4M3 with",
    ),
    "a scale for values that have none": (
        lambda t: t | {ONE_SCALE: ("BF16", np.zeros(2, np.uint8))},
        TableError,
        "found BF16 with it",
    ),
    "other multipliers": (
        lambda t: reshaped(t, f"{BASE}.layer_multipliers", np.arange(3).view(np.uint8)),
        DigestMismatch,
        r"layer_multipliers: expected .* found \[0, 1, 2\]",
    ),
    "other primes": (
        lambda t: reshaped(t, f"{BASE}.ngram_heads_vocab_sizes", np.arange(4).view(np.uint8)),
        DigestMismatch,
        "sizes",
    ),
    "another number of heads": (
        lambda t: reshaped(t, f"{BASE}.ngram_heads_offsets", np.arange(3).view(np.uint8)),
        TableError,
        r"I64 \[4\]",
    ),
}
FP8S = {
    "no scale": (lambda t: without(t, ONE_SCALE), TableError, "F8_E4M3 without it"),
    "two scales": (
        lambda t: reshaped(t, ONE_SCALE, np.tile(t[ONE_SCALE][1], 2)),
        TableError,
        r"expected one .* found BF16 \[2\]",
    ),
    "a scale of zero": (
        lambda t: reshaped(t, ONE_SCALE, np.zeros(2, np.uint8)),
        ConfigError,
        "positive float32 scale",
    ),
    "a scale that is NaN": (
        lambda t: reshaped(t, ONE_SCALE, np.full(2, 255, np.uint8)),
        ConfigError,
        "found nan",
    ),
}


@pytest.mark.parametrize("damage", [*DEEPSEEK, *QWENS, *FP8S])
def test_wrong_tensors_are_named(tmp_path, damage):
    if damage in DEEPSEEK:
        (change, error, message), write, tensors = DEEPSEEK[damage], write_v41, v41_tensors()
    else:
        (change, error, message), write = (QWENS | FP8S)[damage], write_qwen
        tensors = qwen_tensors(fp8=damage in FP8S)
    with pytest.raises(error, match=message) as caught:
        Checkpoint.open(write(tmp_path / "c", tensors=change(tensors)))
    assert "scale that is" in damage or "scale of" in damage or str(tmp_path) in str(caught.value)


EMBED, NGRAM = "layers.1.engram.embed", f"{BASE}.ngram_embedding"
UNKNOWN = {
    "a zero point": (v41_tensors, f"{EMBED}.zero_point"),
    "a bias": (qwen_tensors, f"{NGRAM}.bias"),
    "a scale of another kind": (v41_tensors, f"{EMBED}.weight_scale_inv"),
    "a scale of a part": (qwen_tensors, f"{NGRAM}.shard_0.weight_scale"),
    "a scale beside the name": (qwen_tensors, f"{NGRAM}_scale"),
    "more parts under another name": (qwen_tensors, f"{NGRAM}.part_3.weight"),
    "parts numbered otherwise": (v41_tensors, f"{EMBED}.3.weight"),
    "a tensor without a last name": (v41_tensors, EMBED),
    "the table of a layer that the config does not name": (
        v41_tensors,
        "layers.2.engram.embed.weight",
    ),
}


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unknown_tensor_under_a_tables_name_is_refused_listed_or_not(tmp_path, case, listed):
    tensors, name = UNKNOWN[case][0](), UNKNOWN[case][1]
    files = [[*tensors, name]]
    path = write_release(
        tmp_path / "c",
        V41 if "engram" in name else QWEN,
        tensors | {name: ("U8", np.zeros((2, 2), np.uint8))},
        files,
    )
    if not listed:
        index(path, lambda i: i["weight_map"].pop(name))
    with pytest.raises(TableError, match=rf"{name}: expected nothing under the name of a table"):
        Checkpoint.open(path)


def test_an_unknown_tensor_of_any_dtype_in_a_single_file_is_refused(tmp_path):
    path = write_release(tmp_path / "c", V41, {}, [])
    (path / INDEX).unlink()
    file, zero_point = path / "model.safetensors", ("U8", np.zeros(4, np.uint8))
    write_safetensors(file, v41_tensors() | {f"{EMBED}.zero_point": zero_point})
    before, after = (f'zero_point": {{"dtype": "{dtype}"'.encode() for dtype in ("U8", "I4"))
    file.write_bytes(file.read_bytes().replace(before, after))
    with pytest.raises(TableError, match=f"{EMBED}.zero_point"):
        Checkpoint.open(path)


def test_other_tensors_of_the_memory_and_tables_under_another_prefix_are_no_matter(tmp_path):
    other = ("BF16", np.zeros((3, 8), np.uint8))
    for number, (config, tensors, names) in enumerate(
        (
            (
                V41,
                v41_tensors(),
                [
                    "layers.1.engram.wkv.weight",
                    "layers.1.engram.embedding.weight",
                    "mtp.layers.2.engram.embed.weight",
                ],
            ),
            (
                QWEN,
                qwen_tensors(),
                ["model.language_model.layers.1.ple.norm_key.weight", f"{BASE}.other"],
            ),
        )
    ):
        held = tensors | dict.fromkeys(names, other)
        path = write_release(tmp_path / str(number), config, held, [list(held)])
        np.testing.assert_array_equal(read(Checkpoint.open(path), 1), records(tensors, 1))


# What a folder lacks, and what it has instead.


@pytest.mark.parametrize(
    ("write", "pattern", "found"),
    [
        (write_v41, "embed", "found 0 among"),
        (write_qwen, "ngram_embedding", "found 0 among"),
        (write_v41, "layers.1.engram.embed.scale", "found none of this name"),
        (write_qwen, "shard_2", "found 172 in 2 tensors"),
        (write_qwen, "shard_1", "shard_0 to shard_2"),
    ],
)
def test_files_that_the_index_leaves_out_are_named_where_they_hold_the_table(
    tmp_path, write, pattern, found
):
    path, left = write(tmp_path / "c"), set()

    def leave_out(data: dict) -> None:
        for name in [name for name in data["weight_map"] if pattern in name]:
            left.add(data["weight_map"].pop(name))

    index(path, leave_out)
    write_safetensors(path / "extra.safetensors", {"other": ("U8", np.zeros((2, 2), np.uint8))})
    with pytest.raises(TableError, match=found) as caught:
        Checkpoint.open(path)
    if "layers" not in str(pattern) and write is write_v41:
        left = {sorted(left)[0]}  # the first layer that lacks its table is named
    assert f"the folder has it in {', '.join(sorted(left))}, which {INDEX} does not say" in str(
        caught.value
    )


def test_files_without_their_index_are_named(tmp_path):
    path = write_v41(tmp_path / "c")
    (path / INDEX).unlink()
    with pytest.raises(
        TableError, match="neither: 3 files such as model-00001-of-00003.safetensors, whose"
    ):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "U8", "shape": [4], "data_offsets": [0, 5]},
        {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]},
        {"dtype": "U8", "shape": [-4], "data_offsets": [0, 4]},
        {"dtype": 8, "shape": [4], "data_offsets": [0, 4]},
        {"dtype": "U8", "shape": [4.0], "data_offsets": [0, 4]},
        {"dtype": "U8", "shape": 4, "data_offsets": [0, 4]},
        {"dtype": "U8", "shape": [4], "data_offsets": [0]},
        {"dtype": "U8", "shape": [4]},
        {},
        3,
        None,
    ],
)
def test_an_entry_that_cannot_be_is_a_corrupt_header(tmp_path, entry):
    text = json.dumps({"a": entry}).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(5))
    with pytest.raises((ShardCorrupt, ShardTruncated)):
        read_header(tmp_path / "x")


def test_no_cut_of_a_shard_passes(tmp_path):
    path = write_v41(tmp_path / "c")
    whole = (path / FILE).read_bytes()
    for size in {*range(0, 40), *range(40, len(whole), 211), len(whole) - 1}:
        (path / FILE).write_bytes(whole[:size])
        with pytest.raises(EngraphyError, match=FILE):
            Checkpoint.open(path)
