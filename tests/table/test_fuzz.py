"""Files that nobody wrote: opening gives the right rows or one of our errors, soon and in little
memory."""

from __future__ import annotations

import copy
import json
import math
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject, SearchStrategy

from engraphy.errors import EngraphyError, RowOutOfRange
from engraphy.released.checkpoint import Checkpoint
from engraphy.rows import read
from engraphy.spec import EngramConfig
from engraphy.store import open_store
from engraphy.table import Table
from engraphy.table.manifest import _checksum
from engraphy.table.safetensors import read_header
from engraphy.table.shards import HEADER_BYTES
from tests.tools import releases
from tests.tools.store_builders import LAYER, STORES, build, fmt_of, sealed, usual

EXAMPLES = 100
SECONDS, MEMORY = 5, 1 << 30  # a file of some kB is opened in milliseconds, in kilobytes

NUMBERS = st.sampled_from(
    [
        0,
        1,
        -1,
        2,
        7,
        33,
        1000,
        10**6,
        10**9,
        2**31,
        2**53,
        2**62,
        2**63,
        2**64,
        -(2**63),
        10**18,
        10**30,
        10**4299,
        0.5,
        1e308,
        math.nan,
        math.inf,
        -math.inf,
    ]
)
WORDS = st.sampled_from(
    [
        "",
        "x",
        "0" * 32,
        "f" * 64,
        "../x",
        "a/b",
        "bf16",
        "f16",
        "fp8_scaled",
        "qwen4",
        "\0",
        "\ud800",
        "é" * 300,
        "U8",
        "I64",
        "F8_E4M3",
    ]
)
PLAIN = st.one_of(NUMBERS, WORDS, st.none(), st.booleans(), st.integers(-3, 300))
JUNK = st.one_of(
    PLAIN,
    st.lists(PLAIN, max_size=3),
    st.dictionaries(WORDS, PLAIN, max_size=2),
    st.integers(1, 1200).map(lambda depth: Nested(depth)),
)


class Nested:
    """A list in a list in a list; told as text, since Python cannot dump what it cannot parse."""

    def __init__(self, depth: int) -> None:
        self.text = "[" * depth + "]" * depth


@contextmanager
def bounded() -> Iterator[None]:
    """Within, time and memory beyond the bounds are errors: neither is one of ours."""

    def too_long(number: int, frame: Any) -> None:
        raise RuntimeError(f"it took more than {SECONDS} s")

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, handler = (
        resource.getrlimit(resource.RLIMIT_AS),
        signal.signal(signal.SIGALRM, too_long),
    )
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """Where the values of a JSON tree are: keys and numbers from the root on."""
    yield at
    for key, below in (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    ):
        yield from places(below, (*at, key))


def value_at(tree: Any, at: tuple) -> Any:
    for key in at:
        tree = tree[key]
    return tree


def mutated(tree: Any, data: DataObject, times: int = 2) -> Any:
    """The tree with some values replaced, removed, moved, doubled, or keys added."""
    tree = copy.deepcopy(tree)
    for _ in range(data.draw(st.integers(1, times))):
        at = data.draw(st.sampled_from([place for place in places(tree) if place] or [()]))
        if not at:
            return data.draw(JUNK)
        parent, key = value_at(tree, at[:-1]), at[-1]
        how = data.draw(
            st.sampled_from(["replace", "replace", "number", "remove", "copy", "add", "double"])
        )
        if how == "number" and type(parent[key]) is int:
            parent[key] += data.draw(st.sampled_from([1, -1, 10**9, -(10**9), 2**62]))
        elif how == "copy":
            parent[key] = copy.deepcopy(
                value_at(tree, data.draw(st.sampled_from(list(places(tree)))))
            )
        elif how == "remove":
            del parent[key]
        elif how == "add" and isinstance(parent, dict):
            parent[data.draw(WORDS)] = data.draw(JUNK)
        elif how == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        else:
            parent[key] = data.draw(JUNK)
    return tree


def text_of(tree: Any) -> bytes:
    """As JSON; `Nested` as what it stands for."""
    nested: list[str] = []

    def mark(value: Any) -> str:
        nested.append(value.text)
        return f"nested {len(nested) - 1}."

    text = json.dumps(tree, default=mark)
    for number, lists in enumerate(nested):
        text = text.replace(f'"nested {number}."', lists)
    return text.encode()


