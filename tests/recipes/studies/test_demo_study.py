"""The study: two stages, results that are never done twice or mixed up, and tables of what belongs
to it."""

from __future__ import annotations

import dataclasses
import json
import random
from dataclasses import asdict

import numpy as np
import pytest
from typer.testing import CliRunner

from engraphy.cli.app import app
from engraphy.data.corpus import CorpusConfig, prepare
from engraphy.errors import ConfigError, EngraphyError
from engraphy.recipes.studies import demo_study as recipe
from engraphy.recipes.studies import study as engine
from engraphy.recipes.studies.demo_arms import LABELS
from engraphy.recipes.studies.demo_study import DEMO, RATES, Job, StudyConfig, study, tables

pytestmark = pytest.mark.slow

CONFIG = StudyConfig(seeds=(0, 1, 2), tokens=4000, data="wiki")
BEST = {"dense": 3e-3, "moe": 6e-3, "memory": 1e-2, "one-row": 6e-3}
LEVEL = {"dense": 4.0, "moe": 3.9, "memory": 3.8, "one-row": 3.85}
BUCKETS = {"unseen": 1.5, "rare": 0.0}


def made_up(job: Job) -> dict:
    """A result: each arm is best at its rate of BEST, seed n is n / 100 worse, memory gains n /
    1000 more on seed n."""
    loss = LEVEL[job.arm] + abs(job.lr - BEST[job.arm]) + job.seed / 100
    loss -= job.seed / 1000 if job.arm == "memory" else 0
    return {
        "job": asdict(job),
        "parameters": {"total": 2_573_184, "activated": 836_480, "table": 0, "embedding": 1},
        "validation_loss": loss,
        "validation_stderr": 0.02,
        "loss_by_frequency": {name: loss + more for name, more in BUCKETS.items()},
        "heldout_curve": [],
        "max_expert_load": None,
        "minutes": 2.0,
        "version": "0.1.0",
        "commit": "abc1234",
        "machine": "A CPU, avx2, one thread, float32",
    }


def write(out, *results):
    out.mkdir(exist_ok=True)
    for result in results:
        (out / Job(**result["job"]).name).write_text(json.dumps(result))


@pytest.fixture
def queued(monkeypatch):
    """Jobs that the study would have run, in order; made-up results are written instead."""
    ran = []

    def fake(plan, out, workers, run, report):
        while missing := [job for job in plan() if not (out / job.name).exists()]:
            ran.append(missing[0])
            write(out, made_up(missing[0]))

    monkeypatch.setattr(engine, "run_missing", fake)
    monkeypatch.setattr(recipe, "DEMO", dataclasses.replace(DEMO, prepare=lambda *_: None))
    return ran


def told_by(text: str, label: str) -> list[list[str]]:
    """Cells of the table rows with a label."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return [row[1:] for row in rows if row[0] == label]


def test_every_arm_tries_every_rate_and_keeps_its_best_for_the_other_seeds(queued, tmp_path):
    study(CONFIG, tmp_path, tmp_path / "work", 2, print)
    rates, seeds = queued[:12], queued[12:]
    assert {(job.arm, job.lr) for job in rates} == {(arm, lr) for arm in LABELS for lr in RATES}
    assert {job.seed for job in rates} == {0}
    assert [job.lr for job in rates] == [lr for lr in RATES for _ in LABELS]
    assert [job.seed for job in seeds] == [1] * 4 + [2] * 4
    assert {(job.arm, job.seed, job.lr) for job in seeds} == {
        (arm, n, lr) for arm, lr in BEST.items() for n in (1, 2)
    }
    assert len(seeds) == 8


def test_tables_hold_rates_choice_arms_and_paired_differences(queued, tmp_path):
    study(CONFIG, tmp_path, tmp_path / "work", 2, print)
    text = tables(CONFIG, tmp_path)
    assert told_by(text, "Dense")[0] == ["4.0000", "4.0030", "4.0070"]
    assert "MoE 0.006, MoE + memory 0.01 (at the edge of the range)" in text
    assert told_by(text, "MoE + one-row table") == [["3.8530", "3.8500", "3.8540"]]
    assert told_by(text, "MoE + one-row table (same sizes, one row of each head in use)") == [
        ["2,573,184", "836,480", "0.006", "3.8500", "3.8600", "3.8700", "3.8600", "2.0"]
    ]
    gap = f"-0.1010 ± {np.std([0, 1e-3, 2e-3], ddof=1) / 3**0.5:.4f} *"
    assert told_by(text, "MoE + memory minus MoE") == [["3", gap, gap, gap]]
    for line in (
        "wiki, 4,000 tokens for each run.",
        "Commit: abc1234.",
        "Missing: nothing.",
        "Machine: A CPU, avx2, one thread, float32.",
    ):
        assert line in text


def test_tables_say_what_is_missing_and_what_is_of_something_else(queued, tmp_path):
    study(CONFIG, tmp_path, tmp_path / "work", 2, print)
    bare = made_up(Job("moe", 1, 6e-3, 4000, "wiki"))
    del bare["loss_by_frequency"]["rare"]
    write(tmp_path, bare, made_up(Job("moe", 7, 6e-3, 4000, "wiki")))
    (tmp_path / "memory-seed2-lr0.01.json").unlink()
    (tmp_path / "dense-seed0-lr0.003.json").unlink()
    text = tables(CONFIG, tmp_path)
    assert (
        "Missing: dense-seed0-lr0.003.json, memory-seed2-lr0.01.json, seeds 1, 2 of Dense." in text
    )
    assert (
        "not of this study: dense-seed1-lr0.003.json, dense-seed2-lr0.003.json, "
        "moe-seed7-lr0.006.json." in text
    )
    pair = told_by(text, "MoE + memory minus MoE")[0]
    assert pair[0] == "2" and pair[1].startswith("-0.1005 ±") and pair[2] != "–" and pair[3] == "–"
    assert told_by(text, "MoE + memory")[1][-3:] == ["–", "–", "2.0"]
    assert not told_by(text, "MoE minus Dense")
    with pytest.raises(ConfigError, match="expected results of a study, found none"):
        tables(CONFIG, tmp_path / "nothing")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("job", asdict(Job("moe", 0, 6e-3, 9999, "wiki")), "'tokens': 9999"),
        ("job", asdict(Job("moe", 0, 6e-3, 4000, "hf:x")), "'data': 'hf:x'"),
        ("machine", "A CPU, avx2, one thread, bfloat16", "one of .*bfloat16"),
        ("machine", None, "expected a result in float32, found one of None"),
    ],
)
def test_results_of_other_settings_are_refused(tmp_path, key, value, told):
    job = Job("moe", 0, 6e-3, 4000, "wiki")
    (tmp_path / job.name).write_text(json.dumps({**made_up(job), key: value}))
    for call in (
        lambda: study(CONFIG, tmp_path, tmp_path / "work", 1, print),
        lambda: tables(CONFIG, tmp_path),
    ):
        with pytest.raises(ConfigError, match=told):
            call()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Forty documents of thirty invented words, enough for a vocabulary of 2048."""
    rng = random.Random(0)
    words = [
        " ".join("".join(rng.choices("abcdefghijkl", k=7)) for _ in range(30)) for _ in range(40)
    ]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\f".join(words))
    return str(path)


