"""Tests that every row optimiser has to pass, including your own. Needs pytest.

from engraphy.train.testing import RowOptimizerSuite

class TestMine(RowOptimizerSuite):
    def make(self, memory, moments="ram:"):
        return Mine(memory, lr=0.1, moments=moments)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ..addresses.vocab import VocabMap
from ..errors import ConfigError, DigestMismatch, InputError
from ..memory.grads import RowGrad
from ..memory.memory import EngramMemory
from ..rows.format import RowFormat
from ..spec.config import EngramConfig
from ..spec.hash import HashSpec
from ..spec.layer import LayerSpec
from ..table.table import Table
from .optimizer import RowOptimizer

LAYERS, DIM = (2, 5), 4


def small_memory(row_format: str = "f32", seed: int = 1) -> EngramMemory:
    """A memory of two layers of some 100 random rows, d = 4, in RAM."""
    spec = HashSpec.demo(LAYERS, (2,), 1, 101, vocab_size=50, pad_id=0)
    config = EngramConfig(spec, LayerSpec(8, DIM, order=2), DIM)
    memory = EngramMemory(config, VocabMap.identity(50), row_format=row_format)
    memory.init_rows(std=0.5, seed=seed)
    return memory


def rows_of(memory: EngramMemory) -> np.ndarray:
    """All rows of all layers, f32 [N, d]."""
    stores = memory.stores.values()
    raw = [store.gather(np.arange(store.info.rows)) for store in stores]
    return memory.format.decode(np.concatenate(raw))


def random_grads(seed: int, count: int = 60) -> list[RowGrad]:
    """Gradients of `count` rows of each layer, some of them of the same row."""
    rng = np.random.default_rng(seed)
    grads = []
    for layer in LAYERS:
        ids_N = rng.integers(0, 101, count)
        grads.append(RowGrad(layer, ids_N, rng.standard_normal((count, DIM)).astype(np.float32)))
    return grads


class RowOptimizerSuite:
    """The tests. Derive a class whose name begins with Test, and define `make`.

    Attributes:
        row_format: "f32" or "bf16": the rows that most tests train.
    """

    row_format = "f32"

    def memory(self, seed: int = 1) -> EngramMemory:
        """`small_memory` with rows of this suite's format."""
        return small_memory(self.row_format, seed)

    def make(self, memory: EngramMemory, moments: str | Path = "ram:") -> RowOptimizer:
        """The optimiser under test, with a learning rate above 0."""
        raise NotImplementedError

    def train(
        self, memory: EngramMemory, seeds: range, moments: str | Path = "ram:"
    ) -> RowOptimizer:
        """An optimiser that has made one step for each seed."""
        optimizer = self.make(memory, moments)
        for seed in seeds:
            memory.row_grads += random_grads(seed)
            optimizer.step()
        return optimizer

    def test_rows_that_were_not_read_do_not_change(self) -> None:
        memory = self.memory()
        optimizer = self.train(memory, range(1))
        before = rows_of(memory)
        moments_before = optimizer.moments[5].gather(np.arange(101))
        grads = random_grads(3, 10)[:1]
        memory.row_grads += grads
        optimizer.step()
        changed = np.flatnonzero((rows_of(memory) != before).any(axis=1))
        assert set(changed) == set(grads[0].ids.tolist())
        np.testing.assert_array_equal(optimizer.moments[5].gather(np.arange(101)), moments_before)

    def test_the_first_step_goes_against_the_gradient(self) -> None:
        memory = self.memory()
        before = rows_of(memory)
        grad_1d = np.array([[1.0, -2.0, 0.5, 3.0]], np.float32)
        memory.row_grads.append(RowGrad(2, np.array([7]), grad_1d))
        optimizer = self.make(memory)
        optimizer.lr = 0.5  # enough for bf16 rows
        optimizer.step()
        assert ((rows_of(memory) - before)[7] * grad_1d[0] < 0).all()

    def test_a_learning_rate_of_zero_changes_no_row(self) -> None:
        memory = self.memory()
        before = rows_of(memory)
        optimizer = self.make(memory)
        optimizer.lr = 0.0
        memory.row_grads += random_grads(0)
        optimizer.step()
        np.testing.assert_array_equal(rows_of(memory), before)

    def test_duplicates_are_summed_before_the_update(self) -> None:
        duplicates, sums = self.memory(), self.memory()
        grad_Nd = np.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]], np.float32)
        duplicates.row_grads.append(RowGrad(2, np.array([7, 3, 7]), grad_Nd))
        summed_Ud = np.stack([grad_Nd[1], grad_Nd[0] + grad_Nd[2]])
        sums.row_grads.append(RowGrad(2, np.array([3, 7]), summed_Ud))
        self.make(duplicates).step()
        self.make(sums).step()
        np.testing.assert_array_equal(rows_of(duplicates), rows_of(sums))

    def test_accumulated_gradients_equal_one_larger_batch(self) -> None:
        halves, whole = self.memory(), self.memory()
        first, second = random_grads(1), random_grads(2)
        halves.row_grads += [*first, *second]
        for a, b in zip(first, second, strict=True):
            ids_N = np.concatenate([a.ids, b.ids])
            whole.row_grads.append(RowGrad(a.layer, ids_N, np.concatenate([a.grad, b.grad])))
        self.make(halves).step()
        self.make(whole).step()
        np.testing.assert_array_equal(rows_of(halves), rows_of(whole))

    def test_a_step_drains_the_gradients_and_is_counted(self) -> None:
        memory = self.memory()
        optimizer = self.train(memory, range(2))
        assert memory.row_grads == [] and optimizer.steps == 2
        before = rows_of(memory)
        optimizer.step()
        assert optimizer.steps == 3
        np.testing.assert_array_equal(rows_of(memory), before)

    def test_a_step_without_rows_changes_nothing(self) -> None:
        memory = self.memory()
        optimizer = self.train(memory, range(1))
        before = rows_of(memory)
        memory.row_grads.append(RowGrad(2, np.empty(0, np.int64), np.empty((0, DIM), np.float32)))
        optimizer.step()
        np.testing.assert_array_equal(rows_of(memory), before)
        assert optimizer.steps == 2

    def test_gradients_of_which_no_sum_is_finite_stop_the_step_too(self) -> None:
        memory = self.memory()
        before = rows_of(memory)
        optimizer = self.make(memory)
        huge_Nd = np.full((2, DIM), 3e38, np.float32)
        memory.row_grads += [*random_grads(0), RowGrad(5, np.array([7, 7]), huge_Nd)]
        with pytest.raises(InputError, match="layer 5, row 7: the gradient is not finite"):
            optimizer.step()
        np.testing.assert_array_equal(rows_of(memory), before)

    def test_a_gradient_that_is_not_finite_stops_the_step_before_any_update(self) -> None:
        memory = self.memory()
        before = rows_of(memory)
        optimizer = self.make(memory)
        moments_before = optimizer.moments[2].gather(np.arange(101))
        wrong = RowGrad(5, np.array([3]), np.full((1, DIM), np.inf, np.float32))
        memory.row_grads += [*random_grads(0), wrong]
        with pytest.raises(InputError, match="layer 5, row 3: the gradient is not finite"):
            optimizer.step()
        np.testing.assert_array_equal(rows_of(memory), before)
        np.testing.assert_array_equal(optimizer.moments[2].gather(np.arange(101)), moments_before)
        assert memory.row_grads == [] and optimizer.steps == 0

    def test_moments_have_the_documented_width(self) -> None:
        memory = self.memory()
        optimizer = self.make(memory)
        kind = optimizer.moment_format.kind
        row_bytes = RowFormat(kind, optimizer.moment_width(DIM)).row_bytes
        assert [store.info.row_bytes for store in optimizer.moments.values()] == [row_bytes] * 2
        assert optimizer.moment_bytes == memory.stores.rows * row_bytes

    def test_bf16_rows_train_and_integer_rows_are_refused(self) -> None:
        memory = small_memory("bf16")
        before = rows_of(memory)
        optimizer = self.make(memory)
        optimizer.lr = 0.1
        memory.row_grads += random_grads(5)
        optimizer.step()
        assert (rows_of(memory) != before).any()
        with pytest.raises(ConfigError, match="row format: expected one of .* found 'int8'"):
            self.make(small_memory("int8"))

    def test_a_read_only_table_is_refused(self, tmp_path: Path) -> None:
        memory = self.memory()
        memory.write_table(tmp_path / "table")
        with EngramMemory(memory.config, memory.vocab, tmp_path / "table") as served:
            with pytest.raises(ConfigError, match="layer 2: expected a writable store"):
                self.make(served)

    def test_a_table_on_disk_is_trained_in_place(self, tmp_path: Path) -> None:
        memory = self.memory()
        first_id = memory.write_table(tmp_path / "table")
        table = Table.open(tmp_path / "table", mode="w")
        for learner in (memory, EngramMemory(memory.config, memory.vocab, table)):
            self.train(learner, range(3))
        table.seal()
        table.close()
        with EngramMemory(memory.config, memory.vocab, tmp_path / "table") as served:
            np.testing.assert_array_equal(rows_of(served), rows_of(memory))
            assert served.stores.table_id != first_id

    def test_moments_on_disk_equal_those_in_memory(self, tmp_path: Path) -> None:
        in_memory, on_disk = self.memory(), self.memory()
        self.train(in_memory, range(3))
        self.train(on_disk, range(3), tmp_path / "moments").close()
        np.testing.assert_array_equal(rows_of(on_disk), rows_of(in_memory))
        with pytest.raises(ConfigError, match="moments: expected ram:, file:DIR or a Path"):
            self.make(self.memory(), "pool:moments")

    def test_saved_moments_continue_bit_for_bit(self, tmp_path: Path) -> None:
        straight = self.memory()
        optimizer = self.train(straight, range(3))
        table_id = straight.write_table(tmp_path / "table")
        optimizer.save(tmp_path / "moments", table_id)
        resumed = self.memory(seed=9)
        resumed.read_table(tmp_path / "table")
        again = self.make(resumed)
        again.load(tmp_path / "moments", table_id)
        assert (again.steps, again.lr) == (optimizer.steps, optimizer.lr)
        for seed in range(3, 6):
            straight.row_grads += random_grads(seed)
            resumed.row_grads += random_grads(seed)
            optimizer.step()
            again.step()
        np.testing.assert_array_equal(rows_of(resumed), rows_of(straight))

    def test_moments_of_another_table_or_optimizer_are_refused(self, tmp_path: Path) -> None:
        optimizer = self.train(self.memory(), range(1))
        optimizer.save(tmp_path / "moments", "0" * 32)
        with pytest.raises(DigestMismatch, match="belong to another table"):
            optimizer.load(tmp_path / "moments", "1" * 32)
        state = optimizer.state_dict()
        with pytest.raises(ConfigError, match="row optimiser: expected"):
            optimizer.load_state_dict(state | {"name": "another"})
        with pytest.raises(ConfigError, match="row optimiser: expected"):
            optimizer.load_state_dict(state | {"hyper": {**state["hyper"], "another": 1}})
        with pytest.raises(ConfigError, match="expected the moments of a row optimiser"):
            optimizer.load(tmp_path / "nothing", "0" * 32)
