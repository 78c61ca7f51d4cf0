"""The formula, on cases computed by hand."""

from __future__ import annotations

import math

import pytest

from engraphy import EngramConfig, HashSpec, LayerSpec, RowFormat
from engraphy.errors import ConfigError
from engraphy.plan import Batch, Layout, Tier, layout, plan, tier

LATENCY = 1e-3


def memory(*layers: int, blocks: int = 6, heads: int = 4, dim: int = 64) -> Layout:
    """Rows of 4 * dim bytes, 2 * heads a layer."""
    spec = HashSpec.demo(layers, (2, 3), heads, 50, vocab_size=20, pad_id=0)
    config = EngramConfig(spec, LayerSpec(16, spec.columns * dim), dim)
    return Layout("a memory", config, blocks, RowFormat("f32", dim), "made up")


def waits(found) -> list[float]:
    return [pytest.approx(layer.exposed) for layer in found.layers]


ONE_MS = Tier("1 ms", "made up", 0, LATENCY, math.inf)


def test_a_read_that_is_shorter_than_its_window_hides():
    found = plan(memory(1, 3), ONE_MS, block_seconds=2e-3)
    assert [layer.read_seconds for layer in found.layers] == [1e-3, 1e-3]
    assert [layer.window for layer in found.layers] == [2e-3, 4e-3]
    assert found.exposed == 0.0 and all(layer.hides for layer in found.layers)
    assert found.synchronous == pytest.approx(2e-3)
    assert found.synchronous_loss == pytest.approx(2 / (6 * 2 + 2))


def test_the_wait_of_a_layer_lengthens_the_windows_after_it():
    # Reads end after 10 and 20 ms; blocks 1 and 4 are due after 3 and 12 ms.
    ten = Tier("10 ms", "made up", 0, 10e-3, math.inf)
    found = plan(memory(1, 4), ten, block_seconds=3e-3)
    assert waits(found) == [7e-3, 1e-3]
    assert found.exposed == pytest.approx(8e-3)
    assert found.loss == pytest.approx(8 / (6 * 3 + 8))


def test_all_waits_together_are_the_largest_lag_of_a_layer():
    slow = Tier("slow", "made up", 0, 5e-3, math.inf)
    found = plan(memory(0, 1, 2, 5), slow, block_seconds=4e-3)
    lags = [5 * (k + 1) - 4 * layer for k, layer in enumerate((0, 1, 2, 5))]
    assert found.exposed == pytest.approx(max(0, *lags) * 1e-3)


def test_a_memory_in_block_0_has_no_window():
    found = plan(memory(0), ONE_MS, block_seconds=1.0)
    assert waits(found) == [1e-3]
    assert found.layers[0].window == 0.0


def test_speed_is_of_all_sequences_and_a_block_takes_its_share():
    # 4 sequences of 8 tokens at 1000 tokens/s: 32 ms a forward of 6 blocks.
    found = plan(memory(1), ONE_MS, batch=4, tokens=8, tokens_per_second=1000)
    assert found.block_seconds == pytest.approx(32e-3 / 6)
    assert found.forward_seconds == pytest.approx(32e-3)
    assert found.layers[0].rows == 4 * 8 * 8


def test_caches_answer_their_share():
    rate = Tier("rate", "made up", 0, 0.0, 1000.0)
    found = plan(memory(1), rate, tokens=10, block_seconds=1e-3, hit_rate=0.75)
    assert found.layers[0].reads == 20
    assert found.layers[0].read_seconds == pytest.approx(20e-3)
    full = plan(memory(1), rate, tokens=10, block_seconds=1e-3, hit_rate=1)
    assert full.exposed == full.synchronous == 0.0


