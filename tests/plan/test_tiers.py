"""Tiers: published figures and files of a probe; tables of hit rates."""

from __future__ import annotations

import json

import pytest

from engraphy.errors import ConfigError
from engraphy.plan import HIT_RATES, TIERS, Batch, HitRates, Tier, hit_rates, tier

RUNS = {"1 stream": [0.4, 0.5], "8 streams": [0.1, 0.2]}
PROBE = {
    "path": "/disk",
    "how": "O_DIRECT",
    "unit": 4096,
    "batches": [
        {"reads": 1, "seconds": 1e-4, "p99": 2e-4},
        {"reads": 64, "seconds": 1e-3, "p99": 2e-3},
    ],
}


def test_published_figures_say_where_they_come_from():
    assert set(TIERS) == {"cxl", "rdma", "nvme", "nvme-datacentre"}
    for found in TIERS.values():
        assert ("arXiv" in found.source) or ("#" in found.source) or ("SIGCOMM" in found.source)


def test_units_are_counted_exactly():
    page = TIERS["nvme"]
    for row_bytes in (16, 72, 144, 256, 264, 320, 4096, 5000):
        begins = [row_bytes * i % 4096 for i in range(4096)]
        touched = [(begin + row_bytes - 1) // 4096 + 1 for begin in begins]
        assert page.units(row_bytes) == pytest.approx(sum(touched) / len(touched))
    assert TIERS["rdma"].units(264) == 1


def test_a_probe_s_file_is_a_tier(tmp_path):
    file = tmp_path / "disk.json"
    file.write_text(json.dumps(PROBE))
    found = tier(file)
    assert found.batches == (Batch(1, 1e-4, 2e-4), Batch(64, 1e-3, 2e-3))
    assert "/disk" in found.source and "O_DIRECT" in found.source


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        json.dumps({**PROBE, "batches": []}),
        json.dumps({**PROBE, "batches": [{"reads": 1}]}),
        json.dumps({**PROBE, "batches": [{"reads": 1, "seconds": "x", "p99": 1}]}),
        json.dumps({**PROBE, "batches": [{"reads": 1, "seconds": -1, "p99": 1}]}),
        json.dumps({**PROBE, "batches": PROBE["batches"][::-1]}),
    ],
)
def test_another_file_is_refused_by_name(content, tmp_path):
    file = tmp_path / "disk.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"tier.* expected .*, found"):
        tier(file)


def test_an_unknown_tier_is_refused_with_those_that_exist():
    with pytest.raises(ConfigError, match="expected one of cxl, rdma, nvme, nvme-datacentre, or"):
        tier("tape")


@pytest.mark.parametrize("field, value", [("unit", -1), ("rate", 0.0), ("latency", -1.0)])
def test_figures_that_cannot_be_are_refused(field, value):
    figures = {"unit": 0, "latency": 0.0, "rate": 1.0, field: value}
    with pytest.raises(ConfigError, match=f"tier t, {field}: expected"):
        Tier("t", "made up", **figures)


def test_the_smallest_cache_that_hits_often_enough_is_found(tmp_path):
    file = tmp_path / "rates.json"
    file.write_text('{"2000": 0.7, "1000": 0.5}')
    rates = hit_rates(file)
    assert rates.points == ((1000, 0.5), (2000, 0.7))
    assert [rates.size_for(rate) for rate in (0.2, 0.5, 0.6, 0.8)] == [1000, 1000, 2000, None]
    assert [rates.rate_of(size) for size in (500, 1000, 3000)] == [0.0, 0.5, 0.7]


def test_a_result_of_the_benchmark_is_read_for_one_stream_or_eight(tmp_path):
    file = tmp_path / "v41-books.json"
    runs = {f"{name}": {"lru": {"all": rates}} for name, rates in RUNS.items()}
    file.write_text(json.dumps({"sizes_MiB": [1, 2], "runs": runs}))
    assert hit_rates(file).points == ((1 << 20, 0.4), (2 << 20, 0.5))
    assert hit_rates(file, streams=4).points == ((1 << 20, 0.1), (2 << 20, 0.2))


def test_own_tables_of_hit_rates_rise():
    for rates in HIT_RATES.values():
        assert hit_rates(rates.name) is rates and "docs/results" in rates.source


@pytest.mark.parametrize(
    "points",
    [(), ((2, 0.5), (1, 0.6)), ((1, 0.6), (2, 0.5)), ((1, 1.5),), ((0, 0.5),), ((1, -0.1),)],
)
def test_a_table_that_falls_is_refused(points):
    with pytest.raises(ConfigError, match="hit rates t: expected ascending sizes"):
        HitRates("t", "made up", points)


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 1}', '{"1": "x"}', '{"runs": {}}'])
def test_a_file_without_hit_rates_is_refused(content, tmp_path):
    file = tmp_path / "rates.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match="hit rates: expected one of wiki, code"):
        hit_rates(file)
