"""counting.py and ngrams.py: counts equal those of a dictionary, whatever the memory, and a count
that was stopped goes on."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engraphy.addresses import Addresser, Ngrams, VocabMap, counting
from engraphy.addresses.counting import LEAST_MEMORY, count_ngrams
from engraphy.errors import ConfigError, InputError
from engraphy.spec import HashSpec

MAKE = {
    "demo": HashSpec.demo,
    "deepseek_v41": HashSpec.deepseek_v41,
    "qwen4": HashSpec.qwen4,
}


def addresser(dialect: str = "demo", table=None, orders=(1, 2, 4)) -> Addresser:
    vocab = VocabMap(np.array([0, 1, 2, 3, -1, 2, 4]) if table is None else table)
    return Addresser(MAKE[dialect]((1,), orders, 2, 50, len(vocab), 2), vocab)


def brute_force(made: Addresser, ids, begins, order: int, top: int) -> list[tuple]:
    """[(n-gram, count)]: every token looks back by itself."""
    table = made.vocab.table.tolist()
    filler = table[made.spec.filler_id]
    counts: Counter[tuple[int, ...]] = Counter()
    for t, token in enumerate(ids):
        if table[token] < 0:
            continue
        seen = [table[token]]
        at = t
        while len(seen) < order and at > 0 and at not in begins:
            at -= 1
            if table[ids[at]] < 0 or ids[at] == made.stop_id:
                break
            seen.insert(0, table[ids[at]])
        counts[(*[filler] * (order - len(seen)), *seen)] += 1
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:top]


def pairs(found: Ngrams, order: int) -> list[tuple]:
    ids, counts = found.ids[order].tolist(), found.counts[order].tolist()
    return [(tuple(gram), count) for gram, count in zip(ids, counts, strict=True)]


@given(
    st.sampled_from(sorted(MAKE)),
    st.lists(st.integers(0, 6), max_size=60),
    st.sets(st.integers(0, 59), max_size=4),
    st.integers(1, 30),
)
@settings(max_examples=60)
def test_counts_equal_those_of_a_dictionary(dialect, ids, begins, top):
    made = addresser(dialect)
    begins = {place for place in begins if place <= len(ids)}
    places = np.array(sorted(begins), dtype=np.int64)
    found = count_ngrams(made, np.array(ids, np.int32), top, begins=places)
    assert found.vocab_digest == made.vocab.digest and list(found.ids) == [1, 2, 4]
    assert found.tokens == sum(made.vocab.table[token] >= 0 for token in ids)
    for order in found.ids:
        assert pairs(found, order) == brute_force(made, ids, begins, order, top)


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 50 tokens, and memory for a few hundred n-grams."""
    monkeypatch.setattr(counting, "_STEP", 50)
    monkeypatch.setattr(counting, "LEAST_MEMORY", 1)


@pytest.mark.parametrize("table", [np.arange(40), np.arange(40) * 2_000_000])
@pytest.mark.parametrize("dialect", sorted(MAKE))
def test_little_memory_takes_more_passes_and_counts_the_same(small_parts, dialect, table):
    if dialect == "qwen4":
        table = np.arange(40)
    made = addresser(dialect, table)
    ids = np.random.default_rng(3).zipf(1.3, 3000).clip(0, 39)
    begins = np.array([0, 1, 17, 49, 50, 51, 1000, 2999, 3000])
    passes = set()
    found = count_ngrams(
        made, ids, 500, begins=begins, memory=20_000, progress=lambda *told: passes.add(told[0])
    )
    assert any("more" in name for name in passes), passes
    for order in found.ids:
        expected = brute_force(made, ids.tolist(), set(begins.tolist()), order, 500)
        assert pairs(found, order) == expected


class Stopped(Exception):
    pass


