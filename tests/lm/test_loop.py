"""The training loop: stops by tokens, resumes bit for bit, and leaves a checkpoint when
interrupted."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch

from engraphy import EngramConfig, EngramMemory, HashSpec, LayerSpec, VocabMap
from engraphy.data.packing import Batches
from engraphy.errors import ConfigError, DigestMismatch
from engraphy.lm import LM, LMConfig
from engraphy.lm.loop import Run, TrainConfig, Watch, checkpoints, heldout_loss, train
from engraphy.recipes.progress import watched
from engraphy.system.signals import Terminated

VOCAB = 32


def documents(seed: int = 0, count: int = 40) -> list[np.ndarray]:
    """Texts in which every token but the first follows from the two before it."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        ids = [int(rng.integers(1, VOCAB)), int(rng.integers(1, VOCAB))]
        for _ in range(30):
            ids.append(1 + (ids[-1] * 7 + ids[-2] * 3) % (VOCAB - 1))
        texts.append(np.array(ids, dtype=np.int32))
    return texts


def make_run(with_memory: bool = True, tokens: int = 640, **settings) -> Run:
    torch.manual_seed(0)
    memory = None
    if with_memory:
        spec = HashSpec.demo((1,), (2, 3), 2, 101, VOCAB, 0)
        memory = EngramMemory(
            EngramConfig(spec, LayerSpec(16, spec.columns * 4), 4), VocabMap.identity(VOCAB)
        )
        memory.init_rows(0.02, 0)
    model = LM(
        LMConfig(
            VOCAB, 16, 2, 2, 32, moe_layers=(1,), experts=4, top_k=2, expert_ffn=8, shared_ffn=8
        ),
        memory,
    )
    batches = Batches(documents(), end_id=0, batch=4, tokens=16, seed=0)
    return Run(model, batches, TrainConfig(tokens, lr=1e-2, **settings))


def weights(run: Run) -> dict[str, torch.Tensor]:
    found = {name: value.clone() for name, value in run.model.state_dict().items()}
    if run.model.memory is not None:
        store = run.model.memory.stores[1]
        found["rows"] = torch.from_numpy(store.gather(np.arange(store.info.rows)))
    return found


def assert_same(one: Run, other: Run) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        rows = name.endswith("_extra_state")  # their names, which each memory has for itself
        assert rows or torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(
    "number, error", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
@pytest.mark.parametrize("with_memory", [True, False])
def test_an_interrupted_run_resumes_bit_for_bit(with_memory, tmp_path, number, error):
    straight = make_run(with_memory)
    train(straight, tmp_path / "straight")
    broken = make_run(with_memory)

    def interrupt(told):
        if told.step == 4:
            os.kill(os.getpid(), number)

    with pytest.raises(error, match="step 4 of 10; the checkpoint is in"):
        train(broken, tmp_path / "broken", report=interrupt)
    assert [path.name for path in checkpoints(tmp_path / "broken")] == ["checkpoint-00000004"]
    resumed = make_run(with_memory)
    train(resumed, tmp_path / "broken", resume=True)
    assert_same(straight, resumed)


@pytest.mark.parametrize("with_memory", [True, False])
def test_a_run_of_muon_and_step_decay_resumes_bit_for_bit(with_memory, tmp_path):
    settings = {"optimizer": "muon", "schedule": "step", "checkpoint_every": 7}
    straight = make_run(with_memory, **settings)
    train(straight, tmp_path / "straight")
    broken = make_run(with_memory, **settings)

    def crash(told):
        if told.step == 9:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(broken, tmp_path / "broken", report=crash)
    resumed = make_run(with_memory, **settings)
    train(resumed, tmp_path / "broken", resume=True)
    assert_same(straight, resumed)
    with pytest.raises(ConfigError, match="belongs to another run"):
        make_run(with_memory, schedule="step").resume(checkpoints(tmp_path / "broken")[-1])


def test_the_schedule_moves_both_rates_of_muon_and_that_of_the_rows():
    run = make_run(optimizer="muon", schedule="step", warmup=0.0)
    rates = []
    while not run.done:
        run.step()
        dense = {group["lr"] for group in run.pair.dense.param_groups}
        rates.append((*dense, run.pair.rows.lr))
    shares = [1.0] * 8 + [0.316, 0.1]
    assert rates == [(pytest.approx(1e-2 * s), pytest.approx(5e-2 * s)) for s in shares]


@pytest.mark.slow
def test_muon_learns_too():
    run = make_run(with_memory=False, tokens=64 * 200, optimizer="muon")
    losses = [run.step()[0] for _ in range(200)]
    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:20])