def bytes_mutated(raw: bytes, data: DataObject) -> bytes:
    """Some bytes replaced, inserted or removed, a part of the text said twice, or text that is
    none."""
    for _ in range(data.draw(st.integers(1, 3))):
        at, size = data.draw(st.integers(0, len(raw))), data.draw(st.integers(0, 20))
        more = data.draw(
            st.sampled_from(
                [
                    b"",
                    b"\xff",
                    b"\xed\xa0\x80",
                    b"\0",
                    b"[",
                    b"]",
                    b'"',
                    b",",
                    b"9",
                    b"-",
                    b"NaN",
                    b"[" * 100_000,
                    b'{"a":' * 2000,
                    b"9" * 5000,
                    b"1e999",
                    raw[at : at + size],
                ]
            )
        )
        raw = raw[:at] + more + raw[at + data.draw(st.sampled_from([0, len(more), size])) :]
    return raw


# A table.


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> tuple[Path, np.ndarray]:
    """Rows of bf16, which as f16 would have the same size."""
    path = tmp_path_factory.mktemp("fuzz") / "table"
    return path, sealed(path, fmt_of("bf16"), shard_rows=30)


@contextmanager
def content(path: Path, raw: bytes) -> Iterator[None]:
    """The file has other bytes meanwhile."""
    before = path.read_bytes()
    path.write_bytes(raw)
    try:
        yield
    finally:
        path.write_bytes(before)


def open_and_compare(path: Path, expected: np.ndarray) -> bool:
    """Whether it opens. Then rows are right."""
    with bounded():
        try:
            store = open_store(f"file:{path}?read=mmap", layer=LAYER)
        except EngraphyError as error:
            assert str(error)
            return False
        np.testing.assert_array_equal(store.gather(np.arange(len(expected))), expected)
        assert Table.open(path).fmt == store.info.format
        store.close()
        return True


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_an_engram_json_of_other_values_opens_with_the_right_rows_or_is_one_of_our_errors(
    table, data
):
    path, expected = table
    tree = mutated(json.loads((path / "engram.json").read_bytes()), data)
    with content(path / "engram.json", text_of(tree)):
        if open_and_compare(path, expected) and "checksum" in tree:
            assert Table.open(path).fmt == fmt_of("bf16")


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_an_engram_json_that_vouches_for_its_other_values_does_not_fool_anybody_either(table, data):
    """Digest and checksum are of what stands there, as somebody's own program would write them."""
    path, expected = table
    tree = json.loads((path / "engram.json").read_bytes())
    part = data.draw(st.sampled_from(["config", "shard_rows", "layers", "row_format"]))
    tree[part] = mutated(tree[part], data, times=3)
    try:
        tree["address_digest"] = EngramConfig.from_json(tree["config"]).address_digest(
            tree["vocab_digest"]
        )
    except (EngraphyError, TypeError, ValueError):
        pass
    try:
        tree["checksum"] = _checksum(
            {key: value for key, value in tree.items() if key != "checksum"}
        )
    except (TypeError, ValueError):
        pass
    with content(path / "engram.json", text_of(tree)):
        open_and_compare(path, expected)


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 10**9},
        {"heads": 4096, "rows_per_head": [10**9, 10**9]},
        {"rows_per_head": [10**15, 10**15]},
        {"vocab_size": 10**30},
        {"pad_to": 10**18},
        {"rows_per_head": [10**4299, 1]},
        {"seed": 10**4299},
    ],
)
def test_sizes_that_no_memory_holds_are_refused_before_anything_is_made_of_them(table, change):
    path, expected = table
    tree = json.loads((path / "engram.json").read_bytes())
    tree["config"]["hash"] |= change
    tree["config"]["layer"]["width"] = 2 * tree["config"]["hash"]["heads"] * 32
    try:
        tree["address_digest"] = EngramConfig.from_json(tree["config"]).address_digest(
            tree["vocab_digest"]
        )
    except EngraphyError:
        pass
    for shard_rows in (30, 1):
        tree["shard_rows"] = shard_rows
        with content(path / "engram.json", json.dumps(tree).encode()):
            assert not open_and_compare(path, expected)


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_an_engram_json_of_other_bytes_opens_with_the_right_rows_or_is_one_of_our_errors(
    table, data
):
    path, expected = table
    with content(path / "engram.json", bytes_mutated((path / "engram.json").read_bytes(), data)):
        if open_and_compare(path, expected):
            assert Table.open(path).fmt == fmt_of("bf16")


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_a_field_that_is_said_twice_counts_once_and_is_checked(table, data):
    path, expected = table
    raw = (path / "engram.json").read_bytes()
    tree = json.loads(raw)
    key = data.draw(st.sampled_from(sorted(tree)))
    again = text_of({key: data.draw(st.one_of(st.just(tree[key]), JUNK))})[1:-1]
    with content(
        path / "engram.json",
        b"{" + again + b"," + raw[1:]
        if data.draw(st.booleans())
        else raw.rstrip()[:-1] + b"," + again + b"}",
    ):
        if open_and_compare(path, expected):
            assert Table.open(path).fmt == fmt_of("bf16")


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_a_shard_with_another_header_is_one_of_our_errors(table, data):
    path, expected = table
    shard = sorted(path.glob("layer-00003-*"))[1]
    raw = shard.read_bytes()
    if data.draw(st.booleans()):
        header = text_of(mutated(json.loads(raw[8:HEADER_BYTES]), data))
    else:
        header = bytes_mutated(raw[8:HEADER_BYTES].rstrip(), data)
    length = data.draw(
        st.sampled_from([HEADER_BYTES - 8, len(header), 0, 1, 2**63, 2**64 - 1, len(raw)])
    )
    wrong = (
        length.to_bytes(8, "little")
        + header[: HEADER_BYTES - 8].ljust(HEADER_BYTES - 8)
        + raw[HEADER_BYTES:]
    )
    with content(shard, wrong):
        assert open_and_compare(path, expected) == (wrong == raw)


