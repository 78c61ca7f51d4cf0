"""What stores and the prefetcher count is right, cheap, and readable by people and Prometheus."""

from __future__ import annotations

import io
import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from engraphy.memory.metrics import describe, prometheus, table, tiers
from engraphy.memory.prefetch import Prefetcher, PrefetchStats
from engraphy.rows import read
from engraphy.store import RamStore, RowStore, StoreStats, open_store, publish_pool
from engraphy.store.cache import CacheStore
from engraphy.store.latency import Latency, bucket_of, latency_of, limit
from tests.tools.store_builders import LAYER, NotMapped, fmt_of, sealed

SAMPLE = re.compile(r'^(engraphy_\w+)(\{(?:\w+="(?:[^"\\\n]|\\[\\"n])*",?)*\})? (-?[0-9.e+-]+)$')


# Durations.


@given(st.integers(0, 2**62))
def test_a_duration_lies_in_a_bucket_at_most_a_quarter_above_it(nanoseconds):
    seconds = limit(bucket_of(nanoseconds))
    assert nanoseconds * 1e-9 <= seconds * (1 + 1e-12)
    assert seconds <= max(nanoseconds, 4) * 1.25e-9 * (1 + 1e-12)


@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_longer_durations_never_lie_in_a_lower_bucket(one, other):
    assert (bucket_of(one) <= bucket_of(other)) or one > other


def of(durations: list[int]) -> Latency:
    counts = [0] * 256
    for nanoseconds in durations:
        counts[bucket_of(nanoseconds)] += 1
    return latency_of(counts, sum(durations))


@given(st.lists(st.integers(1, 10**10), min_size=1, max_size=200), st.floats(0, 1))
def test_quantiles_are_those_of_the_durations_up_to_a_quarter(durations, q):
    exact = sorted(durations)[max(0, int(np.ceil(q * len(durations))) - 1)] * 1e-9
    found = of(durations).quantile(q)
    assert found is not None and exact * (1 - 1e-9) <= found <= max(exact * 1.25, 5e-9) * (1 + 1e-9)


def test_calls_within_a_limit_are_counted_exactly_at_powers_of_two():
    latency = of([1000, 1024, 1025, 5000, 2**20])
    assert [latency.within(2.0**power * 1e-9) for power in (9, 10, 13, 20)] == [0, 1, 4, 4]
    assert latency.calls == 5 and Latency().quantile(0.5) is None


# Counting.


class Slow(NotMapped):
    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None:
        time.sleep(0.02)
        super()._gather(ids_N, out_NR)


def test_a_store_says_how_long_its_calls_took():
    store = Slow(10, 4)
    for _ in range(3):
        store.gather(np.array([1]))
    latency = store.stats.latency
    assert latency.calls == 3 and 0.06 <= latency.seconds < 5
    assert 0.02 <= (latency.quantile(0.5) or 0) <= (latency.quantile(0.99) or 0) < 5


def test_reading_mapped_memory_past_gather_is_timed_too(tmp_path):
    expected = sealed(tmp_path / "table")
    store = open_store(f"file:{tmp_path / 'table'}?read=mmap", layer=LAYER)
    read(store, np.arange(len(expected)), fmt_of("int8"), np.empty((len(expected), 32), np.float32))
    assert store.stats.latency.calls == 1 and store.stats.latency.seconds > 0


def test_counters_are_compared_without_the_clock():
    assert StoreStats(1, 2, 3, latency=of([5])) == StoreStats(1, 2, 3, latency=of([7000]))
    assert StoreStats(1, 2, 3) != StoreStats(1, 2, 3, hits=1, misses=1)


def test_counting_costs_a_small_part_of_the_least_read():
    store = RamStore(10, 4)

    def seconds(call) -> float:
        def once() -> float:
            begun = time.perf_counter()
            for _ in range(300):
                call()
            return time.perf_counter() - begun

        return min(once() for _ in range(20))

    ids, out = np.array([1]), np.empty((1, 4), np.uint8)
    assert (
        seconds(lambda: store._count_read(1, time.perf_counter_ns()))
        < seconds(lambda: store.gather(ids, out)) / 2
    )


def test_rates_are_unknown_where_nothing_tells_them():
    assert StoreStats(0, 0, 0, hits=0, misses=0).hit_rate is None
    assert StoreStats(2, 4, 40).hit_rate is None and StoreStats(2, 4, 40).amplification is None
    assert StoreStats(2, 4, 40, hits=3, misses=1).hit_rate == 0.75
    assert StoreStats(2, 4, 40, reads=1, read_bytes=4096).amplification == 4096 / 40


# Showing.


@pytest.fixture
def stores() -> dict[int, RowStore]:
    found: dict[int, RowStore] = {}
    for layer in (1, 14):
        found[layer] = CacheStore(RamStore(1000, 8, layer), 50_000)
        found[layer].gather(np.array([1, 2, 3, 1]))
        found[layer].gather(np.array([1, 2]))
    return found


def shown(stores: dict[int, RowStore], prefetch: PrefetchStats | None = None) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(table(stores, prefetch))
    return console.file.getvalue()  # type: ignore[attr-defined]


def samples(text: str) -> dict[str, float]:
    """Name with labels -> value, of a text that has nothing but samples and comments."""
    found = {}
    for line in text.splitlines():
        if not line.startswith("# "):
            name, labels, value = re.fullmatch(SAMPLE, line).groups()  # type: ignore[union-attr]
            assert name + (labels or "") not in found
            found[name + (labels or "")] = float(value)
    return found


