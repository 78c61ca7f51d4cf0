"""The adaptation study: arms of the sizes they claim, stages that are never done twice, tables that
add up."""

from __future__ import annotations

import dataclasses
import json
import signal
from dataclasses import asdict

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from engraphy import VocabMap
from engraphy.cli.app import app
from engraphy.errors import ConfigError
from engraphy.lm.cross_entropy import mean_cross_entropy
from engraphy.recipes.studies import adapt_training
from engraphy.recipes.studies import study as engine
from engraphy.recipes.studies.adapt import BASE, AdaptConfig, Job, adapt_study, tables
from engraphy.recipes.studies.adapt_arms import LABELS, adapt, memory_config, rates_of
from engraphy.recipes.studies.adapt_run import Texts, hidden
from engraphy.recipes.studies.adapt_training import train
from engraphy.recipes.studies.queue import Results, write_result
from engraphy.system.signals import Terminated

VOCAB = 61
BEST = {
    "memory": 3e-3,
    "one-row": 1e-2,
    "frozen-rows": 1e-3,
    "lora-dense": 1e-3,
    "lora-total": 3e-4,
}


@pytest.fixture
def model():
    return tiny()


def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture
def texts():
    random = np.random.default_rng(0)
    return Texts([random.integers(1, VOCAB, 700) for _ in range(4)], [], [], {}, 0, {})


@pytest.fixture
def config(tmp_path):
    return AdaptConfig(tmp_path / "model", tmp_path / "general.txt", tokens=5000)


def made_up(job: Job) -> dict:
    """Each arm gains 0.5 at its rate of BEST, less elsewhere; the memory gains seed / 100 more."""
    gain = (
        0.0
        if job.arm == BASE
        else 0.5 - abs(job.lr - BEST[job.arm]) + (job.seed / 100) * (job.arm == "memory")
    )
    score = {"accuracy": 0.5 + gain / 10, "accuracy_stderr": 0.05}
    domain = {
        "loss": 4 - gain,
        "stderr": 0.01,
        "tokens": 100,
        "by_frequency": {
            "never": {"loss": 5 - gain, "tokens": 75},
            "31+": {"loss": 1 - gain, "tokens": 25},
        },
    }
    return {
        "job": asdict(job),
        "domain": domain,
        "general": {"loss": 3 + gain / 10, "stderr": 0.01, "tokens": 9},
        "items": {"general": score},
        "commit": "abc1234",
        "machine": "a CPU, float32",
        "minutes": 2.0,
        "sizes": {"dense": 1_000_000, "table": 0, "bytes": 4_000_000, "table_updated": 10},
        "text": {"source": "ICD", "tokens": {"training": 9, "heldout": 5, "general": 7}},
    }


@pytest.fixture
def queued(monkeypatch):
    ran = []

    def fake(plan, out, workers, run, report):
        while missing := [job for job in plan() if not (out / job.name).exists()]:
            ran.append(missing[0])
            (out / missing[0].name).write_text(json.dumps(made_up(missing[0])))

    monkeypatch.setattr(engine, "run_missing", fake)
    return ran


def test_the_rates_are_chosen_on_the_first_seed_and_nothing_runs_twice(config, queued, tmp_path):
    adapt_study(config, tmp_path / "out", 2, print)
    assert list(dict.fromkeys(job.arm for job in queued)) == [BASE, *LABELS]
    tried = {
        arm: sorted(job.lr for job in queued if job.arm == arm and job.seed == 0) for arm in LABELS
    }
    assert tried == {
        "memory": [1e-3, 3e-3, 1e-2],
        "lora-dense": [3e-4, 1e-3, 3e-3],
        "lora-total": [1e-4, 3e-4, 1e-3, 3e-3],
        "one-row": [1e-3, 3e-3, 1e-2, 3e-2],
        "frozen-rows": [3e-4, 1e-3, 3e-3, 1e-2],
    }
    assert {(job.arm, job.seed, job.lr) for job in queued if job.seed} == {
        (a, s, lr) for a, lr in BEST.items() for s in (1, 2)
    }
    assert len(set(queued)) == len(queued) == 1 + 18 + 10
    adapt_study(config, tmp_path / "out", 2, print)
    assert len(queued) == 29


