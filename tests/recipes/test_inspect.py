"""`engraphy model inspect`: what it says is what a forward did, for each kind of model."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

import engraphy
from engraphy import EngramConfig, Trace, VocabMap
from engraphy.cli.app import app
from engraphy.data.corpus import CorpusConfig, prepare
from engraphy.data.tokens import train_tokenizer
from engraphy.errors import ConfigError
from engraphy.hf.qwen4 import write_table
from engraphy.lm.loop import Run, TrainConfig, train
from engraphy.recipes.inspect import InspectConfig, inspect, show
from engraphy.recipes.studies.demo_arms import ArmConfig, build
from tests.tools import qwen4_models
from tests.tools.hf_models import wake
from tests.tools.tiny_model import lives, write_model

TEXT = "Kurt Gödel was born in Vienna"


@pytest.fixture(scope="module")
def attached(tmp_path_factory):
    """A model, its memory in layers 1 and 2, and a text of the same words, in folders."""
    folder = tmp_path_factory.mktemp("attached")
    base = write_model(folder / "base", initializer_range=1.0)
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    vocab = VocabMap.from_tokenizer(tokenizer, raw_size=model.config.vocab_size)
    config = EngramConfig.for_model(
        model.config, layers=(1, 2), heads=2, rows_per_head=53, vocab_size=len(vocab)
    )
    wake(engraphy.attach(model, config, vocab)).save(folder / "memory")
    (folder / "corpus.txt").write_text("\f".join(lives(60)))
    return folder


@pytest.fixture(scope="module")
def found(attached):
    config = InspectConfig(
        str(attached / "base"), str(attached / "memory"), TEXT, str(attached / "corpus.txt")
    )
    return inspect(config)


def test_gates_rows_and_predictions_are_those_of_a_forward(attached, found):
    tokenizer = AutoTokenizer.from_pretrained(attached / "base")
    model = AutoModelForCausalLM.from_pretrained(attached / "base").eval()
    memory = engraphy.load(model, attached / "memory", tokenizer=tokenizer)
    ids_BT = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    trace = Trace()
    with torch.no_grad():
        on = model(ids_BT, engraphy_trace=trace, use_cache=False).logits[0].double().softmax(-1)
        with memory.disabled():
            off = model(ids_BT, use_cache=False).logits[0].double().softmax(-1)
    assert [token.id for token in found.tokens] == ids_BT[0].tolist()
    assert "".join(token.text for token in found.tokens) == TEXT
    for t, token in enumerate(found.tokens):
        for view in token.memory:
            assert list(view.gates) == trace.gates[view.layer][0, t].tolist()
            rows = trace.row_ids[view.layer][0, t].tolist()
            assert [row.row for row in view.rows] == rows
        for probabilities, prediction in ((on, token.on), (off, token.off)):
            best = prediction.candidates[0]
            assert best.probability == pytest.approx(float(probabilities[t].max()))
            assert best.text == tokenizer.decode([int(probabilities[t].argmax())])
            if t + 1 < len(found.tokens):
                target = probabilities[t, found.tokens[t + 1].id]
                assert prediction.loss == pytest.approx(-float(target.log()))
        assert token.lens_on[-1].kl == token.lens_off[-1].kl == 0
        assert token.lens_on[-1].top == token.on.candidates[0].text
    assert found.before_memory == (True, False, False) and found.tokens[-1].on.loss is None


def test_ngrams_are_counted_in_the_text_and_sharers_are_other_ngrams_of_it(attached, found):
    tokenizer = AutoTokenizer.from_pretrained(attached / "base")
    vocab = VocabMap.from_tokenizer(tokenizer)
    documents = (attached / "corpus.txt").read_text().split("\f")
    ids = [vocab.table[tokenizer(text)["input_ids"]].tolist() for text in documents]
    own = vocab.table[[token.id for token in found.tokens]].tolist()
    for t in range(1, len(own)):
        pair = own[t - 1 : t + 1]
        count = sum(one[at : at + 2] == pair for one in ids for at in range(len(one) - 1))
        ngram = found.tokens[t].ngrams[0]
        assert (ngram.order, ngram.count) == (2, count)
    rows = [row for token in found.tokens for view in token.memory for row in view.rows]
    assert any(row.frequent for row in rows)
    for row in rows:
        assert row.others >= len(row.frequent)
        assert all(one.count >= 2 for one in row.frequent)


def test_the_terminal_shows_each_part(found):
    plain = Console(file=io.StringIO(), width=160)
    show(found, plain)
    told = plain.file.getvalue()
    for part in (
        "LogitLens",
        "mean without",
        "towards",
        "away from",
        "2-gram",
        "others",
        "with   ",
    ):
        assert part in told, part
    row = found.tokens[1].memory[0].rows[0].row
    assert f"row {row:,}" in told
    coloured = Console(file=io.StringIO(), width=160, force_terminal=True, color_system="truecolor")
    show(found, coloured)
    assert coloured.file.getvalue().count("layer 1  gate") == 1


def test_the_command_prints_json_and_writes_a_page(attached, tmp_path):
    command = ["model", "inspect", str(attached / "base"), str(attached / "memory")]
    command += ["--text", TEXT]
    told = CliRunner().invoke(app, [*command, "--json"])
    assert told.exit_code == 0, told.output
    report = json.loads(told.stdout)
    assert report["format"] == "engraphy-inspection-1" and report["layers"] == [1, 2]
    assert report["tokens"][0]["ngrams"][0]["count"] is None
    page = tmp_path / "page.html"
    written = CliRunner().invoke(app, [*command, "--page", str(page)])
    assert written.exit_code == 0 and "page.html" in written.stderr
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_the_memory_arm_of_a_demo_run_is_opened_with_its_training_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\f".join(lives(120)))
    corpus = prepare(CorpusConfig(str(text), vocab_size=300, batch=2, length=32))
    corpus.save(tmp_path / "run" / "corpus")
    config = ArmConfig(TrainConfig(tokens=128))
    model, _ = build("memory", corpus, config)
    run = Run(model, corpus.batches(), config.train, config.origin("memory"))
    train(run, tmp_path / "run" / "memory")
    found = inspect(InspectConfig(str(tmp_path / "run"), None, TEXT))
    assert found.tokens[0].text == "<|endoftext|>"
    assert "".join(token.text for token in found.tokens[1:]) == TEXT
    assert found.corpus == "its training text"
    assert found.layers == (1,) and found.before_memory == (True, False, False)
    assert found.tokens[-1].ngrams[0].count > 0
    with pytest.raises(ConfigError, match="expected none"):
        inspect(InspectConfig(str(tmp_path / "run"), "memory", TEXT))


@pytest.fixture(scope="module")
def qwen4(tmp_path_factory):
    """A tiny Qwen4-Exp with a tokenizer, and its table in a folder."""
    folder = tmp_path_factory.mktemp("qwen4")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(lives(200), 300), eos_token="<|endoftext|>"
    )
    model = qwen4_models.make(vocab_size=300, eos_token_id=0, pad_token_id=1)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_table(model, folder / "table")
    return folder


def test_qwen4_gives_the_same_with_its_own_table_and_with_a_served_one(qwen4):
    own, served = (
        inspect(InspectConfig(str(qwen4 / "model"), table, TEXT))
        for table in (None, str(qwen4 / "table"))
    )
    assert own.tokens == served.tokens
    assert own.layers == (1,) and len(own.tokens[0].memory[0].gates) == 4
    assert own.tokens[3].on != own.tokens[3].off


def test_the_gates_of_qwen4_are_those_of_its_formula():
    from engraphy.recipes.inspected import transformers_subject

    model = qwen4_models.make()
    subject = transformers_subject(model)
    ids_BT = torch.tensor([[9, 12, 60, 4, 9, 12, 33]])
    _, trace = subject.read(ids_BT)
    (layer,) = subject.layers
    ple = model.model.layers[layer].ple
    with torch.no_grad():
        rows = ple.ple_embedding(ids_BT, None)
        shape = (ple.hc_count, ple.hidden_size)
        key = ple.norm_key(ple.key_proj(rows)).unflatten(-1, shape)
        query = ple.norm_query(trace.inputs[layer].flatten(-2)).unflatten(-1, shape)
        score = (key * query).sum(-1) / ple.hidden_size**0.5
        gate_BTS = torch.sigmoid(score.abs().clamp_min(1e-6).sqrt() * score.sign())
    torch.testing.assert_close(trace.gates[layer], gate_BTS, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_inspected_is_refused(attached):
    with pytest.raises(ConfigError, match="text: expected at least one word"):
        InspectConfig("a", None, " \n")
    with pytest.raises(ConfigError, match="expected a model with a memory"):
        inspect(InspectConfig(str(attached / "base"), None, TEXT))
