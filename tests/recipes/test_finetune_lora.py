"""`engraphy finetune --lora`: memory and adapters learn together, are saved together, and meet
again."""

from __future__ import annotations

import dataclasses
import io
import sys
import warnings

import peft
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import engraphy
from engraphy.cli.app import app
from engraphy.errors import ConfigError, DataUnavailable
from engraphy.hf.hub import find_memory
from engraphy.recipes import finetune as recipe
from engraphy.recipes.finetune import FinetuneConfig, finetune
from engraphy.recipes.generate import GenerateConfig, generate
from engraphy.recipes.progress import ArmProgress
from tests.tools.tiny_model import lives, write_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "lives.txt"
    path.write_text("\f".join(lives(120, seed=1)))
    return path


def bare(base):
    """The model as the recipes load it, in the dtype that this machine is fast at."""
    loaded = recipe.load_model(str(base))
    return loaded[0] if isinstance(loaded, tuple) else loaded


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
        lora=4,
    )


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory):
    """(folder, what was measured, what was printed)"""
    out = tmp_path_factory.mktemp("trained") / "memory"
    console = quiet()
    found = finetune(
        FinetuneConfig(
            str(base), str(data), out, tokens=2560, batch=4, length=64, rows_per_head=500, lora=4
        ),
        console,
    )
    return out, found, console.file.getvalue()


def quiet():
    return Console(file=io.StringIO(), width=80)


def test_both_learn_and_the_folder_holds_both(trained):
    out, found, told = trained
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    assert adapter and all(
        value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name
    )
    assert not [name for name in adapter if "engraphy" in name]
    memory = engraphy.EngramMemory.load(out)
    assert all(block.value.weight.abs().max() > 0 for block in memory.blocks.values())
    assert not [name for name in load_file(out / "memory.safetensors") if "lora" in name]
    count = sum(value.numel() for value in adapter.values())
    assert f"LoRA of rank 4: {count:,} parameters" in told and str(found) in told
    assert f"saved: {out}" in told and [path.name for path in out.parent.iterdir()] == ["memory"]


def test_the_loss_without_is_the_bare_models(config, trained):
    alone = finetune(dataclasses.replace(config, lora=None), quiet())
    _, both, _ = trained
    assert both.without == alone.without and both.tokens == alone.tokens
    assert both.with_memory < both.without - 0.02 and both.with_memory != alone.with_memory
    assert "nats a token bare" in str(both) and "with memory and LoRA" in str(both)
    assert "without the memory" in str(alone)


def test_the_memory_begins_as_it_does_without_adapters(config, monkeypatch, tmp_path):
    begun = []
    monkeypatch.setattr(
        recipe,
        "_train",
        lambda model, memory, *rest: begun.append(
            {name: value.clone() for name, value in memory.state_dict().items()}
        ),
    )
    for number, lora in enumerate((None, 4)):
        finetune(dataclasses.replace(config, lora=lora, out=tmp_path / str(number)), quiet())
    assert all(torch.equal(value, begun[1][name]) for name, value in begun[0].items())


def test_generate_loads_the_adapters_with_the_memory(trained, base):
    out, *_ = trained
    prompt = "Ada Lovelace was"
    found = generate(GenerateConfig(str(base), str(out), prompt, tokens=8))
    adapted = peft.PeftModel.from_pretrained(bare(base), out / "adapter").eval()
    engraphy.load(adapted, out)
    ids_BT = AutoTokenizer.from_pretrained(base)(prompt, return_tensors="pt")["input_ids"]
    expected = adapted.generate(input_ids=ids_BT, max_new_tokens=8, do_sample=False)
    assert [token.id for token in found.tokens] == expected[0].tolist()
    ran = CliRunner().invoke(
        app, ["generate", str(base), str(out), prompt, "--tokens", "8", "--show-gates"]
    )
    assert ran.exit_code == 0, ran.output


def test_the_losses_that_were_measured_are_those_of_what_was_saved(config, base, trained):
    out, found, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(base)
    _, unseen, _ = recipe._read(config, tokenizer, quiet())
    model = peft.PeftModel.from_pretrained(bare(base), out / "adapter").eval()
    engraphy.load(model, out)
    losses, _ = recipe._losses(model, unseen)
    assert losses.mean() == pytest.approx(found.with_memory, abs=1e-6)


def test_a_memory_whose_adapters_are_missing_says_so(trained, base):
    out, *_ = trained
    with pytest.warns(
        UserWarning,
        match="trained together with the adapters in adapter/.*PeftModel.from_pretrained",
    ):
        engraphy.load(AutoModelForCausalLM.from_pretrained(base), out)
    adapted = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), out / "adapter"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engraphy.load(adapted, out)


def test_the_code_on_the_card_loads_both(trained, base, monkeypatch):
    out, *_ = trained
    (code,) = (out / "README.md").read_text().split("```python\n")[1:]
    monkeypatch.chdir(out.parent)
    names: dict = {}
    exec(code.split("```")[0].replace('"base"', repr(str(base))), names)
    assert isinstance(names["model"], peft.PeftModel) and names["memory"].layers


def test_the_adapters_are_fetched_with_the_memory_from_the_hub(trained, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, *, allow_patterns, **_: asked.extend(allow_patterns) or str(trained[0]),
    )
    assert find_memory("someone/memory") == trained[0] and "adapter/*" in asked


def test_an_interrupt_saves_both(config, monkeypatch):
    steps = []

    def step(self, name, told):
        steps.append(told)
        if len(steps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(ArmProgress, "step", step)
    with pytest.raises(KeyboardInterrupt):
        finetune(config, quiet())
    assert (config.out / "adapter" / "adapter_model.safetensors").exists()
    assert "interrupted, not measured" in (config.out / "README.md").read_text()


def test_a_save_that_fails_leaves_neither_half(config, monkeypatch):
    monkeypatch.setattr(peft.PeftModel, "save_pretrained", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetune(config, quiet())
    assert not config.out.exists() and not list(config.out.parent.glob(".memory*"))


def test_the_command_takes_a_rank_and_refuses_what_is_none(
    config, base, data, tmp_path, monkeypatch
):
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
    ]
    ran = CliRunner().invoke(app, [*command, "--lora", "2"])
    assert ran.exit_code == 0, ran.output
    assert (tmp_path / "runs" / "finetune-1" / "adapter" / "adapter_config.json").exists()
    for rank in (0, -1):
        with pytest.raises(ConfigError, match="lora: expected a rank of 1 or more"):
            dataclasses.replace(config, lora=rank)


def test_without_peft_the_line_to_install_it_is_told_before_anything_is_trained(
    config, trained, base, monkeypatch
):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(recipe, "_losses", lambda *args: 1 / 0)
    with pytest.raises(
        DataUnavailable, match='LoRA adapters: expected the package peft.*pip install "peft'
    ):
        finetune(config, quiet())
    assert not config.out.exists()
    with pytest.raises(
        DataUnavailable, match='adapter: expected the package peft.*pip install "peft'
    ):
        generate(GenerateConfig(str(base), str(trained[0]), "Ada"))