def test_the_table_shows_a_wrapper_and_the_store_behind_it(stores):
    lines = [line for line in shown(stores).splitlines() if " cache " in line or " ram " in line]
    assert len(lines) == 4
    assert "66.7%" not in lines[0] and "50.0%" in lines[0]  # 3 of 6 rows
    assert re.search(r"14 .* ram .* 1 .* 3 ", lines[3])


def test_prometheus_gets_counters_of_every_store(stores):
    found = samples(prometheus(stores))
    for layer in (1, 14):
        cache, ram = (f'{{layer="{layer}",store="{name}"}}' for name in ("cache", "ram"))
        assert (
            found[f"engraphy_store_gathers_total{cache}"] == 2
            and found[f"engraphy_store_rows_total{cache}"] == 6
        )
        assert (
            found[f"engraphy_store_hits_total{cache}"]
            == found[f"engraphy_store_misses_total{cache}"]
            == 3
        )
        assert (
            found[f"engraphy_store_rows_total{ram}"] == 3
            and f"engraphy_store_hits_total{ram}" not in found
        )
        assert found[f"engraphy_store_bytes_total{ram}"] == 24


def test_prometheus_gets_histograms_that_grow_to_their_count(stores):
    found = samples(prometheus({1: stores[1]}))
    buckets = [
        (name, value)
        for name, value in found.items()
        if "seconds_bucket" in name and '"cache"' in name
    ]
    values = [value for _, value in buckets]
    assert values == sorted(values) and 'le="+Inf"' in buckets[-1][0] and values[-1] == 2
    assert found['engraphy_store_gather_seconds_count{layer="1",store="cache"}'] == 2
    assert found['engraphy_store_gather_seconds_sum{layer="1",store="cache"}'] > 0


def test_calls_that_have_not_returned_are_counted_and_those_that_failed_are_not():
    class Slow(NotMapped):
        def _gather(self, ids_N, out_NR):
            seen.append((self.stats.under_way, prometheus({LAYER: self})))
            raise OSError("as a disk does")

    store, seen = Slow(5, 8), []
    with pytest.raises(OSError, match="disk"):
        store.gather(np.zeros(1, np.int64))
    assert seen[0][0] == 1 and 'engraphy_store_under_way{layer="3",store="slow"} 1' in seen[0][1]
    assert store.stats.under_way == 0 and store.stats.gathers == 0


def test_every_metric_has_one_help_and_one_type_before_its_samples(stores):
    text = prometheus(stores, Prefetcher({}).stats)
    assert text.endswith("\n") and not text.endswith("\n\n")
    declared = re.findall(r"^# TYPE (\S+) (counter|gauge|histogram)$", text, re.M)
    assert (
        len(declared)
        == len({name for name, _ in declared})
        == len(re.findall(r"^# HELP ", text, re.M))
    )
    for name, kind in declared:
        assert name.endswith("_total") == (kind == "counter")
        assert text.index(f"# TYPE {name} ") < text.index(f"\n{name}")


def test_what_is_served_is_a_label_with_quotes_and_line_feeds_escaped(tmp_path):
    path = tmp_path / 'a "b"\\ c\nd'
    sealed(path)
    store = open_store(f"file:{path}", layer=LAYER)
    text = prometheus({LAYER: store})
    (line,) = [name for name in samples(text) if name.startswith("engraphy_store_info")]
    assert (
        f'table_id="{store.info.table_id}"' in line
        and f'address_digest="{store.info.address_digest}"' in line
    )
    assert r"a \"b\"\\ c\nd" in line


def test_the_prefetcher_is_shown_below_and_exported(stores):
    with Prefetcher({}) as prefetcher:
        prefetcher.submit({}).wait()
        stats = prefetcher.stats
    assert "1 tickets, 1 read at once" in shown(stores, stats)
    found = samples(prometheus(stores, stats))
    assert found["engraphy_prefetch_tickets_total"] == 1 and found["engraphy_prefetch_waiting"] == 0
    assert found["engraphy_prefetch_wait_seconds_count"] == 0


def test_three_tiers_are_shown_together_each_with_its_own_counts(tmp_path):
    sealed(tmp_path / "table")
    publish_pool(tmp_path / "table", tmp_path / "pool")
    url = f"pool:{tmp_path / 'pool'}?cache=20000"
    opened = {layer: open_store(url, layer=layer) for layer in (1, LAYER)}
    ids = np.arange(40).reshape(1, 10, 4)
    with Prefetcher({layer: (store, store.info.format) for layer, store in opened.items()}) as tier:
        for _ in range(2):
            tier.submit(dict.fromkeys(opened, ids)).wait()
        stats = tier.stats
    grid = tiers(opened, stats)
    assert [line[:4] for line in _cells_of(grid)] == [
        ("staging", "2", "160", ""),
        ("cache", "4", "160", "50.0%"),
        ("pool", "2", "80", ""),
    ]
    assert [line[0] for line in _cells_of(tiers(opened))] == ["cache", "pool"]


def _cells_of(grid) -> list[tuple]:
    return list(zip(*(column.cells for column in grid.columns), strict=True))


def test_one_line_says_what_is_served(tmp_path):
    sealed(tmp_path / "table")
    store = CacheStore(open_store(f"file:{tmp_path / 'table'}?read=mmap", layer=LAYER), 20_000)
    line = describe({LAYER: store})
    assert (
        "\n" not in line and "cache over file" in line and "int8" in line and str(tmp_path) in line
    )
    assert str(store.info.table_id) in line and str(store.info.address_digest) in line
