"""Recipes: the demo from text to report, through the command line, on a text small enough for a
test."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from engraphy.cli.app import app
from engraphy.cli.arguments import run_folder
from engraphy.data.corpus import Corpus, CorpusConfig, prepare
from engraphy.errors import ConfigError, EngraphyError
from engraphy.eval import losses as measure
from engraphy.eval.bands import NgramCounts
from engraphy.lm.loop import Run, TrainConfig
from engraphy.recipes.demo import DemoConfig, _table_on_disk, headline
from engraphy.recipes.progress import curves
from engraphy.recipes.studies import demo_arms as arms
from engraphy.recipes.studies.demo_arms import LABELS, ArmConfig, build
from engraphy.system import cpu, provenance

NAMES = [
    "Ada Lovelace",
    "Alan Turing",
    "Grace Hopper",
    "Emmy Noether",
    "Kurt Goedel",
    "Claude Shannon",
]
PLACES = ["London", "Princeton", "Vienna", "New York", "Erlangen", "Cambridge", "Zurich"]
WORK = [
    "wrote about engines",
    "studied machines that compute",
    "found a theorem on symmetry",
    "measured information",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Three hundred short biographies, divided by form feeds."""
    rng = random.Random(0)
    documents = [
        f"{rng.choice(NAMES)} was born in {rng.choice(PLACES)} in {rng.randint(1780, 1920)}, "
        f"{rng.choice(WORK)}, and later {rng.choice(WORK)} in {rng.choice(PLACES)}."
        for _ in range(300)
    ]
    path = tmp_path_factory.mktemp("text") / "lives.txt"
    path.write_text("\f".join(documents))
    return path


@pytest.fixture(scope="module")
def corpus(text) -> Corpus:
    return prepare(CorpusConfig(str(text), vocab_size=300, batch=4, length=32))


def test_a_corpus_on_disk_is_the_same(corpus, tmp_path):
    corpus.save(tmp_path)
    again = Corpus.load(tmp_path, corpus.config)
    assert again.batches().digest == corpus.batches().digest
    assert again.vocab.digest == corpus.vocab.digest and again.licence == corpus.licence
    with pytest.raises(ConfigError, match="choose another folder"):
        Corpus.load(tmp_path, dataclasses.replace(corpus.config, seed=5))


@pytest.mark.parametrize(
    "body", [None, "", "{", "[]", '{"config": {}, "name": "x"}', '{"config": {"dats": "x"}}']
)
def test_a_missing_or_damaged_corpus_is_named(corpus, tmp_path, body):
    corpus.save(tmp_path)
    (tmp_path / "corpus.json").unlink()
    if body is not None:
        (tmp_path / "corpus.json").write_text(body)
    with pytest.raises(
        ConfigError, match=r"corpus\.json: expected the description of a prepared corpus, found \w+"
    ):
        Corpus.load(tmp_path)


def test_seeds_below_zero_are_refused():
    for make in (lambda: CorpusConfig(seed=-1), lambda: ArmConfig(TrainConfig(100), seed=-1)):
        with pytest.raises(ConfigError, match="seed: expected 0 or more, found -1"):
            make()


def test_arms_have_equal_parameters_and_weights_of_their_seed(corpus):
    config = ArmConfig(TrainConfig(100))
    arms = {name: build(name, corpus, config)[1].parameters for name in LABELS}
    for name in LABELS:
        assert arms[name].activated == pytest.approx(arms["moe"].activated, rel=0.01)
    assert arms["memory"].total == pytest.approx(arms["moe"].total, rel=0.01)
    one, again = (build("memory", corpus, config)[0].state_dict() for _ in range(2))
    other = build("memory", corpus, dataclasses.replace(config, seed=1))[0].state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["embed.weight"], other["embed.weight"])
    with pytest.raises(ConfigError, match="arm: expected one of"):
        build("memorial", corpus, config)


def test_the_one_row_control_reads_one_row_per_head(corpus):
    model, _ = build("one-row", corpus, ArmConfig(TrainConfig(100)))
    ids_BT, _, starts_BT = corpus.batches()[0]
    rows = model.memory.addresser.all_rows(ids_BT.numpy(), starts=starts_BT.numpy())
    assert len(np.unique(rows)) == model.memory.config.hash.columns


def test_standard_errors_take_documents_as_units():
    documents = np.array([0, 0, 0, 1, 1, 1])
    mean, error = measure.mean_with_error(np.array([1.0, 1, 1, 3, 3, 3]), documents)
    assert mean == 2.0 and error == pytest.approx(1.0)  # two units at 1 and 3
    assert measure.mean_with_error(np.array([1.0, 3, 2, 1, 3, 2]), documents)[1] == pytest.approx(
        0.0
    )


