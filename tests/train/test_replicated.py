"""Two processes with a copy of the table each train as one process with the joined batch, and stay
equal."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from engraphy.errors import ConfigError
from engraphy.train import OptimizerPair, replica_group
from tests.tools.paths import ROOT
from tests.tools.replicated_worker import PARTS, TRAINER, batches, no_dropout, pair_of
from tests.tools.tiny_training import (
    attach_tiny,
    rows_of,
    same,
    tiny_model,
    tiny_trainer,
    weights_of,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """(folder, what each of two processes found)."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--module",
        "tests.tools.replicated_worker",
        str(folder),
    ]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def close(found, expected, tolerance: float) -> None:
    """Weights and f32 rows of a run, within what another order of sums may change."""
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=tolerance, atol=tolerance)
    for layer, rows in expected["rows"].items():
        torch.testing.assert_close(
            *(torch.from_numpy(each).view(torch.float32) for each in (found["rows"][layer], rows)),
            rtol=tolerance,
            atol=tolerance,
        )


@pytest.mark.parametrize("run", ["loop", "trainer", "resumed"])
def test_all_processes_hold_the_same_rows_and_weights_bit_for_bit(ranks, run):
    first, second = (found[run] for found in ranks[1])
    assert same(first["rows"], second["rows"]) and same(first["weights"], second["weights"])


def test_two_processes_equal_one_with_the_joined_batch(ranks):
    model = no_dropout(tiny_model())
    memory = attach_tiny(model, seed=0)
    before, pair, norms = rows_of(memory), pair_of(model, memory), []
    for parts in batches():
        for ids_BT in parts:
            (model(ids_BT, labels=ids_BT).loss / PARTS).backward()
        norms.append(pair.step(1.0))
    expected = {"weights": weights_of(model), "rows": rows_of(memory)}
    for found in ranks[1]:
        close(found["loop"], expected, 1e-5)
        assert found["loop"]["norms"] == pytest.approx(norms, rel=1e-4)
    assert min(norms) > 0.5 and not same(before, expected["rows"])


def test_trainer_in_two_processes_equals_trainer_with_twice_the_batch(ranks, tmp_path):
    model = no_dropout(tiny_model())
    memory = attach_tiny(model)
    tiny_trainer(model, memory, tmp_path, **(TRAINER | dict(per_device_train_batch_size=4))).train()
    for found in ranks[1]:
        close(found["trainer"], {"weights": weights_of(model), "rows": rows_of(memory)}, 5e-4)


def test_trainer_in_two_processes_resumes_bit_for_bit_from_what_one_of_them_wrote(ranks):
    folder, found = ranks
    for each in found:
        assert same(each["resumed"]["rows"], each["trainer"]["rows"])
        assert same(each["resumed"]["weights"], each["trainer"]["weights"])
    assert sorted(path.name for path in (folder / "run" / "checkpoint-4" / "memory").iterdir()) == [
        "memory.json",
        "memory.safetensors",
        "moments",
        "state.json",
        "table",
        "vocab.json",
    ]


def test_row_gradients_are_the_mean_over_processes_also_where_one_has_none(ranks):
    for found in ranks[1]:
        assert found["gathered"] == {1: ([5], [3.0]), 2: ([3, 7, 9], [0.5, 2.0, 1.0])}


def test_copies_that_differ_in_one_row_are_refused_everywhere(ranks):
    for found in ranks[1]:
        assert "found another one in ranks [1]" in found["refusal"]


def test_a_group_of_one_changes_nothing(tmp_path):
    ends = []
    for alone in (True, False):
        model = no_dropout(tiny_model())
        memory = attach_tiny(model)
        if not alone:
            dist.init_process_group(
                "gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1
            )
        try:
            pair: OptimizerPair = pair_of(model, memory, None if alone else replica_group(memory))
            ids_BT = batches()[0, 0]
            model(ids_BT, labels=ids_BT).loss.backward()
            pair.step(1.0)
        finally:
            if not alone:
                dist.destroy_process_group()
        ends.append({**weights_of(model), **rows_of(memory)})
    assert same(*ends)


def test_without_torch_distributed_there_is_no_group():
    with pytest.raises(ConfigError, match="expected torch.distributed to be initialised"):
        replica_group(attach_tiny(tiny_model()))
