"""`engraphy finetune`: what it measures, what it leaves alone, what it saves, and what it says to
bad input."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import engraphy
from engraphy.cli.app import app
from engraphy.data.documents import split_documents
from engraphy.errors import ConfigError, DataUnavailable, InputError
from engraphy.eval.losses import mean_with_error
from engraphy.hf import save_pretrained
from engraphy.recipes import finetune as recipe
from engraphy.recipes.finetune import FinetuneConfig, finetune
from engraphy.recipes.progress import ArmProgress
from engraphy.recipes.texts import load_texts
from engraphy.train.dtype import choose_dtype
from tests.tools.tiny_model import lives, write_model

TEXTS = lives(120, seed=1)
ROW = 1024  # all held-out documents in one row, each whole


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "base", max_position_embeddings=ROW)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "lives.txt"
    path.write_text("\f".join(TEXTS))
    return path


@pytest.fixture
def config(base, data, tmp_path):
    return FinetuneConfig(
        str(base),
        str(data),
        tmp_path / "memory",
        tokens=2560,
        batch=4,
        length=64,
        rows_per_head=500,
        lr=1e-2,
        dtype="float32",
    )


def quiet():
    return Console(file=io.StringIO(), width=80)


def alone(model, tokenizer, texts):
    """Nats of each token of texts that are each run by themselves, after a start token."""
    losses = []
    for text in texts:
        ids_T = torch.tensor([tokenizer.eos_token_id, *tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logits_TV = model(ids_T[None]).logits[0]
        losses.append(
            torch.nn.functional.cross_entropy(logits_TV[:-1], ids_T[1:], reduction="none")
        )
    return torch.cat(losses).double().numpy()


def exact_and_error(base, dtype, tokenizer, texts, memory=None):
    """`alone` as float64 computes it from weights of `dtype`, and how far a mean in that dtype may
    lie from it: twice as far as the worst of its tokens does, since documents that share a row are
    rounded otherwise, but not more often."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if memory is not None:
        engraphy.load(model, memory, tokenizer=tokenizer)
    own, exact = alone(model, tokenizer, texts), alone(model.double(), tokenizer, texts)
    return exact, 2 * np.abs(own - exact).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_held_out_losses_are_those_of_each_document_by_itself(config, base, dtype):
    config = dataclasses.replace(config, batch=1, length=ROW, tokens=6 * ROW, dtype=dtype)
    console = quiet()
    found = finetune(config, console)
    assert f"\n{dtype}: given\n" in console.file.getvalue()
    tokenizer = AutoTokenizer.from_pretrained(base)
    _, heldout = split_documents(TEXTS, config.heldout, config.seed)
    stored = getattr(torch, dtype)
    before, before_error = exact_and_error(base, stored, tokenizer, heldout)
    after, after_error = exact_and_error(base, stored, tokenizer, heldout, config.out)
    owners = np.repeat(np.arange(6), [len(ids) for ids in tokenizer(heldout)["input_ids"]])
    assert found.documents == len(heldout) == 6 and found.tokens == len(before)
    assert found.without == pytest.approx(before.mean(), abs=before_error)
    assert found.with_memory == pytest.approx(after.mean(), abs=after_error)
    _, stderr = mean_with_error(after - before, owners)
    assert found.stderr == pytest.approx(stderr, abs=before_error + after_error)
    assert found.with_memory < found.without - 0.02