# A released checkpoint.


@pytest.fixture(scope="module", params=["deepseek", "qwen"])
def release(request, tmp_path_factory) -> tuple[Path, np.ndarray]:
    path = tmp_path_factory.mktemp("fuzz") / "release"
    if request.param == "deepseek":
        return releases.write_v41(path), releases.records(releases.v41_tensors(), 1)
    return releases.write_qwen(path), releases.records(releases.qwen_tensors(), 1)


def serve_and_compare(path: Path, expected: np.ndarray, rows_checked: bool) -> None:
    """Where it opens, rows are read; and are the right ones where they could not have been put
    elsewhere."""
    with bounded():
        try:
            store = open_store(f"checkpoint:{path}", layer=1)
            found = store.gather(np.arange(store.info.rows))
            store.close()
        except EngraphyError as error:
            assert str(error)
            return
        if rows_checked:
            np.testing.assert_array_equal(found, expected)


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_a_safetensors_file_of_other_entries_is_served_or_is_one_of_our_errors(release, data):
    path, expected = release
    file = data.draw(st.sampled_from(sorted(path.glob("*.safetensors"))))
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, rows_checked = raw[8 : 8 + length], False
    if data.draw(st.booleans()):
        tree = mutated(json.loads(header), data)
        header = text_of(tree)
        # A table that is named another one's is that one: only values that are no offsets keep it
        # what it was.
        rows_checked = isinstance(tree, dict) and all(
            tree.get(name) == entry
            for name, entry in json.loads(raw[8 : 8 + length]).items()
            if name != "__metadata__"
        )
    else:
        header = bytes_mutated(header, data)
    length = data.draw(
        st.sampled_from([len(header), len(header), 0, 7, 2**31, 2**63, 2**64 - 1, len(raw)])
    )
    with content(
        file, length.to_bytes(8, "little") + header + raw[8 + int.from_bytes(raw[:8], "little") :]
    ):
        serve_and_compare(path, expected, rows_checked)


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_a_config_or_index_of_other_values_is_served_or_is_one_of_our_errors(release, data):
    path, expected = release
    file = path / data.draw(st.sampled_from(["config.json", "model.safetensors.index.json"]))
    raw = file.read_bytes()
    wrong = (
        text_of(mutated(json.loads(raw), data, 3))
        if data.draw(st.booleans())
        else bytes_mutated(raw, data)
    )
    with content(file, wrong):
        serve_and_compare(path, expected, False)


@pytest.mark.parametrize(
    "change",
    [
        {"engram_max_ngram_size": 10**9},
        {"engram_n_heads": 10**9},
        {"vocab_size": 10**18},
        {"engram_vocab_size": 10**15},
        {"engram_compressed_vocab_size": 10**15, "vocab_size": 10**18},
        {"engram_head_dim": 10**4299},
    ],
)
def test_sizes_in_a_config_that_no_memory_holds_are_refused_before_anything_is_made_of_them(
    tmp_path, change
):
    path = releases.write_v41(tmp_path / "c", releases.V41)
    (path / "config.json").write_text(json.dumps({"text_config": releases.V41 | change}))
    with bounded(), pytest.raises(EngraphyError):
        open_store(f"checkpoint:{path}", layer=1)


