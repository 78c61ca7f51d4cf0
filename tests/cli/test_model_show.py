"""The verb `engraphy model show`: sizes, parameters by part, and the rule of a scale."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from engraphy.cli import app


def show(*words: str) -> str:
    result = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["model", "show", *words])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_parameters_of_a_published_model_are_shown_by_part():
    output = show("Engram-27B")
    for text in ("hyper-connections", "memory, table", "5,792,338,560", "inferred", "2,262,400"):
        assert text in output
    lines = [line.split() for line in output.splitlines()]
    assert ["total", "26,718,491,860", "3,832,400,980"] in lines


def test_a_scale_prints_its_rule_and_json_the_sizes():
    assert "/ sqrt(N), at least 3" in show("engram-27b", "--scale", "20", "--vocab", "2048")
    values = json.loads(show("Engram-27B", "--scale", "20", "--vocab", "2048", "--json"))
    assert values["model"]["hidden_size"] == 128 and values["model"]["vocab_size"] == 2048
    assert values["memory"]["hash"]["vocab_size"] == 2048


def test_the_reference_model_is_shown_too():
    assert "2,573,184" in show("demo")


@pytest.mark.parametrize("words", [["Engram"], ["demo", "--scale", "2"]])
def test_what_cannot_be_shown_is_one_line(words):
    result = CliRunner().invoke(app, ["model", "show", *words])
    assert result.exit_code == 1 and result.output.startswith("ConfigError: ")