def test_an_arm_goes_on_beyond_its_best_rate_twice_at_most():
    assert rates_of("memory").steps == (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    losses = {3e-3: 3.0, 1e-3: 4.0}
    to_try = rates_of("memory").to_try
    assert to_try(losses) == [3e-3, 1e-3, 1e-2]
    for loss, lr, following in (
        (2.0, 1e-2, [3e-2]),
        (1.0, 3e-2, [3e-2, 1e-1]),
        (0.5, 1e-1, [3e-2, 1e-1]),
    ):
        losses[lr] = loss
        assert to_try(losses) == [3e-3, 1e-3, 1e-2, *following]
    assert to_try(losses | {1e-1: 1.5}) == [3e-3, 1e-3, 1e-2, 3e-2, 1e-1]
    lora = rates_of("lora-dense")
    assert lora.to_try({1e-3: 1.0, 3e-4: 2.0, 3e-3: 2.0}) == [1e-3, 3e-4, 3e-3]


def test_tables_tell_gains_forgetting_and_what_is_missing(config, queued, tmp_path):
    adapt_study(config, tmp_path / "out", 2, print)
    text = tables(config, tmp_path / "out")
    assert "Missing: nothing." in text
    row = next(line for line in text.splitlines() if line.startswith("| memory | 0.003 | 3 |"))
    assert "-0.5100 ± 0.0058" in row and "+0.0510 ± 0.0006" in row
    assert "| memory minus LoRA, as many bytes as the whole memory | 3 | -0.0100 ± 0.0058 |" in text
    (tmp_path / "out" / "memory-seed2-lr0.003.json").unlink()
    text = tables(config, tmp_path / "out")
    assert "Missing: memory-seed2-lr0.003.json." in text and "| 2 | -0.0050 ± 0.0050 |" in text


def test_rates_that_are_given_are_not_searched(config, queued, tmp_path):
    given = dataclasses.replace(config, rates=(("memory", 2e-3), ("lora-dense", 1e-4)))
    (tmp_path / given.base_job().name).write_text(json.dumps(made_up(given.base_job())))
    assert "| the model as it is |" in tables(given, tmp_path)  # nothing has run yet
    adapt_study(given, tmp_path, 2, print)
    assert [(job.seed, job.arm, job.lr) for job in queued] == [
        (seed, arm, lr) for seed in range(3) for arm, lr in (("memory", 2e-3), ("lora-dense", 1e-4))
    ]
    text = tables(given, tmp_path)
    assert (
        "Missing: nothing." in text
        and "| memory | 0.002 | 3 |" in text
        and "seed 0 | lr" not in text
    )


def test_the_verb_runs_the_arms_that_it_is_given(queued, tmp_path):
    command = [
        "adapt-study",
        "model",
        "general.txt",
        "--out",
        str(tmp_path),
        "--tokens",
        "5000",
        "--seeds",
        "2",
        "--workers",
        "1",
        "--rate",
    ]
    told = CliRunner().invoke(app, [*command, "memory=0.01", "--rate", "lora-dense=3e-3"])
    assert told.exit_code == 0 and "Missing: nothing." in told.output
    assert {path.name for path in tmp_path.iterdir()} == {
        "base.json",
        *(
            f"{run}.json"
            for seed in (0, 1)
            for run in (f"memory-seed{seed}-lr0.01", f"lora-dense-seed{seed}-lr0.003")
        ),
    }
    for wrong in ("memory", "memory=fast"):
        told = CliRunner().invoke(app, [*command, wrong])
        assert told.exit_code == 1 and f"expected ARM=RATE, found '{wrong}'" in told.output
    told = CliRunner().invoke(app, [*command, "lora=0.1"])
    assert told.exit_code == 1 and "arm: expected one of" in told.output


def test_results_of_other_settings_are_refused(config, queued, tmp_path):
    adapt_study(config, tmp_path / "out", 2, print)
    other = AdaptConfig(config.model, config.general, tokens=6000)
    for call in (
        lambda: adapt_study(other, tmp_path / "out", 2, print),
        lambda: tables(other, tmp_path / "out"),
    ):
        with pytest.raises(ConfigError, match="'tokens'"):
            call()
    with pytest.raises(ConfigError, match="found none"):
        tables(config, tmp_path / "nothing")


def test_the_base_of_another_model_is_refused_before_anything_runs(config, queued, tmp_path):
    other = dataclasses.replace(config, model=tmp_path / "another")
    (tmp_path / other.base_job().name).write_text(json.dumps(made_up(other.base_job())))
    with pytest.raises(ConfigError, match="another"):
        adapt_study(config, tmp_path, 2, print)
    assert not queued


def test_a_result_at_a_rate_that_is_not_tried_chooses_nothing(config):
    jobs = [config.job("memory", 0, lr) for lr in (1e-3, 3e-3, 1e-2)]
    stray = config.job("memory", 0, 1e-4)
    found = {job: made_up(job) for job in jobs} | {
        stray: made_up(stray) | {"domain": {"loss": 0.0}}
    }
    assert config.search().chosen(found) == {"memory": 3e-3}


def test_a_rate_at_which_training_diverges_is_a_result(model, texts, config, tmp_path, monkeypatch):
    losses = iter([1.0, 2.0, torch.inf])
    monkeypatch.setattr(
        adapt_training,
        "mean_cross_entropy",
        lambda x, head, target: (x.sum() * 0 + next(losses)).requires_grad_(),
    )
    adapted = adapt(model, VocabMap.identity(VOCAB), "memory", rows_per_head=50, seed=1)
    told = train(adapted, texts, Job("memory", 1, 3e-3, 2048, 50, "tiny"), tmp_path / "work")
    assert told["diverged_at"] == 2 and told["training_curve"] == [1.0, 2.0]
    found = {
        config.job("memory", 0, lr): made_up(config.job("memory", 0, lr))
        for lr in (1e-3, 3e-3, 1e-2)
    }
    found[config.job("memory", 0, 1e-2)]["domain"]["loss"] = float("inf")
    write_result(found[config.job("memory", 0, 1e-2)], tmp_path / "memory-seed0-lr0.01.json")
    again = Results(tmp_path).of([config.job("memory", 0, 1e-2)])
    assert config.search().chosen(found | again) == {"memory": 3e-3}


def test_an_arm_without_all_of_its_rates_has_no_choice_yet(config):
    jobs = [
        config.job(arm, 0, lr)
        for arm in LABELS
        for lr in rates_of(arm).steps
        if (arm, lr) != ("memory", 1e-3)
    ]
    assert config.search().chosen({job: made_up(job) for job in jobs}) == {
        a: lr for a, lr in BEST.items() if a != "memory"
    }


@pytest.mark.parametrize(
    "settings, match",
    [
        (dict(seeds=()), "seeds"),
        (dict(seeds=(1, 1)), "seeds"),
        (dict(tokens=10), "tokens"),
        (dict(rates=(("lora", 1e-3),)), "arm"),
        (dict(rates=(("memory", 0.0),)), "positive"),
        (dict(rates=(("memory", 1e-2), ("memory", 1e-3))), "one an arm"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(tmp_path, settings, match):
    with pytest.raises(ConfigError, match=match):
        AdaptConfig(tmp_path, tmp_path, **settings)
    with pytest.raises(ConfigError, match="expected one of"):
        rates_of("lora")


@pytest.mark.parametrize("arm", LABELS)
def test_only_what_an_arm_says_is_trained(model, texts, arm, tmp_path):
    vocab = VocabMap.identity(VOCAB)
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = adapt(model, vocab, arm, rows_per_head=50, seed=1)
    rows = (
        {
            layer: store.gather(np.arange(store.info.rows))
            for layer, store in adapted.memory.stores.items()
        }
        if adapted.memory is not None
        else {}
    )
    told = train(adapted, texts, Job(arm, 1, 3e-3, 2048, 50, "tiny"), tmp_path)
    for name, value in adapted.model.state_dict().items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if plain in frozen:
            assert torch.equal(value, frozen[plain]), name
    assert told["steps"] == 8 and len(told["training_curve"]) == 8
    learnt = any(
        (adapted.memory.stores[layer].gather(np.arange(len(raw))) != raw).any()
        for layer, raw in rows.items()
    )
    assert learnt == (arm in ("memory", "one-row"))
    assert (told["sizes"]["table_updated"] > 0) == learnt
    if arm == "one-row":
        assert told["sizes"]["table_updated"] == told["sizes"]["table"]
        assert all(
            len(np.unique(part)) == 16
            for part in adapted.memory.addresser.all_rows(np.arange(1, 50)[None]).reshape(2, -1)
        )


@pytest.mark.parametrize("arm", LABELS)
@pytest.mark.parametrize("left", [3, 8])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(texts, arm, left, tmp_path, monkeypatch):
    monkeypatch.setattr(adapt_training, "SAVED", 3)
    job = Job(arm, 1, 3e-3, 2048, 50, "tiny")

    def fresh():
        return adapt(tiny(), VocabMap.identity(VOCAB), arm, rows_per_head=50, seed=1)

    straight, broken = fresh(), fresh()
    expected = train(straight, texts, job, tmp_path / "straight")
    trained = iter(range(left))

    def crash(x, head, target):
        if next(trained, None) is None:
            raise KeyboardInterrupt
        return mean_cross_entropy(x, head, target)

    with monkeypatch.context() as patch:
        patch.setattr(adapt_training, "mean_cross_entropy", crash)
        if left < 8:
            with pytest.raises(KeyboardInterrupt):
                train(broken, texts, job, tmp_path / "broken")
        else:
            train(broken, texts, job, tmp_path / "broken")
    resumed = fresh()
    found = train(resumed, texts, job, tmp_path / "broken")
    assert {**found, "minutes": 0} == {**expected, "minutes": 0}
    values = dict(resumed.model.named_parameters())
    assert all(torch.equal(values[name], p) for name, p in straight.model.named_parameters())
    if straight.memory is not None:
        for layer, store in straight.memory.stores.items():
            rows = np.arange(store.info.rows)
            assert (resumed.memory.stores[layer].gather(rows) == store.gather(rows)).all()


def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(texts, tmp_path, monkeypatch):
    steps = iter(range(9))

    def signalled(x, head, target):
        if next(steps) == 1:
            signal.raise_signal(signal.SIGTERM)
        return mean_cross_entropy(x, head, target)

    monkeypatch.setattr(adapt_training, "mean_cross_entropy", signalled)
    adapted = adapt(tiny(), VocabMap.identity(VOCAB), "memory", rows_per_head=50, seed=1)
    with pytest.raises(Terminated, match="stopped at step 2 of 8"):
        train(adapted, texts, Job("memory", 1, 3e-3, 2048, 50, "tiny"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000002"]


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(adapt_training, "SAVED", 3)
    vocab = VocabMap.identity(VOCAB)
    job = Job("memory", 1, 3e-3, 2048, 50, "tiny")
    train(adapt(tiny(), vocab, "memory", 50, 1), texts, job, tmp_path)
    with pytest.raises(ConfigError, match="expected a checkpoint of .*'lr': 0.01"):
        other = dataclasses.replace(job, lr=1e-2)
        train(adapt(tiny(), vocab, "memory", 50, 1), texts, other, tmp_path)
    others = dataclasses.replace(texts, training=texts.training[1:])
    with pytest.raises(ConfigError, match="expected a checkpoint of .*'data'"):
        train(adapt(tiny(), vocab, "memory", 50, 1), others, job, tmp_path)
    (checkpoint,) = tmp_path.iterdir()
    for name in ("used-1.npy", "run.json", "dense.safetensors"):
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(whole[:-30])
        with pytest.raises(ConfigError, match="expected a checkpoint"):
            train(adapt(tiny(), vocab, "memory", 50, 1), texts, job, tmp_path)
        (checkpoint / name).write_bytes(whole)


def test_lora_has_the_sizes_that_it_is_compared_at(model):
    vocab = VocabMap.identity(VOCAB)
    wanted = memory_config(model.config, vocab, 50)
    per_rank = adapt(model, vocab, "lora-dense", 50, 0).sizes
    assert abs(per_rank.dense - wanted.dense_parameters()) <= per_rank.dense / per_rank.rank / 2
    fresh = AutoModelForCausalLM.from_config(model.config)
    total = adapt(fresh, vocab, "lora-total", 50, 0).sizes
    assert (
        abs(total.dense - wanted.dense_parameters() - wanted.table_parameters())
        <= total.dense / total.rank / 2
    )


def test_packed_documents_do_not_see_each_other(model):
    ids = torch.randint(1, VOCAB, (1, 20))
    starts = torch.zeros(1, 20, dtype=torch.bool)
    starts[0, [0, 12]] = True
    adapted = adapt(model, VocabMap.identity(VOCAB), "memory", 50, 0)
    with torch.no_grad():
        for parameter in adapted.memory.parameters():
            parameter.normal_(std=0.3)
        both, head = hidden(adapted.model, ids, starts)
        alone, _ = hidden(adapted.model, ids[:, 12:], starts[:, 12:])
    torch.testing.assert_close(both[:, 12:], alone, rtol=1e-4, atol=1e-5)
    assert head.shape == (VOCAB, 32)