@pytest.mark.slow
def test_a_crash_after_a_checkpoint_loses_only_what_came_later(tmp_path):
    straight = make_run(checkpoint_every=3)
    train(straight, tmp_path / "straight")
    broken = make_run(checkpoint_every=3)

    def crash(told):
        if told.step == 5:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(broken, tmp_path / "broken", report=crash)
    resumed = make_run(checkpoint_every=3)
    train(resumed, tmp_path / "broken", resume=True)
    assert_same(straight, resumed)
    lines = [
        json.loads(line)
        for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == list(range(1, 11))


def test_runs_stop_by_tokens_and_metrics_tell_every_step(tmp_path):
    run = make_run(tokens=300)
    heldout = Batches(documents(seed=1, count=5), end_id=0, batch=4, tokens=16, seed=None)
    run.config = dataclasses.replace(run.config, heldout_every=2)
    told = []
    train(run, tmp_path, heldout=heldout, report=told.append)
    assert [step.step for step in told] == [1, 2, 3, 4, 5] and told[-1].tokens == 5 * 64
    assert [step.heldout is not None for step in told] == [False, True, False, True, True]
    assert told[-1].heldout == pytest.approx(heldout_loss(run.model, heldout))
    assert told[-1].max_load is not None and told[-1].max_load >= 1
    assert run.done


def test_what_is_watched_is_measured_in_eval_mode_and_resumes_with_the_run(tmp_path):
    def measure(model):
        assert not model.training
        return {"steps": len(seen)}

    def crash(told):
        seen.append(told.step)
        if told.step == 5:
            raise RuntimeError("power cut")

    seen = []
    with pytest.raises(RuntimeError, match="power cut"):
        train(make_run(checkpoint_every=3), tmp_path, report=crash, watch=Watch(2, measure))
    run = make_run(checkpoint_every=3)
    train(run, tmp_path, resume=True, report=seen.append, watch=Watch(4, measure))
    assert [step for step, _ in watched(tmp_path)] == [2, 4, 8, 10]
    assert watched(tmp_path)[1] == (4, {"steps": 5})  # step 4 was done again


def test_a_run_stops_at_a_held_out_loss_and_stays_there(tmp_path):
    heldout = Batches(documents(1, 8), end_id=0, batch=4, tokens=16, seed=None)
    whole = make_run(heldout_every=2)
    train(whole, tmp_path / "whole", heldout=heldout)
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    losses = {line["step"]: line["heldout"] for line in map(json.loads, lines) if line["heldout"]}
    goal = losses[6]
    first = min(step for step, loss in losses.items() if loss <= goal)
    for resume in (False, True):
        run = make_run(heldout_every=2)
        train(run, tmp_path / "early", resume, heldout, until=goal)
        assert run.step_index == first < whole.step_index
        assert heldout_loss(run.model, heldout) == pytest.approx(losses[first], abs=1e-6)
    for never in (None, 0.0):
        run = make_run()
        train(run, tmp_path / f"never-{never}", heldout=heldout, until=never)
        assert run.done


def test_heldout_loss_is_the_mean_over_tokens_not_batches():
    run = make_run()
    heldout = Batches(documents(seed=1, count=5), end_id=0, batch=4, tokens=16, seed=None)
    assert (
        len({int((targets >= 0).sum()) for _, targets, _ in heldout}) > 1
    )  # batches of different size
    with torch.no_grad():
        losses = [run.model.token_losses(*batch)[batch.targets_BT >= 0] for batch in heldout]
    assert heldout_loss(run.model.eval(), heldout) == pytest.approx(
        float(torch.cat(losses).mean()), rel=1e-6
    )


@pytest.mark.slow
def test_a_memory_learns_what_its_text_repeats():
    losses = {}
    for with_memory in (True, False):
        run = make_run(with_memory, tokens=64 * 300)
        losses[with_memory] = np.mean([run.step()[0] for _ in range(300)][-20:])
    # The next token follows from the last two, which is what the table is addressed by.
    assert losses[True] < 0.8 * losses[False]


def test_bfloat16_trains(tmp_path):
    run = make_run(dtype="bfloat16")
    losses = [run.step()[0] for _ in range(10)]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    train(make_run(tokens=64), tmp_path)
    with pytest.raises(ConfigError, match="resume that run, or choose another folder"):
        train(make_run(tokens=64), tmp_path)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    train(make_run(tokens=64), tmp_path)
    with pytest.raises(ConfigError, match="belongs to another run: .*config: expected"):
        train(make_run(tokens=64, warmup=0.5), tmp_path, resume=True)


def test_a_checkpoint_with_another_table_or_origin_is_refused(tmp_path):
    train(make_run(tokens=64), tmp_path)
    (checkpoint,) = checkpoints(tmp_path)
    run = make_run(tokens=64)
    run.origin = {"seed": 5}
    with pytest.raises(ConfigError, match="origin: expected {'seed': 5}, found {}"):
        run.resume(checkpoint)
    shutil.rmtree(checkpoint / "table")
    other = make_run(tokens=64).model.memory
    other.write_table(checkpoint / "table")
    with pytest.raises(DigestMismatch, match="expected table"):
        make_run(tokens=64).resume(checkpoint)


@pytest.mark.parametrize("name", ["run.json", "dense.safetensors", "optimizer.pt"])
def test_a_damaged_checkpoint_is_a_named_error(name, tmp_path):
    train(make_run(tokens=64), tmp_path)
    (checkpoint,) = checkpoints(tmp_path)
    (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:-30])
    with pytest.raises(ConfigError, match="expected a checkpoint"):
        make_run(tokens=64).resume(checkpoint)


def test_a_metrics_line_that_was_cut_short_does_not_stop_a_resume(tmp_path):
    run = make_run(tokens=128)
    train(run, tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "los')
    train(make_run(tokens=128), tmp_path, resume=True)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": 0.0},
        {"clip": -1.0},
        {"heldout_every": -1},
        {"optimizer": "sgd"},
        {"schedule": "flat"},
    ],
)
def test_numbers_out_of_range_are_errors(bad):
    with pytest.raises(ConfigError, match=f"{next(iter(bad))}: expected"):
        TrainConfig(tokens=5, **bad)


@pytest.mark.parametrize("bad", [{"tokens": 0}, {"tokens": 5, "dtype": "float16"}])
def test_settings_that_cannot_be_meant_are_errors(bad):
    with pytest.raises(ConfigError, match="expected tokens >= 1"):
        TrainConfig(**bad)