def test_a_count_that_was_stopped_goes_on_with_the_pass_it_was_in(small_parts, tmp_path):
    made, ids = addresser(table=np.arange(40)), np.random.default_rng(1).integers(0, 40, 2000)
    whole = count_ngrams(made, ids, 100, memory=20_000)
    calls: list[tuple] = []
    limit = 0

    def interrupt(*told):
        calls.append(told)
        if len(calls) > limit:
            raise Stopped

    for calls_of_a_run in (70, 30, 130):
        calls.clear()
        limit = calls_of_a_run
        with pytest.raises(Stopped):
            count_ngrams(made, ids, 100, memory=20_000, state=tmp_path, progress=interrupt)
    calls.clear()
    limit = 10**9
    found = count_ngrams(made, ids, 100, memory=20_000, state=tmp_path, progress=interrupt)
    assert all(pairs(found, order) == pairs(whole, order) for order in whole.ids)
    assert found.tokens == whole.tokens == 2000
    calls.clear()
    count_ngrams(made, ids, 100, memory=20_000, state=tmp_path, progress=interrupt)
    assert not calls  # everything is done
    with pytest.raises(ConfigError, match="another corpus"):
        count_ngrams(made, ids, 99, memory=20_000, state=tmp_path)


def test_ngrams_are_a_value_that_is_saved_cut_and_loaded(tmp_path):
    made = addresser(table=np.arange(9), orders=(2, 3))
    found = count_ngrams(made, np.random.default_rng(0).integers(0, 9, 400), 50)
    found.save(tmp_path / "counts")
    again = Ngrams.load(tmp_path / "counts")
    assert [pairs(again, order) for order in (2, 3)] == [pairs(found, order) for order in (2, 3)]
    assert (again.tokens, again.vocab_digest) == (400, made.vocab.digest)
    few = again.top({3: 7})
    assert list(few.ids) == [3] and pairs(few, 3) == pairs(found, 3)[:7]
    assert few.coverage() == {3: sum(count for _, count in pairs(few, 3)) / 400}
    assert len(again.top(4).ids[2]) == 4
    assert repr(few) == f"Ngrams(7 of order 3; 400 tokens, vocab {made.vocab.digest[:8]}…)"


@pytest.mark.parametrize("ids", [[[1, -1]], [[1, 2, 3]], [[0.5, 1]], [1, 2], [[2**31, 0]]])
def test_what_is_no_list_of_bigrams_is_refused(ids):
    with pytest.raises(ConfigError, match="order 2"):
        Ngrams({2: np.array(ids)}, "0" * 64)


@pytest.mark.parametrize("order", [0, 33])
def test_ngrams_of_no_hashed_length_are_refused(order):
    with pytest.raises(ConfigError, match="an order from 1 to 32"):
        Ngrams({order: np.zeros((1, order), np.int32)}, "0" * 64)


def test_wrong_arguments_are_refused_by_name():
    made, ids = addresser(), np.array([1, 2, 3])
    for told, kind, arguments in [
        ("orders", ConfigError, {"orders": (5,)}),
        ("top", ConfigError, {"top": 0}),
        ("memory", ConfigError, {"memory": LEAST_MEMORY - 1}),
        ("begins", InputError, {"begins": np.array([4])}),
        ("ids", InputError, {"ids_T": ids[None]}),
        ("found 7", InputError, {"ids_T": np.array([7])}),
    ]:
        with pytest.raises(kind, match=told):
            count_ngrams(**{"addresser": made, "ids_T": ids, "top": 3} | arguments)


@pytest.mark.parametrize("cut", [0, 4, 30, -1])
def test_a_cut_or_foreign_file_is_refused_by_name(tmp_path, cut):
    Ngrams({1: np.array([[1], [2]])}, "0" * 64).save(tmp_path / "counts")
    whole = (tmp_path / "counts").read_bytes()
    (tmp_path / "counts").write_bytes(whole[:cut])
    with pytest.raises(ConfigError, match="counts: expected a file of engraphy-ngrams-1"):
        Ngrams.load(tmp_path / "counts")
    with pytest.raises(ConfigError, match="nowhere"):
        Ngrams.load(tmp_path / "nowhere")
