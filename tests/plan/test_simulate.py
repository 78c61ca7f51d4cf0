"""The virtual clock: the formula where nothing is shared, queues computed by hand where it is."""

from __future__ import annotations

import math

import pytest

from engraphy import EngramConfig, HashSpec, LayerSpec, RowFormat
from engraphy.errors import ConfigError
from engraphy.plan import (
    LAYOUTS,
    TIERS,
    Batch,
    Layout,
    Load,
    Shared,
    Tier,
    block_seconds,
    layout,
    plan,
    simulate,
)

ROWS = 8  # of a token, in a layer


def memory(*layers: int, blocks: int = 6) -> Layout:
    spec = HashSpec.demo(layers, (2, 3), ROWS // 2, 50, vocab_size=20, pad_id=0)
    config = EngramConfig(spec, LayerSpec(16, spec.columns * 64), 64)
    return Layout("a memory", config, blocks, RowFormat("f32", 64), "made up")


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("tier", TIERS.values(), ids=str)
@pytest.mark.parametrize(("batch", "tokens", "speed"), [(64, 1, 5000), (1, 512, 20_000)])
def test_one_server_without_limits_waits_as_the_formula_says(name, tier, batch, tokens, speed):
    memory = layout(name)
    block = block_seconds(memory, batch, tokens, speed)
    expected = plan(memory, tier, batch=batch, tokens=tokens, block_seconds=block)
    found = simulate(memory, tier, Load(1, batch, tokens, block), forwards=2)
    assert found.exposed == pytest.approx(expected.exposed, abs=1e-12)
    assert found.loss == pytest.approx(expected.loss, abs=1e-9)
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert (one.layer, one.reads) == (other.layer, other.reads)
        assert one.read_seconds == pytest.approx(other.read_seconds)
        assert one.exposed == pytest.approx(one.exposed_p99) == pytest.approx(other.exposed)


def test_a_measured_tier_and_other_layers_are_simulated_too():
    probed = Tier.measured("disk", "probed", (Batch(8, 2e-3, 3e-3), Batch(64, 9e-3, 1e-2)))
    found = simulate(memory(1), probed, Load(1, 1, 1, 1e-3), layers=(0, 3), forwards=2)
    assert [layer.layer for layer in found.layers] == [0, 3]
    units = probed.seconds(ROWS, 256)
    assert found.layers[0].exposed == pytest.approx(units)
    assert found.layers[1].exposed == pytest.approx(max(0.0, 2 * units - 3e-3 - units))


INSTANT = Tier("instant", "made up", 0, 0.0, math.inf)


def test_a_part_that_is_used_up_gives_each_server_its_share():
    # 4 servers ask for 80 rows in each forward of 6 ms; one part serves 20,000 rows a second.
    load = Load(4, 10, 1, 1e-3)
    found = simulate(memory(1), INSTANT, load, Shared(rate=20_000), forwards=40)
    whole = found.forward_seconds + found.exposed
    assert whole == pytest.approx(4 * 80 / 20_000, rel=0.02)
    assert found.busy == pytest.approx(1.0, abs=0.03)
    assert found.tightest[0] == "the window of block 1"


def test_parts_that_have_time_are_waited_for_by_nobody_but_the_first():
    load = Load(4, 10, 1, 1e-3)
    idle = simulate(memory(3), INSTANT, load, Shared(parts=8, rate=40_000), forwards=40)
    assert idle.exposed == 0.0
    assert idle.busy == pytest.approx(4 * 80 / 8 / 40_000 / 6e-3, rel=0.15)


def test_a_cache_takes_its_share_of_the_reads():
    load = Load(2, 100, 1, 1e-3, hit_rate=0.75)
    found = simulate(memory(1), TIERS["nvme"], load, forwards=50)
    assert found.layers[0].reads == pytest.approx(200, rel=0.03)
    full = simulate(memory(1), TIERS["nvme"], Load(2, 100, 1, 1e-3, hit_rate=1.0))
    assert full.exposed == full.layers[0].reads == 0.0


def test_software_of_a_request_is_waited_for_once_a_batch():
    found = simulate(memory(0), INSTANT, Load(1, 1, 1, 1e-3), Shared(request=5e-4))
    assert found.exposed == pytest.approx(5e-4)


def test_the_copy_of_a_failed_part_serves_both_shares():
    load = Load(8, 100, 1, 1e-3)
    shared = Shared(parts=4, rate=600_000, copies=2)
    whole = simulate(memory(3), INSTANT, load, shared, forwards=30)
    broken = simulate(memory(3), INSTANT, load, shared, failed=1, forwards=30)
    assert broken.busy == pytest.approx(2 * whole.busy, rel=0.1)


def test_without_a_copy_the_rows_come_from_the_tier_that_stands_by():
    load = Load(1, 100, 1, 1e-3)
    with pytest.raises(ConfigError, match="expected copies of the rows of 1 failed parts"):
        simulate(memory(0), INSTANT, load, Shared(parts=4), failed=1)
    slow = Tier("slow", "made up", 0, 1e-2, math.inf)
    found = simulate(memory(0), INSTANT, load, Shared(parts=4, standby=slow), failed=1)
    assert found.exposed == pytest.approx(1e-2)


def test_a_failed_part_is_noticed_once_by_each_server():
    load = Load(3, 100, 1, 1e-3)
    shared = Shared(parts=4, copies=2, hedge=3e-2)
    found = simulate(memory(0), INSTANT, load, shared, failed=1, forwards=10)
    assert found.longest == pytest.approx(6e-3 + 3e-2)
    assert found.exposed == pytest.approx(3e-2 / 10)


def test_the_same_seed_gives_the_same_rack():
    load = Load(5, 10, 1, 1e-3, 0.3)
    runs = [simulate(memory(1), TIERS["nvme"], load, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_reads_under_way_limit_the_rate_of_a_published_tier():
    few = TIERS["cxl"].limited(15)
    assert few.rate == pytest.approx(15 / 750e-9)
    assert TIERS["cxl"].limited(10_000) == TIERS["cxl"]
    with pytest.raises(ConfigError, match="found a probe"):
        Tier.measured("disk", "probed", (Batch(1, 1e-4, 1e-4),)).limited(4)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Load(0, 1, 1, 1e-3),
        lambda: Load(1, 1, 1, 0.0),
        lambda: Load(1, 1, 1, 1e-3, 1.5),
        lambda: Shared(parts=2, copies=3),
        lambda: Shared(rate=0.0),
        lambda: Shared(hedge=-1.0),
        lambda: simulate(memory(1), INSTANT, Load(1, 1, 1, 1e-3), layers=(6,)),
        lambda: simulate(memory(1), INSTANT, Load(1, 1, 1, 1e-3), layers=()),
        lambda: simulate(memory(1), INSTANT, Load(1, 1, 1, 1e-3), failed=1),
        lambda: block_seconds(memory(1), 1, 1, 0),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(ConfigError, match="expected"):
        wrong()
