"""Every row optimiser keeps the contract of engraphy.train.testing. Add a new one to KINDS."""

from __future__ import annotations

from functools import partial

import pytest

from engraphy.errors import StoreError
from engraphy.train import RowAdagrad, RowAdam, RowNesterov, RowOptimizer
from engraphy.train.testing import RowOptimizerSuite, random_grads

KINDS = {
    "adam": RowAdam,
    "adam, bf16 moments": partial(RowAdam, moment_dtype="bf16"),
    "adagrad": RowAdagrad,
    "nesterov": RowNesterov,
    "nesterov, bf16 moments": partial(RowNesterov, moment_dtype="bf16", seed=3),
    "adam, to nearest": partial(RowAdam, moment_dtype="bf16", rounding="nearest"),
}


@pytest.mark.parametrize("row_format", ["f32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
class TestRowOptimizers(RowOptimizerSuite):
    @pytest.fixture(autouse=True)
    def of_kind(self, kind, row_format):
        self.kind = KINDS[kind]
        self.row_format = row_format

    def make(self, memory, moments="ram:"):
        return self.kind(memory, moments=moments)

    def test_moments_at_a_url_are_those_at_its_path(self, tmp_path):
        optimizer = self.make(self.memory(), f"file:{tmp_path / 'moments'}")
        assert optimizer.moments.info.path == str(tmp_path / "moments")
        assert optimizer.moments.writable
        optimizer.close()

    def test_a_closed_optimizer_steps_no_more(self):
        memory = self.memory()
        optimizer = self.make(memory)
        optimizer.close()
        optimizer.close()
        memory.row_grads += random_grads(0)
        with pytest.raises(StoreError, match="closed"):
            optimizer.step()


class Blind(RowOptimizer):
    """Control: it goes with the gradient, forgets its moments and looks at no value."""

    name = "blind"

    def __init__(self, memory, moments="ram:"):
        super().__init__(memory, 0.1, moments)

    def moment_width(self, dim):
        return dim

    def hyper(self):
        return {}

    def update(self, rows_Ud, grad_Ud, moments_Um):
        moments_Um += grad_Ud
        rows_Ud += self.lr * moments_Um

    def load(self, path, table_id):
        pass


class BlindSuite(RowOptimizerSuite):
    def make(self, memory, moments="ram:"):
        return Blind(memory, moments)


def test_the_suite_finds_an_optimizer_that_does_not_keep_the_contract(tmp_path):
    suite = BlindSuite()
    with pytest.raises(AssertionError):
        suite.test_the_first_step_goes_against_the_gradient()
    with pytest.raises(AssertionError):
        suite.test_saved_moments_continue_bit_for_bit(tmp_path / "saved")
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        suite.test_moments_of_another_table_or_optimizer_are_refused(tmp_path / "other")
    suite.test_rows_that_were_not_read_do_not_change()
