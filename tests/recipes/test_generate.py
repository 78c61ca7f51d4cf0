"""`engraphy generate`: the text is the model's, the gates are the forward's, and the terminal shows
both."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

import engraphy
from engraphy import EngramConfig, Trace, VocabMap
from engraphy.cli.app import app
from engraphy.data.tokens import train_tokenizer
from engraphy.errors import ConfigError, DataUnavailable, DigestMismatch, InputError
from engraphy.recipes.generate import GenerateConfig, Generation, Token, generate, show
from tests.tools.tiny_model import fill, lives, write_model

PROMPT = "Kurt Gödel was born in Zürich [1906]"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "base", initializer_range=1.0)


@pytest.fixture(scope="module")
def trained(base):
    """With a memory that has learned something, in two layers; float32."""
    model = AutoModelForCausalLM.from_pretrained(base)
    vocab = VocabMap.from_tokenizer(
        AutoTokenizer.from_pretrained(base), raw_size=model.config.vocab_size
    )
    config = EngramConfig.for_model(
        model.config, layers=(0, 2), heads=2, rows_per_head=101, vocab_size=len(vocab)
    )
    fill(engraphy.attach(model, config, vocab))
    return model


@pytest.fixture(scope="module")
def memory(trained, tmp_path_factory):
    """The folder of the memory."""
    folder = tmp_path_factory.mktemp("memories") / "memory"
    trained.engraphy.save(folder)
    return folder


@pytest.fixture(params=["float32", "bfloat16"])
def model(base, memory, request):
    """In each dtype that `generate` may choose, with the memory."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, request.param))
    engraphy.load(model, memory, tokenizer=AutoTokenizer.from_pretrained(base)).eval()
    return model


@pytest.fixture
def config(base, memory):
    return GenerateConfig(str(base), str(memory), PROMPT, tokens=12, dtype="float32")


def in_dtype_of(model, config):
    return dataclasses.replace(config, dtype=str(model.dtype).removeprefix("torch."))


def test_the_text_is_what_the_attached_model_generates(config, model, base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0]
    found = generate(in_dtype_of(model, config))
    assert [token.id for token in found.tokens] == expected.tolist()
    assert [token.generated for token in found.tokens] == [False] * ids.shape[1] + [True] * 12
    bare = AutoModelForCausalLM.from_pretrained(base, dtype=model.dtype)
    assert bare.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist() != expected.tolist()


def test_the_gates_are_those_of_one_forward(config, model):
    found = generate(in_dtype_of(model, config))
    trace = Trace()
    with torch.no_grad():
        model(torch.tensor([[token.id for token in found.tokens]]), engraphy_trace=trace)
    assert found.layers == (0, 2) and set(trace.gates) == {0, 2}
    for layer in found.layers:
        gates = torch.tensor([token.gates[layer] for token in found.tokens])
        assert torch.equal(gates, trace.gates[layer][0])
        assert gates.std() > 0.05


def test_the_pieces_add_up_to_the_text_and_no_character_is_cut(config):
    found = generate(config)
    assert (
        "".join(token.text for token in found.tokens if not token.generated)
        == PROMPT
        == found.prompt
    )
    assert "".join(token.text for token in found.tokens if token.generated) == found.text
    assert not [token for token in found.tokens if not token.generated and "\ufffd" in token.text]
    assert (
        sum(not token.text for token in found.tokens) >= 1
    )  # a byte of a letter that the next one completes


