"""The nouns and verbs of the command line, and the short spellings from before the nouns."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from engraphy.cli import app
from engraphy.cli.app import _SHORT
from engraphy.recipes.studies import COMPARISONS, demo_study


def commands_of(group, prefix: str = "") -> dict[str, object]:
    """Every command by its words: "table verify", "doctor", ..."""
    found = {}
    for name, command in group.commands.items():
        words = f"{prefix} {name}".strip()
        found[words] = command
        if hasattr(command, "commands"):
            found |= commands_of(command, words)
    return found


COMMANDS = commands_of(typer.main.get_command(app))


def test_each_noun_has_its_verbs():
    verbs = {
        "table": {
            "convert",
            "quantize",
            "verify",
            "compare",
            "stat",
            "sample",
            "publish",
            "serve",
            "ask",
            "hot",
        },
        "model": {"finetune", "generate", "inspect", "eval", "show"},
        "study": {"demo", "adapt", *COMPARISONS},
        "machine": {"doctor", "plan", "probe", "simulate"},
        "data": {"books", "smollm2", "ngrams"},
    }
    for noun, expected in verbs.items():
        assert set(COMMANDS[noun].commands) == expected
    assert "demo" in COMMANDS


@pytest.mark.parametrize("short", sorted(_SHORT))
def test_a_short_spelling_takes_what_its_long_form_takes(short):
    function, long = _SHORT[short]
    options = [[parameter.opts for parameter in COMMANDS[words].params] for words in (short, long)]
    assert options[0] == options[1]
    assert COMMANDS[short].callback.__wrapped__ is COMMANDS[long].callback.__wrapped__ is function


@pytest.mark.parametrize("words", sorted(COMMANDS))
def test_every_command_has_help(words):
    result = CliRunner().invoke(app, [*words.split(), "--help"])
    assert result.exit_code == 0 and "Usage: " in result.output
    assert COMMANDS[words].help


@pytest.mark.parametrize(
    "words, seeds",
    [([], (0, 1, 2)), (["--seeds", "2"], (0, 1)), (["demo", "--seeds", "2"], (0, 1))],
)
def test_a_study_without_a_name_is_the_demo_study(words, seeds, monkeypatch, tmp_path):
    runs = []
    monkeypatch.setattr(demo_study, "study", lambda config, *_: runs.append(config))
    monkeypatch.setattr(demo_study, "tables", lambda config, out: "the table")
    out = ["--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["study", *words, *out])
    assert result.exit_code == 0 and result.output == "the table\n"
    assert [config.seeds for config in runs] == [seeds]


def test_options_before_the_name_of_a_study_are_refused():
    result = CliRunner().invoke(app, ["study", "--seeds", "2", "demo"])
    assert result.exit_code == 2 and "expected --seeds after demo, found it before" in result.output
