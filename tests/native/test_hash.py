"""The native hash kernel gives the addresses of a reference in plain Python integers, at every
level this CPU runs."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engraphy import _native

LEVELS = _native.core.levels() if _native.core else ()
pytestmark = pytest.mark.skipif(not LEVELS, reason=_native.reason)
every_level = pytest.mark.parametrize("level", LEVELS)

POISON = -0x0123456789ABCDEF
FAST_BELOW = 2**31  # the kernel's fast remainder serves primes in (6144, 2**31)
SMALL, EDGE, LARGE = (
    (2, 3, 5, 7, 4093, 6143),
    (6151, 6163, 6173, 6197),
    (2147483587, 2147483629, 2147483647),
)
HUGE = (2147483659, 4294967291, 2**61 - 1)


@dataclass(frozen=True)
class Case:
    """A plan's constants and the reference's way of using them."""

    table: list[int] | None
    vocab: int
    filler: int
    stop: int
    orders: list[int]
    heads: int
    multipliers: list[list[int]]
    primes: list[list[int]]
    offsets: list[list[int]]

    @property
    def columns(self) -> int:
        return len(self.orders) * self.heads

    @property
    def past(self) -> int:
        return max(self.orders) - 1

    def plan(self):
        arrays = [
            np.array(values, dtype=np.int64)
            for values in (self.multipliers, self.primes, self.offsets)
        ]
        table = None if self.table is None else np.array(self.table, dtype=np.int32)
        return _native.core.HashPlan(
            address(table),
            self.vocab,
            self.filler,
            self.stop,
            self.orders,
            self.heads,
            len(self.primes),
            *map(address, arrays),
        )

    def compressed(self, raw: int) -> int:
        return raw if self.table is None else self.table[raw]

    def row(self, layer: int, column: int, visible: list[int]) -> int:
        """visible: x_0, x_1, ... as far as look-back reaches; None stands for what it may not
        reach."""
        mix = 0
        for i in range(self.orders[column // self.heads]):
            x = visible[i] if i < len(visible) else self.filler
            mix ^= x * self.multipliers[layer][i]
        assert 0 <= mix < 2**63
        return mix % self.primes[layer][column] + self.offsets[layer][column]

    def expected(self, ids, history=None, live=None, starts=None) -> np.ndarray:
        rows = np.empty((len(self.primes), *ids.shape, self.columns), dtype=np.int64)
        for b, t in np.ndindex(ids.shape):
            visible = self.visible(b, t, ids, history, live, starts)
            for layer, column in np.ndindex(len(self.primes), self.columns):
                rows[layer, b, t, column] = self.row(layer, column, visible)
        return rows

    def visible(self, b, t, ids, history, live, starts) -> list[int]:
        """Walks back from position t, and says what it sees before it has to stop."""
        seen: list[int] = []
        for at in range(t, t - self.past - 1, -1):
            raw = int(ids[b, at]) if at >= 0 else int(history[b, at]) if history is not None else -1
            if (at >= 0 and live is not None and not live[b, at]) or (at < 0 and raw == -1):
                break
            if self.compressed(raw) < 0 or (at < t and raw == self.stop):
                break
            seen.append(self.compressed(raw))
            if at >= 0 and starts is not None and starts[b, at]:
                break
        return seen


def address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.ctypes.data


def native(case: Case, level: str, ids, history=None, live=None, starts=None, layer: int = -1):
    """(returned code, out), with guards of poison around `out`, which have to be intact."""
    with _native.forced(level):
        layers = len(case.primes) if layer < 0 else 1
        guard = 16
        buffer = np.full(layers * ids.size * case.columns + 2 * guard, POISON, dtype=np.int64)
        out = buffer[guard:-guard]
        code = case.plan().rows(
            address(ids),
            *ids.shape,
            address(history),
            address(live),
            address(starts),
            address(out),
            layer,
        )
    assert (buffer[:guard] == POISON).all() and (buffer[-guard:] == POISON).all()
    return code, out.reshape(layers, *ids.shape, case.columns)


def unhashed(primes: list[int]) -> Case:
    """An order-1 plan without a map and with multiplier 1: the ids are the mix."""
    return Case(None, 2**63 - 1, 0, -1, [1], len(primes), [[1]], [primes], [[0] * len(primes)])


@st.composite
def cases(draw) -> Case:
    orders = sorted(draw(st.sets(st.integers(1, 5), min_size=1, max_size=3)))
    heads, layers = draw(st.integers(1, 19)), draw(st.integers(1, 3))
    vocab = draw(st.integers(2, 40))
    table = draw(st.none() | st.lists(st.integers(-1, 12), min_size=vocab, max_size=vocab))
    largest = max(12, vocab)
    multiplier = st.integers(1, (2**63 - 1) // largest)
    multipliers = [[draw(multiplier) for _ in range(max(orders))] for _ in range(layers)]
    primes, offsets = [], []
    for _ in range(layers):
        row = []
        for _ in orders:
            choice = draw(st.sampled_from([SMALL, EDGE, LARGE, HUGE, EDGE + LARGE, SMALL + EDGE]))
            row += draw(st.lists(st.sampled_from(choice), min_size=heads, max_size=heads))
        primes.append(row)
        offsets.append([draw(st.integers(0, 2**40)) for _ in row])
    return Case(
        table,
        vocab,
        draw(st.integers(0, 12)),
        draw(st.integers(-1, vocab - 1)),
        orders,
        heads,
        multipliers,
        primes,
        offsets,
    )


@st.composite
def inputs(draw, case: Case):
    batch, tokens = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 7, 63, 64, 65]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids = rng.integers(0, case.vocab, (batch, tokens))
    history = rng.integers(-1, case.vocab, (batch, case.past)) if draw(st.booleans()) else None
    live = rng.random((batch, tokens)) < 0.7 if draw(st.booleans()) else None
    starts = rng.random((batch, tokens)) < 0.2 if draw(st.booleans()) else None
    if live is not None:
        ids[~live] = rng.choice([-5, -1, 0, case.vocab, 2**62], (~live).sum())
    return ids, history, live, starts


@every_level
@settings(max_examples=60)
@given(data=st.data())
def test_kernel_equals_the_reference_with_any_options(level, data):
    case = data.draw(cases())
    arguments = data.draw(inputs(case))
    code, rows = native(case, level, *arguments)
    assert code == -1
    np.testing.assert_array_equal(rows, case.expected(*arguments))


@pytest.mark.slow
@every_level
@settings(max_examples=300)
@given(data=st.data())
def test_remainder_is_exact_around_multiples_of_the_prime(level, data):
    modulus = (
        st.integers(6145, 6400) | st.integers(2**31 - 300, 2**31 - 1) | st.integers(6145, 2**31 - 1)
    )
    primes = data.draw(st.lists(modulus, min_size=1, max_size=9))
    ids = []
    for prime in primes:
        top = (2**63 - 2) // prime
        for k in (
            0,
            1,
            top - 1,
            top,
            data.draw(st.integers(0, top)),
            data.draw(st.integers(top - 10**6, top)),
        ):
            ids += [
                k * prime - 1,
                k * prime,
                k * prime + 1,
                k * prime + prime // 2,
                k * prime + prime // 2 + 1,
            ]
    ids = np.array([[x for x in ids if 0 <= x < 2**63 - 1]])
    code, rows = native(unhashed(primes), level, ids)
    assert code == -1
    np.testing.assert_array_equal(rows[0], ids[..., None] % np.array(primes))


@every_level
@pytest.mark.parametrize("prime", [1, *SMALL, 6144, 6145, 6151, 2**31 - 1, 2**31, *HUGE, 2**63 - 1])
def test_remainder_is_exact_on_both_sides_of_the_thresholds(level, prime):
    rng = np.random.default_rng(prime % 1000)
    top = (2**63 - 2) // prime
    multiples = prime * rng.integers(0, top, 4000, endpoint=True)
    ids = np.concatenate([multiples, multiples - 1, 2**63 - 2 - np.arange(4000)]).clip(min=0)[None]
    code, rows = native(unhashed([prime] * 5), level, ids)
    assert code == -1
    np.testing.assert_array_equal(rows[0], np.broadcast_to((ids % prime)[..., None], rows[0].shape))


def fixed_case(table=None) -> Case:
    return Case(
        table,
        30,
        7,
        4,
        [2, 3],
        8,
        [[2**58 - 1, 2**57 + 11, 2**56 + 3]] * 2,
        [list(range(7001, 7017))] * 2,
        [list(range(0, 160000, 10000))] * 2,
    )


@every_level
def test_chunks_with_history_equal_one_call(level):
    case = fixed_case()
    ids = np.random.default_rng(1).integers(0, 30, (2, 150))
    _, whole = native(case, level, ids)
    for cut in (1, 2, 63, 64, 65, 149):
        history = np.full((2, 2), -1)
        history[:, -min(cut, 2) :] = ids[:, max(0, cut - 2) : cut]
        _, before = native(case, level, np.ascontiguousarray(ids[:, :cut]))
        _, after = native(case, level, np.ascontiguousarray(ids[:, cut:]), history)
        np.testing.assert_array_equal(np.concatenate([before, after], axis=2), whole)


@every_level
def test_positions_that_are_live_and_have_a_token_are_marked(level):
    case = fixed_case([1, -1, 2] * 10)
    rng = np.random.default_rng(4)
    ids = rng.integers(0, 30, (3, 131))
    live = rng.random(ids.shape) < 0.7
    alive = np.full(ids.size + 32, 77, np.uint8)
    out = np.empty((2, *ids.shape, 16), np.int64)
    with _native.forced(level):
        case.plan().rows(
            address(ids), *ids.shape, 0, address(live), 0, address(out), -1, address(alive[16:])
        )
    assert (alive[:16] == 77).all() and (alive[-16:] == 77).all()
    np.testing.assert_array_equal(alive[16:-16], (live & (ids % 3 != 1)).reshape(-1))


@every_level
def test_one_layer_equals_its_part_of_all(level):
    case = fixed_case()
    ids = np.random.default_rng(2).integers(0, 30, (3, 70))
    _, rows = native(case, level, ids)
    for layer in range(2):
        np.testing.assert_array_equal(native(case, level, ids, layer=layer)[1][0], rows[layer])


@every_level
def test_no_sequences_and_no_tokens_are_no_work(level):
    for shape in ((0, 5), (5, 0)):
        assert native(fixed_case(), level, np.empty(shape, dtype=np.int64))[0] == -1


@every_level
@pytest.mark.parametrize("bad", [-1, -(2**63), 30, 2**63 - 1])
def test_an_id_out_of_range_is_located_and_nothing_is_written(level, bad):
    ids = np.ones((3, 100), dtype=np.int64)
    ids[1, 99] = ids[2, 0] = bad
    code, out = native(fixed_case([1] * 30), level, ids)
    assert code == 199
    assert (out == POISON).all()


@every_level
@pytest.mark.parametrize("bad", [-2, 30])
def test_a_history_id_out_of_range_is_located_and_nothing_is_written(level, bad):
    history = np.array([[-1, -1], [3, -1], [3, bad]])
    ids = np.ones((3, 5), dtype=np.int64)
    ids[2, 0] = 99  # comes after the history of its sequence
    code, out = native(fixed_case([1] * 30), level, ids, history)
    assert code == -2 - 5
    assert (out == POISON).all()


@every_level
def test_ids_at_dead_positions_are_not_looked_at(level):
    ids = np.ones((1, 4), dtype=np.int64)
    live = np.array([[True, False, True, True]])
    expected = native(fixed_case([1] * 30), level, ids, live=live)[1]
    ids[0, 1] = 2**62
    np.testing.assert_array_equal(native(fixed_case([1] * 30), level, ids, live=live)[1], expected)


def test_a_plan_copies_its_arrays_and_is_shared_by_deepcopy():
    table, constants = (
        np.arange(30, dtype=np.int32),
        [np.ones(shape, dtype=np.int64) for shape in (3, 16, 16)],
    )
    constants[1][:] = 10007
    plan = _native.core.HashPlan(address(table), 30, 0, -1, [2, 3], 8, 1, *map(address, constants))
    ids, rows, again = (
        np.arange(30)[None],
        np.empty((30, 16), dtype=np.int64),
        np.empty((30, 16), dtype=np.int64),
    )
    plan.rows(address(ids), 1, 30, 0, 0, 0, address(rows))
    table[:] = 5
    for array in constants:
        array[:] = 77
    assert copy.deepcopy(plan) is plan
    plan.rows(address(ids), 1, 30, 0, 0, 0, address(again))
    np.testing.assert_array_equal(again, rows)


@pytest.mark.parametrize(
    "wrong",
    [{"orders": []}, {"orders": [0]}, {"orders": [33]}, {"heads": 0}, {"vocab": 0}, {"filler": -1}],
)
def test_a_plan_refuses_sizes_that_cannot_be_meant(wrong):
    ones = np.ones(64, dtype=np.int64)
    sizes = {"vocab": 30, "filler": 0, "stop": -1, "orders": [2], "heads": 8, "layers": 1} | wrong
    with pytest.raises(ValueError, match=r"\d|positive"):
        _native.core.HashPlan(
            map=0, **sizes, multipliers=address(ones), primes=address(ones), offsets=address(ones)
        )


@every_level
def test_a_layer_that_the_plan_does_not_have_is_refused(level):
    with pytest.raises(ValueError, match="layer"):
        native(fixed_case(), level, np.ones((1, 1), dtype=np.int64), layer=2)