def test_samples_follow_their_seed(config):
    texts = [
        generate(dataclasses.replace(config, temperature=2.0, seed=seed)).text for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def painted(generation, **options):
    console = Console(file=io.StringIO(), width=60, **options)
    show(generation, True, console)
    return console.file.getvalue()


GATES = {0: [0.5, 0.9, 0.7], 3: [0.2, 0.1, 0.3]}
SHOWN = Generation(
    "ab",
    "c",
    (0, 3),
    tuple(
        Token(
            at,
            text,
            text == "[b]",
            {layer: [gates[at] - 0.05, gates[at] + 0.05] for layer, gates in GATES.items()},
        )
        for at, text in enumerate(("a", "\n", "[b]"))
    ),
)


def test_each_layer_is_painted_on_a_scale_of_its_own():
    told = painted(SHOWN, force_terminal=True, color_system="truecolor")
    plain = Text.from_ansi(told).plain
    assert (
        "layer 0  gate 0.500" in plain
        and "0.900" in plain
        and "layer 3  gate 0.100" in plain
        and "0.300" in plain
    )
    faint, full = "48;2;237;243;251m", "48;2;8;69;148m"
    first, second = told.split("layer 3")
    assert (
        first.split("0.900")[1].count(faint) == 1 and f"{faint}a" in first
    )  # the lowest gate of layer 0
    assert "\x1b[1;38;2;0;0;0;48;2;123;156;200m[b]" in first  # halfway, and generated: bold
    assert (
        f"\x1b[38;2;255;255;255;{full}↵" in first
    )  # the highest, on a token that one would not see
    assert f"{full}[b]" in second and f"{faint}a" not in second


def test_without_colours_the_gates_are_numbers():
    lines = painted(SHOWN).splitlines()
    assert lines[0].split() == ["token", "layer", "0", "layer", "3"]
    assert [line.split() for line in lines[1:]] == [
        ["'a'", "0.500", "0.200"],
        ["'\\n'", "0.900", "0.100"],
        ["'[b]'", "0.700", "0.300"],
    ]


def test_equal_gates_are_no_division_by_zero():
    token = Token(0, "a", False, {1: [0.5]})
    assert "a" in painted(
        Generation("a", "", (1,), (token,)), force_terminal=True, color_system="truecolor"
    )


def test_text_alone_is_printed_as_it_is():
    console = Console(file=io.StringIO(), width=20)
    long = Generation(
        "x", "", (1,), tuple(Token(0, "[b]word ", False, {1: [0.5]}) for _ in range(9))
    )
    show(long, False, console)
    assert console.file.getvalue().strip() == ("[b]word " * 9).strip()


def test_the_command_prints_text_or_json(config):
    command = ["generate", config.model, config.memory, PROMPT, "--tokens", "12"]
    command += ["--dtype", "float32"]
    found = generate(config)
    plain, shown, told = (
        CliRunner().invoke(app, [*command, *more]) for more in ([], ["--show-gates"], ["--json"])
    )
    assert plain.exit_code == shown.exit_code == told.exit_code == 0, (
        plain.output + shown.output + told.output
    )
    assert plain.stdout.startswith(PROMPT) and "layer 2" in shown.stdout
    assert plain.stderr == shown.stderr == told.stderr == "float32: given\n"
    told = json.loads(told.stdout)
    assert told["text"] == found.text and told["layers"] == [0, 2]
    assert told["tokens"][5]["gates"]["2"] == found.tokens[5].gates[2]
    wrong = CliRunner().invoke(app, [*command[:2], "nowhere", PROMPT])
    assert (
        wrong.exit_code == 1
        and "ConfigError: nowhere" in wrong.output
        and "Traceback" not in wrong.output
    )


def test_what_cannot_be_meant_is_refused(config, base, tmp_path):
    for change in ({"tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            dataclasses.replace(config, **change)
    with pytest.raises(InputError, match="at least one token"):
        generate(dataclasses.replace(config, prompt=""))
    with pytest.raises(DataUnavailable, match="nowhere"):
        generate(dataclasses.replace(config, model=str(tmp_path / "nowhere")))
    other = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(lives(300, 9), 290), eos_token="<|endoftext|>"
    )
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(DigestMismatch, match="vocabulary map"):
        generate(dataclasses.replace(config, model=str(tmp_path / "other")))