def test_the_backbone_stays_as_it_is(config, base, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(recipe, "load_model", lambda name, dtype: (model, choose_dtype(dtype)))
    finetune(config, quiet())
    memory = engraphy.detach(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(before) == set(model.state_dict())
    assert memory.blocks[str(memory.layers[0])].value.weight.abs().max() > 0


def test_cost_is_told_before_training_and_the_result_is_in_the_card(config, data):
    console = quiet()
    found = finetune(config, console)
    told = console.file.getvalue()
    memory = engraphy.EngramMemory.load(config.out)
    rows = f"{memory.config.row_count():,} rows"
    places = [
        told.index(part)
        for part in (
            "documents of",
            rows,
            "held-out loss without",
            "training ",
            str(found),
            f"saved: {config.out}",
        )
    ]
    assert places == sorted(places)
    card = (config.out / "README.md").read_text()
    assert str(found) in card and data.name in card and str(data) not in card
    table = memory.config.table_parameters()
    assert f"{table + memory.config.dense_parameters():,} parameters as saved" in card
    assert (
        f"{12 * table / 1e6:,.1f} MB" not in told
        and f"{8 * table / 1e6:,.1f} MB more while it trains" in told
    )


@pytest.mark.slow
def test_the_same_seed_gives_the_same_memory(config, tmp_path):
    rows, dense = [], []
    for seed in (0, 0, 1):
        out = tmp_path / f"memory-{len(rows)}"
        finetune(dataclasses.replace(config, out=out, seed=seed), quiet())
        memory = engraphy.EngramMemory.load(out)
        rows.append(
            np.concatenate(
                [store.gather(np.arange(store.info.rows)) for store in memory.stores.values()]
            )
        )
        dense.append(torch.cat([parameter.detach().flatten() for parameter in memory.parameters()]))
    assert np.array_equal(rows[0], rows[1]) and torch.equal(dense[0], dense[1])
    assert not np.array_equal(rows[0], rows[2]) and not torch.equal(dense[0], dense[2])


@pytest.mark.parametrize("when", ["in the third step", "while it is measured"])
def test_an_interrupt_saves_what_has_been_learned(config, monkeypatch, when, base):
    steps = []

    def step(self, name, told):
        steps.append(told)
        if len(steps) == 3 and when == "in the third step":
            raise KeyboardInterrupt

    losses = recipe._losses

    def measured(model, batches):
        if steps:
            raise KeyboardInterrupt
        return losses(model, batches)

    monkeypatch.setattr(ArmProgress, "step", step)
    monkeypatch.setattr(recipe, "_losses", measured)
    with pytest.raises(KeyboardInterrupt):
        finetune(config, quiet())
    model = AutoModelForCausalLM.from_pretrained(base)
    memory = engraphy.load(model, config.out)
    assert memory.blocks[str(memory.layers[0])].value.weight.abs().max() > 0
    assert "interrupted, not measured" in (config.out / "README.md").read_text()


def test_a_whole_model_is_saved_with_its_memory_and_tokenizer(config, base):
    finetune(dataclasses.replace(config, tokens=256, whole=True), quiet())
    whole = AutoModelForCausalLM.from_pretrained(config.out)
    model = AutoModelForCausalLM.from_pretrained(base)
    engraphy.load(model, config.out / "engraphy")
    ids_BT = AutoTokenizer.from_pretrained(config.out)(TEXTS[0], return_tensors="pt")["input_ids"]
    assert torch.equal(whole(ids_BT).logits, model(ids_BT).logits)
    assert "held-out text" in (config.out / "README.md").read_text()
    with pytest.raises(ConfigError, match="expected a memory alone, found adapters"):
        dataclasses.replace(config, out=config.out / "other", whole=True, lora=2)


def test_rows_are_no_more_than_the_tokens_of_the_text(config):
    finetune(dataclasses.replace(config, rows_per_head=None, tokens=256), quiet())
    spec = engraphy.EngramMemory.load(config.out).config.hash
    assert set(spec.rows_per_head) == {5 * 308}
    few = dataclasses.replace(
        config, rows_per_head=None, tokens=256, heldout=0.95, out=config.out / "few"
    )
    console = quiet()
    finetune(few, console)
    tokens = int(
        re.search(r"documents of ([\d,]+) tokens to train", console.file.getvalue())[1].replace(
            ",", ""
        )
    )
    assert set(engraphy.EngramMemory.load(few.out).config.hash.rows_per_head) == {tokens}


def test_one_document_holds_out_its_end(config, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("\n".join(TEXTS))
    console = quiet()
    found = finetune(dataclasses.replace(config, data=str(path)), console)
    assert (
        "1 document of" in console.file.getvalue() and found.documents == 1 and found.stderr is None
    )
    assert "standard error" not in str(found)


def test_text_comes_from_files_folders_and_lines_of_json(data, tmp_path):
    lines = tmp_path / "lives.jsonl"
    lines.write_text(
        "\n".join(json.dumps({"text": text, "id": 1}) for text in [*TEXTS, "  "]) + "\n\n"
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:03d}.txt").write_text(text)
    for source in (lines, folder, data):
        assert load_texts(str(source)).texts == tuple(TEXTS)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_feeds_alone_divide_lines_of_json(tmp_path, end):
    """str.splitlines cuts at each of these; JSON allows all but the first three unescaped."""
    texts = ["a\vb\fc", "d\x1ce", "f\u0085g", "h\u2028i", "j\u2029k", "l\rm"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_bytes((end.join(lines) + end).encode())
    assert load_texts(str(tmp_path / "a.jsonl")).texts == tuple(texts)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "first"}\n')
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst")
    for name in ("a.jsonl", "a.txt"):
        assert load_texts(str(tmp_path / name)).texts == ("first",)


@pytest.mark.parametrize(
    "name, body, error, match",
    [
        ("gone.txt", None, DataUnavailable, "gone.txt"),
        ("gone.jsonl", None, DataUnavailable, "gone.jsonl: No such file"),
        ("empty.txt", b" \f\n", DataUnavailable, "found no text"),
        ("empty.jsonl", b'{"text": " "}\n', DataUnavailable, "found no text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', InputError, "line 2: expected a JSON object"),
        ("b.jsonl", b'{"txt": "x"}', InputError, "line 1: .* KeyError"),
        ("c.jsonl", b"[1]", InputError, "line 1: .* TypeError"),
        ("d.jsonl", b'{"text": 5}', InputError, "line 1: expected a string .* found int"),
        ("e.jsonl", b'{"text": "\xff"}', InputError, "UTF-8"),
        ("short.txt", b"a few words\fand a few more", InputError, "expected at least 256 tokens"),
        ("short-alone.txt", b"a", InputError, "expected at least 256 tokens"),
    ],
)
def test_text_that_cannot_be_used_is_named(config, tmp_path, name, body, error, match):
    if body is not None:
        (tmp_path / name).write_bytes(body)
    with pytest.raises(error, match=match):
        finetune(dataclasses.replace(config, data=str(tmp_path / name)), quiet())
    assert not config.out.exists()


def test_models_that_cannot_be_used_are_named(config, base, tmp_path):
    def run(model):
        finetune(dataclasses.replace(config, model=str(model)), quiet())

    with pytest.raises(
        DataUnavailable, match="nowhere: expected a model with a tokenizer, as a folder or a name"
    ):
        run(tmp_path / "nowhere")
    mute = shutil.copytree(base, tmp_path / "mute")
    for file in mute.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(DataUnavailable, match="mute: expected a tokenizer beside the model"):
        run(mute)
    hollow = shutil.copytree(base, tmp_path / "hollow")
    (hollow / "model.safetensors").unlink()
    with pytest.raises(DataUnavailable, match="hollow: expected a model, .* OSError"):
        run(hollow)
    torn = shutil.copytree(base, tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:-64])
    with pytest.raises(DataUnavailable, match="torn: expected a model, .* SafetensorError"):
        run(torn)
    unmarked = shutil.copytree(base, tmp_path / "unmarked")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(unmarked)
    with pytest.raises(ConfigError, match="BOS or EOS"):
        run(unmarked)


def test_a_model_that_has_a_memory_is_refused(config, base, tmp_path):
    finetune(config, quiet())
    model = AutoModelForCausalLM.from_pretrained(base)
    engraphy.load(model, config.out)
    save_pretrained(model, tmp_path / "one")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "one")
    with pytest.raises(ConfigError, match="expected a model without a memory"):
        finetune(
            dataclasses.replace(config, model=str(tmp_path / "one"), out=tmp_path / "two"), quiet()
        )


def test_settings_that_cannot_be_meant_are_refused(config, tmp_path, monkeypatch):
    for change in ({"tokens": 0}, {"lr": 0.0}, {"lr": float("nan")}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            dataclasses.replace(config, **change)
    (tmp_path / "taken").write_text("x")
    with pytest.raises(ConfigError, match="taken"):
        dataclasses.replace(config, out=tmp_path / "taken")
    for change, match in (
        ({"layers": (3,)}, "layers: expected 0 to 2"),
        ({"rows_per_head": 0}, "rows_per_head"),
        ({"batch": 0}, "batch"),
        ({"heldout": 1.0}, "heldout"),
    ):
        with pytest.raises(ConfigError, match=match):
            finetune(dataclasses.replace(config, **change), quiet())
    monkeypatch.setattr(recipe, "free_memory", lambda: 10_000)
    with pytest.raises(ConfigError, match="of RAM"):
        finetune(config, quiet())
    assert not config.out.exists()


def test_the_command_runs_and_takes_a_free_folder(base, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [
        "finetune",
        str(base),
        "--data",
        str(data),
        "--tokens",
        "512",
        "--length",
        "64",
        "--rows-per-head",
        "99",
        "--layers",
        "0,2",
    ]
    for number in (1, 2):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        assert engraphy.EngramMemory.load(tmp_path / "runs" / f"finetune-{number}").layers == (0, 2)
        assert f"saved: runs/finetune-{number}" in result.output and "with it" in result.output


def test_the_command_says_in_one_line_what_is_wrong(base, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for more, match in (
        (["--layers", "1,x"], "ConfigError: layers: expected numbers divided by commas"),
        (["--length", "100000"], "InputError"),
        (["--tokens", "0"], "ConfigError: tokens"),
    ):
        result = CliRunner().invoke(app, ["finetune", str(base), "--data", str(data), *more])
        assert result.exit_code == 1 and match in result.output and "Traceback" not in result.output
    monkeypatch.setattr(ArmProgress, "step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    result = CliRunner().invoke(app, ["finetune", str(base), "--data", str(data), "--length", "64"])
    assert (
        result.exit_code == 130
        and "saved: runs/finetune-1" in result.output
        and "interrupted" in result.output
    )


def test_without_transformers_the_command_says_what_to_install(monkeypatch):
    monkeypatch.delattr(engraphy.recipes, "finetune")
    for name in [
        name
        for name in sys.modules
        if name.startswith(("engraphy.hf", "engraphy.recipes.finetune"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = CliRunner().invoke(app, ["finetune", "x", "--data", "y"])
    assert result.exit_code == 1 and 'pip install "engraphy[hf]"' in result.output