def test_one_document_has_no_standard_error():
    values, documents = np.array([1.0, 2.0, 6.0]), np.array([4, 4, 4])
    assert measure.mean_with_error(values, documents) == (3.0, None)
    assert measure.named_mean(values, documents, "all", "all_stderr") == {"all": 3.0}
    assert "no standard error" in headline(
        {"differences": {"memory - moe": {"all": 0.1}}, "logits_equal": True}
    )


def test_paired_differences_add_up_over_buckets(corpus):
    config = ArmConfig(TrainConfig(1000))
    counts = NgramCounts(corpus.training, corpus.end_id, corpus.vocab_size)
    batches = corpus.heldout_batches()
    one, other = (
        measure.Losses(build(name, corpus, config)[0], batches, counts, "float32")
        for name in ("moe", "memory")
    )
    assert len(np.unique(one.documents)) == len(corpus.heldout)
    gap, table = measure.difference(one, other), measure.frequency_table(one)
    assert sum(row["share"] for row in table) == pytest.approx(1.0)
    assert sum(row["tokens"] for row in table) == len(one.losses)
    assert table[-1]["bucket"] == measure.START and table[-1]["low"] is None
    assert table[-1]["tokens"] == sum(
        int(starts_BT[targets_BT >= 0].sum()) for _, targets_BT, starts_BT in batches
    )
    assert sum(row["share"] * gap[row["bucket"]] for row in table) == pytest.approx(
        gap["all"], rel=1e-9
    )
    assert gap["all"] == pytest.approx(float(one.losses.mean() - other.losses.mean()))
    assert set(one.by_bucket()) == {row["bucket"] for row in table}


