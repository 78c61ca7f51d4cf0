"""hot.py and perfect_hash.py: an index is a dictionary of n-grams, in a file, with a digest."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engraphy import _native
from engraphy.addresses import HotIndex, Ngrams, perfect_hash
from engraphy.addresses.hot import FalseHits
from engraphy.addresses.perfect_hash import PerfectHash
from engraphy.errors import ConfigError, DigestMismatch

VOCAB = "ab" * 32
KERNELS = ["off"] if _native.core is None else ["off", _native.core.levels()[-1]]


@pytest.fixture(scope="module", params=KERNELS, autouse=True)
def kernel(request):
    with _native.forced(request.param):
        yield request.param


def some(count: int, order: int, size: int, seed: int = 0) -> np.ndarray:
    """Distinct n-grams."""
    rng = np.random.default_rng(seed)
    return rng.permutation(np.unique(rng.integers(0, size, (count, order)), axis=0))


def ngrams(parts: dict, counts: dict | None = None) -> Ngrams:
    return Ngrams(parts, VOCAB, counts or {})


@given(
    st.dictionaries(
        st.integers(1, 5), st.sets(st.lists(st.integers(0, 3), min_size=5).map(tuple), max_size=40)
    ),
    st.integers(0, 3),
)
@settings(max_examples=40)
def test_an_index_is_a_dictionary(grams, seed):
    parts = {}
    for order, found in grams.items():
        distinct = list(dict.fromkeys(gram[:order] for gram in found))
        parts[order] = np.array(distinct, np.int32).reshape(-1, order)
    everything = {gram for values in parts.values() for gram in map(tuple, values.tolist())}
    if not everything:
        with pytest.raises(ConfigError, match="expected one n-gram or more"):
            HotIndex.build(ngrams(parts))
        return
    hot = HotIndex.build(ngrams(parts))
    # Slots count up by order, then as the n-grams stand.
    expected = [tuple(gram) for order in sorted(parts) for gram in parts[order].tolist()]
    slots = {gram: slot for slot, gram in enumerate(expected)}
    assert hot.spec.slots == len(expected) and set(hot.orders) == {len(gram) for gram in expected}
    for order in range(1, 6):
        tried = np.stack(np.meshgrid(*[np.arange(4)] * order), -1).reshape(-1, order)
        found = hot.slots_of(tried).tolist()
        assert found == [slots.get(tuple(gram), -1) for gram in tried.tolist()]
        if order in hot.orders:
            keys, numbers = hot.ngrams(order).tolist(), hot.slots(order).tolist()
            assert {tuple(key): n for key, n in zip(keys, numbers, strict=True)} == {
                gram: slot for gram, slot in slots.items() if len(gram) == order
            }


@pytest.mark.parametrize("count", [1, 2, 500, 20_000])
@pytest.mark.parametrize("order, size", [(1, 2**31), (2, 99_092), (4, 99_092), (3, 40)])
def test_keys_have_the_numbers_from_zero_in_few_bits(count, order, size):
    keys = some(count, order, size)
    made = PerfectHash.build(keys)
    assert sorted(made.ranks(keys).tolist()) == list(range(len(keys)))
    shuffled = PerfectHash.build(keys[::-1])
    assert np.array_equal(shuffled.blocks_BW, made.blocks_BW)
    if count == 20_000 and len(keys) > 19_000:
        assert made.blocks_BW.nbytes * 8 < 3.5 * len(keys)


def test_keys_whose_hashes_meet_get_another_seed(monkeypatch, kernel):
    if kernel != "off":
        return  # its hashes are its own: tests/native/test_hot.py

    def meet_once(ids, seed, honest=perfect_hash.key_hashes):
        return honest(ids, seed) if seed else np.zeros(len(ids), np.uint64)

    monkeypatch.setattr(perfect_hash, "key_hashes", meet_once)
    keys = some(100, 2, 50)
    made = PerfectHash.build(keys)
    assert made.seed == 1 and sorted(made.ranks(keys)) == list(range(len(keys)))


def test_equal_ngrams_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"found \[5, 6\] more than once"):
        HotIndex.build(ngrams({2: np.array([[1, 2], [5, 6], [3, 4], [5, 6]])}))


# --- fingerprints


@pytest.mark.parametrize("bits", [8, 12, 32])
def test_fingerprints_miss_no_hot_ngram_and_take_about_one_of_their_range_for_another(bits):
    hot = {order: some(3000, order, 3000, order) for order in (2, 3)}
    others = {order: some(40_000, order, 3000, order + 9) for order in (2, 3)}
    exact = HotIndex.build(ngrams(hot))
    index = HotIndex.build(ngrams(hot), fingerprint_bits=bits)
    for keys in hot.values():
        assert np.array_equal(index.slots_of(keys), exact.slots_of(keys))
    counts = {order: np.full(len(keys), 2) for order, keys in others.items()}
    found = index.false_hits(exact, ngrams(others, counts))
    assert index.false_hits(exact, ngrams(others, counts)) == found
    assert exact.false_hits(exact, ngrams(others)) == {2: FalseHits(0, 0), 3: FalseHits(0, 0)}
    for order, hits in found.items():
        expected = len(others[order]) / 2**bits
        assert abs(hits.ngrams - expected) < 5 * expected**0.5 + 1 and hits.reads == 2 * hits.ngrams
    with pytest.raises(ConfigError, match="fingerprint"):
        index.extended(ngrams(others))
    with pytest.raises(ConfigError, match="fingerprint"):
        index.ngrams(2)


@pytest.mark.parametrize("bits", [7, 33, 8.0, True, "8"])
def test_fingerprints_of_no_size_are_refused(bits):
    with pytest.raises(ConfigError, match="fingerprint_bits"):
        HotIndex.build(ngrams({1: np.array([[1]])}), bits)


# --- identity


def test_the_digest_says_which_ngram_has_which_slot_and_how_it_is_told():
    keys = some(200, 2, 90)
    made = HotIndex.build(ngrams({2: keys}))
    others = [
        HotIndex.build(ngrams({2: keys[::-1]})),
        HotIndex.build(ngrams({2: keys[:-1]})),
        HotIndex.build(ngrams({1: keys[:1, :1], 2: keys})),
        HotIndex.build(Ngrams({2: keys}, "cd" * 32)),
        HotIndex.build(ngrams({2: keys}), 16),
        HotIndex.build(ngrams({2: keys}), 17),
    ]
    assert len({made.digest, *(other.digest for other in others)}) == 7
    assert HotIndex.build(ngrams({2: keys.copy()})).digest == made.digest


def test_the_digest_and_the_file_stay_as_they_are():
    """Golden: a change of either makes every table with an index another one."""
    keys = {2: np.arange(2000).reshape(-1, 2) * 37 % 2003, 3: np.arange(90).reshape(-1, 3)}
    exact = "8114edff42bba9430c488549d3ed09cd54d6740d8ddef095f5d3a50b3d163dc6"
    marks = "f4705adc67b571acc660a4410bcbfe9ea7a11556c08d1b9fdbba7a7678244054"
    assert HotIndex.build(ngrams(keys)).digest == exact
    assert HotIndex.build(ngrams(keys), 16).digest == marks


# --- extending


@given(st.integers(0, 2**32), st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=30)
def test_extending_moves_no_slot_and_adds_the_new_ngrams_behind(seed, old, new):
    rng = np.random.default_rng(seed)
    first = {2: some(old + 1, 2, 9, seed)}
    more = {
        order: rng.permutation(np.unique(rng.integers(0, 9, (new, order)), axis=0))
        for order in (1, 2, 3)
    }
    small = HotIndex.build(ngrams(first))
    large = small.extended(ngrams(more))
    assert np.array_equal(large.slots_of(first[2]), small.slots_of(first[2]))
    assert np.array_equal(small.slots_of(first[2]), np.arange(len(first[2])))
    known = set(map(tuple, first[2].tolist()))
    added = [tuple(gram) for order in more for gram in more[order].tolist()]
    added = [gram for gram in added if gram not in known]
    slots = [int(large.slots_of(np.array(gram))) for gram in added]
    assert slots == list(range(small.spec.slots, small.spec.slots + len(added)))
    assert large.spec.slots == small.spec.slots + len(added)
    large.verify()
    with pytest.raises(DigestMismatch, match="vocabulary map"):
        small.extended(Ngrams(more, "cd" * 32))


# --- files


@pytest.fixture
def saved(tmp_path):
    made = HotIndex.build(ngrams({2: some(300, 2, 99), 3: some(200, 3, 99)}))
    made.save(tmp_path / "hot.index")
    return made, tmp_path / "hot.index"


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("bits", [None, 20])
def test_a_saved_index_loads_as_the_same_index(tmp_path, bits, mapped):
    parts = {1: some(30, 1, 99), 3: some(200, 3, 99)}
    made = HotIndex.build(ngrams(parts), bits)
    made.save(tmp_path / "hot.index")
    again = HotIndex.load(tmp_path / "hot.index", mapped)
    for order in (1, 3):
        blocks_BW = again.part(order).perfect.blocks_BW
        assert blocks_BW.ctypes.data % 64 == 0 and not blocks_BW.flags.writeable
    assert (again.spec, again.orders, again.fingerprint_bits) == (made.spec, (1, 3), bits)
    assert again.vocab_digest == VOCAB and again.bytes == made.bytes and repr(again) == repr(made)
    again.verify()
    for order in (1, 2, 3):
        tried = some(3000, order, 99, 5)
        assert np.array_equal(again.slots_of(tried), made.slots_of(tried))
    again.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "hot.index").read_bytes()


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_are_the_same_index(saved, copied):
    made, path = saved
    again = copied(HotIndex.load(path))
    tried = some(3000, 2, 99, 5)
    assert again.digest == made.digest
    assert np.array_equal(again.slots_of(tried), made.slots_of(tried))


@pytest.mark.parametrize("mapped", [True, False])
def test_no_prefix_of_a_file_loads(saved, mapped):
    _, path = saved
    whole = path.read_bytes()
    for size in [*range(0, 400, 7), *range(400, len(whole), 501), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match="hot.index: expected a file of engraphy-hot-1"):
            HotIndex.load(path, mapped)


def test_a_changed_file_is_refused_or_found_by_verify_and_never_reads_beyond_its_records(saved):
    made, path = saved
    whole = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    tried = {order: some(2000, order, 99, 7) for order in made.orders}
    found = 0
    for place in rng.integers(0, len(whole), 120).tolist():
        changed = bytearray(whole)
        changed[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        try:
            index = HotIndex.load(path)
        except (ConfigError, DigestMismatch):
            continue
        for keys in tried.values():
            index.slots_of(keys)
        if bytes(changed) != bytes(whole):
            try:
                index.verify()
            except DigestMismatch:
                found += 1
    assert found > 60


def rewritten(path, change) -> None:
    """Changes the header of a file, and what it says of the index."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    about = json.loads(header["__metadata__"]["about"])
    change(header, about)
    if header["__metadata__"].get("about") is not None:
        header["__metadata__"]["about"] = json.dumps(about)
    text = json.dumps(header).encode()
    text = text.ljust(len(text) + -(8 + len(text)) % 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])


