"""Row optimisers and the pair: they equal torch's optimisers, touch what was read, and resume bit
for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engraphy import EngramConfig, EngramMemory, HashSpec, LayerSpec, RowFormat, VocabMap
from engraphy.errors import ConfigError, DigestMismatch, InputError
from engraphy.memory import RowGrad
from engraphy.train import (
    OptimizerPair,
    RowAdagrad,
    RowAdam,
    RowNesterov,
    coalesce,
    gradient_norm,
    warmup_cosine,
    warmup_steps,
    weight_decay_groups,
)

ROWS, DIM, LAYER = 101, 4, 2


def make_memory(row_format: str = "f32", seed: int = 1) -> EngramMemory:
    spec = HashSpec.demo((LAYER,), (2,), 1, ROWS, vocab_size=50, pad_id=0)
    config = EngramConfig(spec, LayerSpec(8, DIM, order=2), DIM)
    memory = EngramMemory(config, VocabMap.identity(50), row_format=row_format)
    memory.init_rows(std=0.5, seed=seed)
    return memory


def table_of(memory: EngramMemory) -> np.ndarray:
    store = memory.stores[LAYER]
    return memory.format.decode(store.gather(np.arange(store.info.rows)))


def random_grads(rng: np.random.Generator, count: int = 60) -> RowGrad:
    return RowGrad(
        LAYER, rng.integers(0, ROWS, count), rng.standard_normal((count, DIM)).astype(np.float32)
    )


def test_row_adam_equals_sparse_adam_over_20_steps_with_changing_rows():
    memory, rng = make_memory(), np.random.default_rng(0)
    weight = torch.nn.Parameter(torch.from_numpy(table_of(memory).copy()))
    theirs = torch.optim.SparseAdam([weight], lr=0.01)
    ours = RowAdam(memory, lr=0.01)
    for _ in range(20):
        entry = random_grads(rng)
        memory.row_grads.append(entry)
        ours.step()
        weight.grad = torch.sparse_coo_tensor(
            torch.from_numpy(entry.ids)[None],
            torch.from_numpy(entry.grad),
            weight.shape,
            check_invariants=True,
        )
        theirs.step()
        np.testing.assert_allclose(table_of(memory), weight.detach().numpy(), rtol=0, atol=1e-6)


def test_row_adam_equals_dense_adam_where_every_row_is_touched():
    memory, rng = make_memory(), np.random.default_rng(1)
    weight = torch.nn.Parameter(torch.from_numpy(table_of(memory).copy()))
    theirs = torch.optim.Adam([weight], lr=0.01, betas=(0.8, 0.95))
    ours = RowAdam(memory, lr=0.01, betas=(0.8, 0.95))
    for _ in range(5):
        grad = rng.standard_normal((ROWS, DIM)).astype(np.float32)
        memory.row_grads.append(RowGrad(LAYER, np.arange(ROWS), grad))
        ours.step()
        weight.grad = torch.from_numpy(grad)
        theirs.step()
        # SparseAdam, and so RowAdam, adds eps before the bias correction, Adam after it: that is
        # all that is left.
        np.testing.assert_allclose(table_of(memory), weight.detach().numpy(), rtol=0, atol=1e-5)


def test_row_nesterov_equals_torch_s_where_every_row_is_touched():
    memory, rng = make_memory(), np.random.default_rng(1)
    weight = torch.nn.Parameter(torch.from_numpy(table_of(memory).copy()))
    theirs = torch.optim.SGD([weight], lr=0.01, momentum=0.95, nesterov=True)
    ours = RowNesterov(memory, lr=0.01)
    for _ in range(10):
        grad = rng.standard_normal((ROWS, DIM)).astype(np.float32)
        memory.row_grads.append(RowGrad(LAYER, np.arange(ROWS), grad))
        ours.step()
        weight.grad = torch.from_numpy(grad)
        theirs.step()
        np.testing.assert_allclose(table_of(memory), weight.detach().numpy(), rtol=0, atol=1e-5)


def test_row_adagrad_follows_its_formula_written_out_row_by_row():
    memory, rng = make_memory(), np.random.default_rng(2)
    rows, sums = table_of(memory).astype(np.float64), np.zeros(ROWS)
    optimizer = RowAdagrad(memory, lr=0.1)
    for _ in range(4):
        entry = random_grads(rng)
        memory.row_grads.append(entry)
        optimizer.step()
        for row in set(entry.ids.tolist()):
            grad = entry.grad[entry.ids == row].astype(np.float64).sum(axis=0)
            sums[row] += (grad**2).mean()
            rows[row] -= 0.1 * grad / (math.sqrt(sums[row]) + 1e-8)
    np.testing.assert_allclose(table_of(memory), rows, atol=1e-5)


def test_coalesce_sums_duplicates_and_sorts():
    grad = np.array([[1.0], [2.0], [4.0], [8.0]], dtype=np.float32)
    summed = coalesce([RowGrad(3, np.array([5, 1, 5, 0]), grad)])[3]
    assert summed.ids.tolist() == [0, 1, 5] and summed.grad.ravel().tolist() == [8.0, 2.0, 5.0]
    empty = coalesce([RowGrad(3, np.array([], dtype=np.int64), np.zeros((0, 1), np.float32))])[3]
    assert len(empty.ids) == 0 and empty.grad.shape == (0, 1)


def test_moments_of_another_table_or_optimizer_are_refused(tmp_path):
    memory = make_memory()
    table_id = memory.write_table(tmp_path / "table")
    RowAdam(memory).save(tmp_path / "moments", table_id)
    with pytest.raises(DigestMismatch, match="expected moments of table"):
        RowAdam(memory).load(tmp_path / "moments", "0" * 32)
    with pytest.raises(ConfigError, match="row optimiser: expected"):
        RowAdagrad(memory).load(tmp_path / "moments", table_id)
    with pytest.raises(ConfigError, match="row optimiser: expected"):
        RowAdam(memory, betas=(0.5, 0.9)).load(tmp_path / "moments", table_id)


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": 0.0}])
def test_settings_out_of_range_are_errors(bad):
    with pytest.raises(ConfigError, match="RowAdam: expected"):
        RowAdam(make_memory(), **bad)


def test_settings_of_nesterov_out_of_range_are_errors():
    for bad in ({"lr": -1.0}, {"momentum": 1.0}, {"momentum": -0.1}):
        with pytest.raises(ConfigError, match="RowNesterov: expected"):
            RowNesterov(make_memory(), **bad)


def make_pair(clip: float | None) -> tuple[torch.nn.Parameter, EngramMemory, OptimizerPair]:
    weight = torch.nn.Parameter(torch.ones(3))
    memory = make_memory()
    return (
        weight,
        memory,
        OptimizerPair(
            torch.optim.SGD([weight], lr=1.0),
            RowAdagrad(memory, lr=1.0),
            lambda progress: 1.0,
            clip,
        ),
    )


def test_the_pair_clips_by_the_common_norm_of_dense_and_summed_row_gradients():
    weight, memory, pair = make_pair(clip=1.0)
    weight.grad = torch.tensor([3.0, 0.0, 0.0])
    twice = np.tile(
        np.array([[2.0, 0.0, 0.0, 0.0]], np.float32), (2, 1)
    )  # one row, read twice: sums to 4
    memory.row_grads.append(RowGrad(LAYER, np.array([7, 7]), twice))
    assert pair.step(1.0) == pytest.approx(5.0)
    assert weight.tolist() == pytest.approx([1 - 3 / 5, 1.0, 1.0])
    moments = pair.rows.moments[LAYER].gather(np.array([7])).view(np.float32)
    assert float(moments[0, 0]) == pytest.approx((4 / 5) ** 2 / DIM)
    assert memory.row_grads == [] and float(weight.grad.abs().sum()) == 0


def test_without_clipping_the_norm_is_still_told():
    weight, memory, pair = make_pair(clip=None)
    weight.grad = torch.tensor([3.0, 4.0, 0.0])
    assert pair.step(1.0) == pytest.approx(5.0)
    assert weight.tolist() == pytest.approx([-2.0, -3.0, 1.0])


def test_a_gradient_that_is_not_finite_stops_the_step_before_any_update():
    weight, memory, pair = make_pair(clip=1.0)
    weight.grad = torch.zeros(3)
    before = table_of(memory).copy()
    memory.row_grads.append(RowGrad(LAYER, np.array([3]), np.full((1, DIM), np.nan, np.float32)))
    with pytest.raises(InputError, match="layer 2, row 3: the gradient is not finite"):
        pair.step(1.0)
    weight.grad = torch.tensor([float("inf"), 0.0, 0.0])
    with pytest.raises(InputError, match="dense gradients are not finite"):
        pair.step(1.0)
    np.testing.assert_array_equal(table_of(memory), before)
    assert weight.tolist() == [1.0, 1.0, 1.0]


def test_the_schedule_scales_both_rates():
    weight, memory, _ = make_pair(None)
    dense = torch.optim.SGD([weight], lr=2.0)
    pair = OptimizerPair(dense, RowAdagrad(memory, lr=10.0), lambda progress: progress, None)
    weight.grad = torch.ones(3)
    pair.step(0.25)
    assert pair.dense.param_groups[0]["lr"] == pytest.approx(0.5) and pair.rows.lr == pytest.approx(
        2.5
    )


def test_warmup_steps_falls_twice_by_the_root_of_a_tenth():
    schedule = warmup_steps(warmup=0.1)
    places = (0.05, 0.1, 0.5, 0.8, 0.81, 0.9, 0.91, 1.0)
    assert [schedule(place) for place in places] == [0.5, 1, 1, 1, 0.316, 0.316, 0.1, 0.1]
    assert warmup_steps(0.0)(0.0) == 1.0
    with pytest.raises(ConfigError, match="warmup_steps"):
        warmup_steps(warmup=0.9)


def test_warmup_cosine_rises_then_falls_to_its_final_share():
    schedule = warmup_cosine(warmup=0.1, final=0.2)
    assert schedule(0.05) == pytest.approx(0.5) and schedule(0.1) == pytest.approx(1.0)
    assert schedule(1.0) == pytest.approx(0.2) and schedule(0.3) > schedule(0.6) > schedule(0.9)
    with pytest.raises(ConfigError, match="warmup"):
        warmup_cosine(warmup=1.0)


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    decayed, kept = weight_decay_groups(model, 0.1)
    assert [p.ndim for p in decayed["params"]] == [2] and [p.ndim for p in kept["params"]] == [
        1,
        1,
        1,
    ]
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0.0


def test_gradient_norm_of_nothing_is_zero():
    assert gradient_norm([], {}) == 0.0


def test_moments_have_the_documented_width():
    memory = make_memory()
    assert RowAdam(memory).moments[LAYER].info.row_bytes == RowFormat("f32", 2 * DIM).row_bytes
    assert RowAdam(memory, moment_dtype="bf16").moments[LAYER].info.row_bytes == 4 * DIM
    assert RowNesterov(memory).moments[LAYER].info.row_bytes == 4 * DIM
    assert RowAdagrad(memory).moments[LAYER].info.row_bytes == 4