def test_curves_come_from_every_step_of_a_run(tmp_path):
    speeds, loads = (100.0, 400.0, 200.0, 50.0), (9.0, 8.0, 1.5, None)
    lines = [
        {
            "step": step,
            "tokens": 200 * step,
            "loss": 5.0 - step,
            "heldout": 4.0 if step == 4 else None,
            "tokens_per_second": speed,
            "max_load": load,
        }
        for step, (speed, load) in enumerate(zip(speeds, loads, strict=True), start=1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert curves(tmp_path) == {
        "curve": [[200, 4.0], [400, 3.0], [600, 2.0], [800, 1.0]],
        "heldout_curve": [[800, 4.0]],
        "max_expert_load": 1.5,
        "seconds": 2.0 + 0.5 + 1.0 + 4.0,
        "tokens_per_second": 150.0,
    }


def test_a_table_left_by_an_earlier_training_is_replaced(corpus, tmp_path):
    for seed in (0, 1):
        model, _ = build("memory", corpus, ArmConfig(TrainConfig(100), seed=seed))
        assert _table_on_disk(model, corpus, tmp_path / "engram")["logits_equal"] is True
    assert [path.name for path in tmp_path.iterdir()] == ["engram"]


@pytest.fixture
def forked(monkeypatch):
    """Arms are forks of this process: new ones, as the demo starts them, import torch again."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)


def killed_or_busy(name: str, *rest) -> None:
    """Stands for an arm's process: "moe" is killed, the others go on for half a minute."""
    if name == "moe":
        os.kill(os.getpid(), signal.SIGKILL)
    for step in range(600):
        rest[-1].put(
            (
                name,
                "step",
                {
                    "step": step,
                    "steps": 600,
                    "tokens": step,
                    "loss": 1.0,
                    "norm": 1.0,
                    "tokens_per_second": 1.0,
                },
            )
        )
        time.sleep(0.05)
    rest[-1].put((name, "done", None))


def test_a_killed_arm_is_named_while_the_others_go_on(tmp_path, monkeypatch, forked):
    monkeypatch.setattr(arms, "_work", killed_or_busy)
    steps = []
    with pytest.raises(EngraphyError, match="arm moe: its process ended with exit code -9"):
        arms.train_arms(
            ("dense", "moe"),
            tmp_path,
            ArmConfig(TrainConfig(100)),
            tmp_path,
            False,
            lambda name, told: steps.append(name),
        )
    assert "moe" not in steps and len(steps) < 600


def tell_threads(name, *rest):
    told, threads = rest[-1], rest[-2]
    told.put((name, "failed", f"{threads} threads"))


@pytest.mark.parametrize("given, used", [(None, max(1, len(os.sched_getaffinity(0)) // 2)), (5, 5)])
def test_each_arm_has_the_threads_that_are_given_or_its_share_of_the_cpus(
    given, used, tmp_path, monkeypatch, forked
):
    monkeypatch.setattr(arms, "_work", tell_threads)
    with pytest.raises(EngraphyError, match=f"{used} threads"):
        arms.train_arms(
            ("dense", "moe"),
            tmp_path,
            ArmConfig(TrainConfig(100)),
            tmp_path,
            False,
            lambda name, told: None,
            given,
        )
    with pytest.raises(ConfigError, match="threads: expected 1 or more, found 0"):
        DemoConfig(tmp_path, threads=0)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_of_this_package_and_says_when_files_differ(monkeypatch, tmp_path):
    recipes = tmp_path / "engraphy" / "recipes"
    recipes.mkdir(parents=True)
    (recipes / "__init__.py").touch()
    monkeypatch.setattr(provenance, "__file__", str(recipes / "provenance.py"))

    def git(*arguments: str) -> str:
        command = [
            "git",
            "-C",
            str(tmp_path),
            "-c",
            "user.name=A",
            "-c",
            "user.email=a@b.c",
            *arguments,
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    commit = provenance.commit.__wrapped__  # not the cached one
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "without the package")
    assert commit() is None
    git("add", ".")
    git("commit", "--quiet", "--message", "with it")
    assert commit() == git("rev-parse", "--short", "HEAD")
    (recipes / "__init__.py").write_text("changed = True")
    assert commit() == git("rev-parse", "--short", "HEAD") + "-dirty"


def test_an_arm_learns(corpus):
    model, _ = build("memory", corpus, ArmConfig(TrainConfig(10_000)))
    run = Run(model, corpus.batches(), TrainConfig(128 * 30))
    losses = [run.step()[0] for _ in range(30)]
    assert np.mean(losses[-3:]) < 0.8 * losses[0]


@pytest.mark.slow
def test_the_demo_runs_from_text_to_report(text, tmp_path):
    command = [
        "demo",
        "--data",
        str(text),
        "--out",
        str(tmp_path / "run"),
        "--tokens",
        "4000",
        "--vocab",
        "300",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["logits_equal"] is True and "equal bit for bit" in result.output
    assert [arm["name"] for arm in report["arms"]] == ["dense", "moe", "memory"]
    assert "…" not in result.output and "DtypeChoice" not in result.output
    assert all(f"{arm['parameters']['total']:,}" in result.output for arm in report["arms"])
    for arm in report["arms"]:
        assert arm["heldout_curve"][-1][1] == pytest.approx(arm["validation_loss"], rel=1e-4)
        assert arm["tokens_per_second"] > 0 and len(arm["curve"]) == report["settings"]["steps"]
        assert arm["seconds"] > 0
        assert set(arm["loss_by_frequency"]) == {row["bucket"] for row in report["frequency"]}
    assert (
        "tokens/s: whole steps, while the arms share" in result.output
        and report["machine"]["cpu"] == cpu.name()
    )
    for arm in report["arms"]:
        for told in arm["continuations"]:
            assert told["prompt"]
    gap = report["differences"]["memory - moe"]["all"]
    losses = {arm["name"]: arm["validation_loss"] for arm in report["arms"]}
    assert gap == pytest.approx(losses["memory"] - losses["moe"], abs=1e-9)
    assert len(report["gates"]["sentences"][0]["tokens"]) == len(
        report["gates"]["sentences"][0]["gates"]
    )
    assert f"{abs(gap):.3f}" in (tmp_path / "run" / "report.html").read_text()
    again = CliRunner().invoke(app, command)
    assert (
        again.exit_code == 1
        and "resume that run, or choose another folder" in again.output.replace("\n", " ")
    )


def test_errors_are_one_line_for_the_user(tmp_path):
    result = CliRunner().invoke(
        app, ["demo", "--data", str(tmp_path / "nothing"), "--out", str(tmp_path / "run")]
    )
    assert (
        result.exit_code == 1
        and "DataUnavailable" in result.output
        and "Traceback" not in result.output
    )
    result = CliRunner().invoke(app, ["demo", "--seed", "-1", "--out", str(tmp_path / "run")])
    assert result.exit_code == 1 and "ConfigError: seed: expected 0 or more" in result.output


def test_a_demo_without_a_folder_takes_a_free_one_and_resumes_the_newest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_folder("demo", False) == Path("runs/demo-1") == run_folder("demo", True)
    for name in ("demo-2", "demo-11", "demo-old"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert run_folder("demo", False) == Path("runs/demo-12") and run_folder("demo", True) == Path(
        "runs/demo-11"
    )
