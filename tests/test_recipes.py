"""Recipes: the demo from text to report, through the command line, on a text small enough for a test."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from engraphy.cli import app
from engraphy.errors import ConfigError
from engraphy.lm import NgramCounts
from engraphy.lm.loop import Run, TrainConfig
from engraphy.recipes import measure
from engraphy.recipes.arms import LABELS, ArmConfig, build
from engraphy.recipes.corpus import Corpus, CorpusConfig, prepare

NAMES = ["Ada Lovelace", "Alan Turing", "Grace Hopper", "Emmy Noether", "Kurt Goedel", "Claude Shannon"]
PLACES = ["London", "Princeton", "Vienna", "New York", "Erlangen", "Cambridge", "Zurich"]
WORK = ["wrote about engines", "studied machines that compute", "found a theorem on symmetry", "measured information"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Three hundred short biographies, divided by form feeds."""
    rng = random.Random(0)
    documents = [f"{rng.choice(NAMES)} was born in {rng.choice(PLACES)} in {rng.randint(1780, 1920)}, "
                 f"{rng.choice(WORK)}, and later {rng.choice(WORK)} in {rng.choice(PLACES)}." for _ in range(300)]
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
    assert mean == 2.0 and error == pytest.approx(1.0)                                    # two units at 1 and 3
    assert measure.mean_with_error(np.array([1.0, 3, 2, 1, 3, 2]), documents)[1] == pytest.approx(0.0)


def test_paired_differences_add_up_over_buckets(corpus):
    config = ArmConfig(TrainConfig(1000))
    counts = NgramCounts(corpus.training, corpus.end_id, corpus.vocab_size)
    batches = corpus.heldout_batches()
    one, other = (measure.Losses(build(name, corpus, config)[0], batches, counts, "float32")
                  for name in ("moe", "memory"))
    assert len(np.unique(one.documents)) == len(corpus.heldout)
    gap, table = measure.difference(one, other), measure.frequency_table(one)
    assert sum(row["share"] for row in table) == pytest.approx(1.0)
    inside = one.counts >= 0
    total = sum(row["share"] * gap[row["bucket"]] for row in table)
    assert total == pytest.approx(float((one.losses - other.losses)[inside].mean()))
    assert gap["all"] == pytest.approx(float(one.losses.mean() - other.losses.mean()))


def test_measuring_speed_leaves_no_gradients(corpus):
    model, _ = build("memory", corpus, ArmConfig(TrainConfig(100)))
    speed = measure.tokens_per_second({"memory": model}, corpus.batches(), "float32", rounds=1)
    assert speed["memory"] > 0 and model.memory.row_grads == []
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_an_arm_learns(corpus):
    model, _ = build("memory", corpus, ArmConfig(TrainConfig(10_000)))
    run = Run(model, corpus.batches(), TrainConfig(128 * 30))
    losses = [run.step()[0] for _ in range(30)]
    assert np.mean(losses[-3:]) < 0.8 * losses[0]


def test_the_demo_runs_from_text_to_report(text, tmp_path):
    command = ["demo", "--data", str(text), "--out", str(tmp_path / "run"), "--tokens", "4000", "--vocab", "300"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["logits_equal"] is True and "equal bit for bit" in result.output
    assert [arm["name"] for arm in report["arms"]] == ["dense", "moe", "memory"]
    for arm in report["arms"]:
        assert arm["heldout_curve"][-1][1] == pytest.approx(arm["validation_loss"], rel=1e-4)
        assert arm["tokens_per_second"] > 0 and len(arm["curve"]) == report["settings"]["steps"]
        for told in arm["continuations"]:
            assert told["prompt"]
    gap = report["differences"]["memory - moe"]["all"]
    losses = {arm["name"]: arm["validation_loss"] for arm in report["arms"]}
    assert gap == pytest.approx(losses["memory"] - losses["moe"], abs=1e-9)
    assert len(report["gates"]["sentences"][0]["tokens"]) == len(report["gates"]["sentences"][0]["gates"])
    assert f"{abs(gap):.3f}" in (tmp_path / "run" / "report.html").read_text()
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 1 and "resume that run, or choose another folder" in again.output.replace("\n", " ")


def test_errors_are_one_line_for_the_user(tmp_path):
    result = CliRunner().invoke(app, ["demo", "--data", str(tmp_path / "nothing"), "--out", str(tmp_path / "run")])
    assert result.exit_code == 1 and "DataUnavailable" in result.output and "Traceback" not in result.output