DAMAGES = {
    "a shape beyond all numbers": lambda h, _: h["blocks_2"].update(shape=[2**70, 16]),
    "a shape whose product is small modulo 2**64": lambda h, _: h["blocks_2"].update(
        shape=[2**62, 4]
    ),
    "a negative shape": lambda h, _: h["records_2"].update(shape=[-1, -3]),
    "a shape of no integers": lambda h, _: h["records_2"].update(shape=[100.0, 3]),
    "offsets of no integers": lambda h, _: h["records_2"].update(data_offsets=[0.5, 1.5]),
    "offsets of words": lambda h, _: h["records_2"].update(data_offsets="ab"),
    "numbers with a sign": lambda h, _: h["records_2"].update(dtype="I32"),
    "an order beyond the kernel's": lambda _, about: about["parts"][0].update(order=33),
    "an order that it has no arrays of": lambda _, about: about["parts"][0].update(order=5),
    "a seed beyond all": lambda _, about: about["parts"][0].update(seed=2**64),
    "levels beyond its blocks": lambda _, about: about["parts"][0].update(levels=[2**40]),
    "no levels": lambda _, about: about["parts"][0].update(levels=[]),
    "fingerprints that it has not": lambda _, about: about.update(fingerprint_bits=12),
    "a digest that is none": lambda _, about: about.update(digest="x"),
    "parts of nothing": lambda _, about: about.update(parts=None),
    "nothing about it": lambda h, _: h["__metadata__"].update(about=None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_header_that_cannot_be_meant_is_refused_by_name(saved, damage):
    _, path = saved
    rewritten(path, DAMAGES[damage])
    with pytest.raises(ConfigError, match=r"hot\.|levels|hot index"):
        HotIndex.load(path)


def test_arrays_that_begin_between_words_are_refused(saved):
    """Words are read as words: all of them have to be where words are."""
    _, path = saved
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    moved = (length + 2).to_bytes(8, "little") + whole[8 : 8 + length] + b"  " + whole[8 + length :]
    path.write_bytes(moved)
    with pytest.raises(ConfigError, match="a header of"):
        HotIndex.load(path)


def test_a_file_of_another_kind_is_refused_by_name(tmp_path):
    ngrams({2: np.array([[1, 2]])}).save(tmp_path / "counts")
    with pytest.raises(ConfigError, match="counts: expected a file of engraphy-hot-1"):
        HotIndex.load(tmp_path / "counts")


def test_an_index_shows_what_it_is():
    hot = HotIndex.build(ngrams({1: np.array([[1], [2]]), 3: np.array([[1, 2, 3]])}))
    assert repr(hot) == f"HotIndex(2 of order 1, 1 of order 3, exact, digest {hot.digest[:8]}…)"