def test_the_hit_rate_to_hide_is_the_least_one_with_which_nothing_waits():
    # 80 reads at 1000 a second take 80 ms; the window is 20 ms: 20 reads, a hit rate of 75 %.
    rate = Tier("rate", "made up", 0, 0.0, 1000.0)
    found = plan(memory(1), rate, tokens=10, block_seconds=20e-3, hit_rate=0.1)
    assert found.hit_rate_to_hide == pytest.approx(0.75, abs=1e-3)
    enough = found.hit_rate_to_hide
    assert plan(memory(1), rate, tokens=10, block_seconds=20e-3, hit_rate=enough).exposed == 0.0
    less = plan(memory(1), rate, tokens=10, block_seconds=20e-3, hit_rate=enough - 2e-3)
    assert less.exposed > 0.0
    assert plan(memory(1), rate, tokens=10, block_seconds=1.0).hit_rate_to_hide == 0.0


def test_no_hit_rate_below_1_hides_a_read_in_block_0():
    assert plan(memory(0), ONE_MS, block_seconds=1e-3).hit_rate_to_hide == 1.0


def test_a_token_of_v41_reads_196_kb_in_pages_at_least():
    found = plan(layout("V4.1"), tier("nvme"), tokens_per_second=50)
    assert found.token_bytes == 12_672
    assert found.token_bytes_least == 196_608
    # A row begins at a multiple of 8; in 32 of 512 places it lies across two pages.
    assert found.token_bytes_mean == 196_608 * (1 + 32 / 512)


def test_a_row_of_v41_is_five_cache_lines_wherever_it_begins():
    found = plan(layout("V4.1"), tier("cxl"), tokens_per_second=50)
    assert tier("cxl").units(264) == 5
    assert found.token_bytes_least == found.token_bytes_mean == 48 * 5 * 64


def test_one_token_of_v41_from_nvme_takes_24_reads_a_layer():
    found = plan(layout("V4.1"), tier("nvme"), tokens_per_second=50)
    assert found.layers[0].read_seconds == pytest.approx(80e-6 + 24 * 1.0625 / 130e3)
    assert [layer.window for layer in found.layers] == [
        pytest.approx(0.5e-3),
        pytest.approx(6.5e-3),
    ]
    assert found.exposed == 0.0


def test_a_cache_holds_rows_and_their_bookkeeping():
    found = plan(layout("V4.1"), tier("nvme"), tokens_per_second=50)
    set_bytes = 128 + 16 * 264
    assert found.cached_rows(set_bytes * 10 + 1) == 160


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "expected either tokens_per_second or block_seconds, found None and None"),
        ({"tokens_per_second": 1, "block_seconds": 1}, "found 1 and 1"),
        ({"tokens_per_second": 0}, "tokens_per_second: expected a positive number, found 0"),
        ({"block_seconds": math.inf}, "block_seconds: expected a positive number, found inf"),
        ({"block_seconds": 1, "hit_rate": 1.5}, "hit_rate: expected a share from 0 to 1"),
        ({"block_seconds": 1, "hit_rate": True}, "hit_rate: expected a share from 0 to 1"),
        ({"block_seconds": 1, "batch": 0}, "batch: expected"),
        ({"block_seconds": 1, "tokens": 1.5}, "tokens: expected"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        plan(memory(1), ONE_MS, **options)


def test_measured_batches_are_met_and_in_between_follow_a_line_in_logarithms():
    measured = Tier.measured(
        "disk", "made up", (Batch(1, 1e-4, 2e-4), Batch(100, 1e-3, 2e-3), Batch(1000, 1e-2, 2e-2))
    )
    assert measured.seconds(1, 4096) == pytest.approx(1e-4)
    assert measured.seconds(10, 4096) == pytest.approx(math.sqrt(1e-4 * 1e-3))
    assert measured.seconds(100, 4096) == pytest.approx(1e-3)
    assert measured.seconds(5000, 4096) == pytest.approx(5e-2)
    assert measured.seconds(0.5, 4096) == pytest.approx(5e-5)
    assert measured.seconds(0, 4096) == 0.0
    assert (measured.latency, measured.rate) == (1e-4, 100_000)