def test_a_run_leaves_one_result_and_is_the_same_after_an_interrupt(data, tmp_path, monkeypatch):
    job, work, out = Job("one-row", 3, 6e-3, 5000, data), tmp_path / "work", tmp_path / "out"
    prepare(CorpusConfig(data, seed=3)).save(work / "corpus-3")
    out.mkdir()
    config = StudyConfig((3,), 5000, data)
    line = engine.run_one(job, DEMO, config, out, work)
    assert line.startswith("one-row-seed3-lr0.006.json: validation loss")
    whole = json.loads((out / job.name).read_text())
    assert list(whole) == [
        "job",
        "parameters",
        "validation_loss",
        "validation_stderr",
        "loss_by_frequency",
        "heldout_curve",
        "max_expert_load",
        "minutes",
        "version",
        "commit",
        "machine",
    ]
    assert [tokens for tokens, _ in whole["heldout_curve"]] == [6144]
    # The run is done and its result lost: nothing is trained again, and all that the metrics know
    # is still told.
    (out / job.name).unlink()
    monkeypatch.setattr(recipe.Run, "step", lambda run: pytest.fail("a step of a finished run"))
    engine.run_one(job, DEMO, config, out, work)
    assert json.loads((out / job.name).read_text()) == whole
    assert [path.name for path in out.iterdir()] == [job.name]


def test_a_finished_run_is_skipped(tmp_path):
    config, told = StudyConfig((0,), 4000, "wiki"), []
    write(tmp_path, *map(made_up, config.search().jobs({})))
    study(config, tmp_path, tmp_path / "work", 1, told.append)
    assert not told and not (tmp_path / "work").exists()


def three_jobs(config: StudyConfig, found: object) -> list[Job]:
    return [config.job(arm, 0, 6e-3) for arm in ("memorial", "dense", "moe")]


def test_a_failed_run_is_named_and_stops_the_queue(data, tmp_path):
    prepare(CorpusConfig(data)).save(tmp_path / "corpus-0")
    queue = dataclasses.replace(DEMO, jobs=three_jobs)
    config = StudyConfig((0,), 300, data)
    with pytest.raises(
        EngraphyError, match=r"memorial-seed0-lr0\.006\.json: ConfigError: arm: expected one of"
    ):
        engine.run_study(queue, config, tmp_path / "out", 1, print, work=tmp_path)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (["--seeds", "0"], "seeds: expected one or more"),
        (["--workers", "0"], "workers: expected 1 or more, found 0"),
        (["--tokens", "0"], "tokens: expected 1 or more, found 0"),
    ],
)
def test_what_cannot_be_a_study_is_refused(tmp_path, option, told):
    result = CliRunner().invoke(
        app, ["study", "--out", str(tmp_path / "out"), "--work", str(tmp_path), *option]
    )
    assert result.exit_code == 1 and f"ConfigError: {told}" in result.output
    with pytest.raises(ConfigError, match="none negative"):
        StudyConfig(seeds=(0, -1))


def test_an_interrupted_study_says_how_to_go_on(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "study", interrupted)
    result = CliRunner().invoke(app, ["study", "--out", str(tmp_path)])
    assert result.exit_code == 130 and "interrupted; the same command continues" in result.output
