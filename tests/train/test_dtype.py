"""A command computes in the dtype it is given, else in the machine's, and says which and why."""

from __future__ import annotations

import json

import pytest
import torch

from engraphy.errors import ConfigError
from engraphy.recipes.demo import DemoConfig
from engraphy.recipes.finetune import FinetuneConfig
from engraphy.recipes.generate import GenerateConfig
from engraphy.system import cpu as cpu_module
from engraphy.train.dtype import DTYPES, choose_dtype

SLOW, FAST = "avx2 fma", "avx2 fma avx512f avx512_bf16"


@pytest.fixture
def cpu(monkeypatch):
    """Sets the flags of the CPU that is found, whatever this machine's are."""
    monkeypatch.delenv("ENGRAPHY_DTYPE", raising=False)
    return lambda flags: monkeypatch.setattr(cpu_module, "_cpuinfo", lambda: {"flags": flags})


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (SLOW, "float32: this CPU has no instructions for bfloat16 matmuls"),
        ("", "float32: this CPU has no instructions for bfloat16 matmuls"),
        (FAST, "bfloat16: this CPU has AVX-512 BF16"),
        (f"{FAST} amx_tile amx_bf16", "bfloat16: this CPU has AMX"),
        ("asimd bf16", "bfloat16: this CPU has Arm's bfloat16 instructions"),
    ],
)
def test_the_machine_chooses_by_its_instructions_and_the_reason_names_them(cpu, flags, expected):
    cpu(flags)
    assert str(choose_dtype()) == expected
    assert choose_dtype(device="cuda").reason == "on a GPU"


@pytest.mark.parametrize("flags", [SLOW, FAST])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dtype_that_is_given_comes_before_the_variable_and_the_variable_before_the_machine(
    cpu, monkeypatch, flags, dtype
):
    cpu(flags)
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    monkeypatch.setenv("ENGRAPHY_DTYPE", dtype)
    assert choose_dtype().torch is getattr(torch, dtype)
    assert str(choose_dtype(device="cuda")) == f"{dtype}: ENGRAPHY_DTYPE is set"
    assert str(choose_dtype(other)) == f"{other}: given"


def test_a_dtype_that_is_none_is_refused_by_every_command_before_it_begins(monkeypatch, tmp_path):
    makers = (
        choose_dtype,
        lambda dtype: FinetuneConfig("m", "d", tmp_path, dtype=dtype),
        lambda dtype: GenerateConfig("m", "e", "p", dtype=dtype),
        lambda dtype: DemoConfig(tmp_path, dtype=dtype),
    )
    for make in makers:
        with pytest.raises(ConfigError, match="dtype: expected one of auto.* found 'float16'"):
            make("float16")
    monkeypatch.setenv("ENGRAPHY_DTYPE", "half")
    with pytest.raises(ConfigError, match="ENGRAPHY_DTYPE: expected one of .* found 'half'"):
        choose_dtype()
    assert choose_dtype("float32").name == "float32"
    monkeypatch.setenv("ENGRAPHY_DTYPE", "")
    assert choose_dtype().name in DTYPES


def saved_run(folder, dtype):
    """What is looked at of a demo whose second arm has a checkpoint."""
    checkpoint = folder / "moe" / "checkpoint-00000200"
    checkpoint.mkdir(parents=True)
    (checkpoint / "run.json").write_text(json.dumps({"config": {"dtype": dtype}}))
    return checkpoint


@pytest.mark.parametrize("flags", [SLOW, FAST])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_demo_that_is_resumed_keeps_its_dtype_on_any_machine(cpu, tmp_path, flags, dtype):
    cpu(flags)
    checkpoint = saved_run(tmp_path, dtype)
    for demand in ("auto", dtype):
        config = DemoConfig(tmp_path, dtype=demand, resume=True)
        assert str(config.chosen_dtype()) == f"{dtype}: of the run that is resumed"
        assert config.arms().train.dtype == dtype
    assert DemoConfig(tmp_path).chosen_dtype() == choose_dtype()
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    message = f"{checkpoint}: this run computes in {dtype}, found dtype '{other}'"
    with pytest.raises(ConfigError, match=message):
        DemoConfig(tmp_path, dtype=other, resume=True).arms()


@pytest.mark.parametrize("body", ["", "{", "[]", "{}", '{"config": {"dtype": 5}}'])
def test_a_demo_whose_checkpoint_cannot_be_read_is_not_resumed_in_a_guessed_dtype(tmp_path, body):
    (saved_run(tmp_path, "float32") / "run.json").write_text(body)
    with pytest.raises(ConfigError, match="checkpoint-00000200: expected a checkpoint"):
        DemoConfig(tmp_path, resume=True).arms()


def test_a_demo_that_had_no_checkpoint_yet_is_begun_as_a_new_one(cpu, tmp_path):
    cpu(FAST)
    assert DemoConfig(tmp_path, resume=True).arms().train.dtype == "bfloat16"