def test_a_config_within_a_config_without_an_end_is_one_of_our_errors(tmp_path):
    path = releases.write_v41(tmp_path / "c")
    for depth in (300, 900, 960, 5000):
        (path / "config.json").write_text('{"text_config":' * depth + "{}" + "}" * depth)
        with pytest.raises(EngraphyError):
            Checkpoint.open(path)


def test_a_part_whose_number_has_thousands_of_digits_is_one_of_our_errors(tmp_path):
    tensors = releases.qwen_tensors()
    name = next(name for name in tensors if "shard_1" in name)
    longer = {
        key.replace("shard_1", "shard_" + "1" * 5000): value for key, value in tensors.items()
    }
    assert name not in longer
    with pytest.raises(EngraphyError, match="expected 256.* found|expected one tensor"):
        Checkpoint.open(releases.write_qwen(tmp_path / "c", tensors=longer))


ENTRY = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "entries",
    [
        {"a": ENTRY, "b": ENTRY},
        {"a": ENTRY, "b": ENTRY | {"data_offsets": [2, 6]}},
        {"a": ENTRY, "b": ENTRY | {"data_offsets": [5, 9]}},
        {"a": ENTRY | {"data_offsets": [4, 8]}},
        {"a": ENTRY, "b": ENTRY | {"dtype": "C64", "shape": [0], "data_offsets": [2, 4]}},
    ],
)
def test_tensors_that_overlap_or_leave_a_gap_are_a_corrupt_header(tmp_path, entries):
    text = json.dumps(entries).encode()
    end = max(entry["data_offsets"][1] for entry in entries.values())
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    with pytest.raises(EngraphyError, match="overlap or a gap"):
        read_header(tmp_path / "x")


@pytest.mark.parametrize("shape", [[2**62] * 65, [2**62] * 200_000, [2**63, 0], [10**4299]])
def test_a_shape_that_would_take_long_to_multiply_is_a_corrupt_header(tmp_path, shape):
    text = json.dumps({"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with bounded(), pytest.raises(EngraphyError, match="invalid entry"):
        read_header(tmp_path / "x")


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors.index.json", "model-00002-of-00003.safetensors"]
)
def test_a_directory_in_the_place_of_a_file_of_a_checkpoint_is_one_of_our_errors(tmp_path, file):
    path = releases.write_v41(tmp_path / "c")
    (path / file).unlink()
    (path / file).mkdir()
    with pytest.raises(EngraphyError, match=f"{file}.*(directory|found something else)"):
        Checkpoint.open(path)


# Row ids.

IDS: SearchStrategy[list[int]] = st.lists(
    st.one_of(
        st.integers(-2, 90),
        st.integers(-(2**63), 2**63 - 1),
        st.sampled_from([-(2**63), 2**63 - 1, 2**32, 2**31 - 1]),
    ),
    max_size=30,
)


@pytest.mark.parametrize("name", STORES)
def test_ids_in_range_are_read_and_others_are_refused_before_anything_is_written(tmp_path, name):
    store, expected = build(name, tmp_path)
    fmt = usual(name)

    @settings(max_examples=30)
    @given(IDS)
    def check(values: list[int]) -> None:
        ids_N = np.array(values, np.int64)
        raw = np.full((len(ids_N), store.info.row_bytes), 0xA5, np.uint8)
        numbers = np.full((len(ids_N), fmt.d), 7, np.float32)
        uses: list[Callable[[], Any]] = [
            lambda: store.gather(ids_N, out=raw),
            lambda: read(store, ids_N, fmt, numbers),
        ]
        if all(0 <= value < len(expected) for value in values):
            for use in uses:
                use()
            np.testing.assert_array_equal(raw, expected[ids_N])
            np.testing.assert_array_equal(numbers, fmt.decode(expected[ids_N]))
            return
        if store.info.writable:
            uses.append(lambda: store.scatter(ids_N, raw))
        for use in uses:
            with pytest.raises(RowOutOfRange):
                use()
        assert (raw == 0xA5).all() and (numbers == 7).all()

    check()
    np.testing.assert_array_equal(store.gather(np.arange(len(expected))), expected)
    store.close()


@pytest.fixture(autouse=True)
def quick_sync(monkeypatch):
    """Nobody pulls the plug."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
