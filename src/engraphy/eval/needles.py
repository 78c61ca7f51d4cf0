"""Needles in a long text, scored: by what a model writes, and by what it finds likelier.

The cases are made by needle_cases.py.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.packing import IGNORED, Batch
from ..errors import InputError
from .losses import TokenLosses
from .needle_cases import Case, Encode, Question, answer_ids

Generate = Callable[[Sequence[int]], str]
"""Takes the ids of a question, returns the text that continues it."""
Likelihoods = Callable[[Sequence[int], Sequence[str]], Sequence[float]]
"""Takes the ids of a question and the texts of options, returns the nats of each option."""
Predict = Callable[[Tensor], Tensor]
"""Takes ids int64 [B, T], returns the likeliest next id of each position, int64 [B, T]."""


def text_score(question: Question, text: str) -> float:
    """Share of the answers that stand in a generated text as whole words."""
    words = set(re.findall(r"\w+", text))
    return statistics.fmean(answer in words for answer in question.right)


def choice_score(question: Question, log_likelihoods: Sequence[float]) -> float:
    """Share of the answers among the options that are ranked first, as many as there are answers.

    Args:
        question: The question.
        log_likelihoods: Nats of each option.

    Raises:
        InputError: Their number is another one, or one is not finite.
    """
    finite = all(map(math.isfinite, log_likelihoods))
    if len(log_likelihoods) != len(question.options) or not finite:
        raise InputError(
            f"log_likelihoods: expected {len(question.options)} finite numbers, "
            f"found {list(log_likelihoods)}"
        )
    order = sorted(range(len(log_likelihoods)), key=lambda index: -log_likelihoods[index])
    first = {question.options[index] for index in order[: len(question.right)]}
    return statistics.fmean(answer in first for answer in question.right)


def score_generated(cases: Sequence[Case], generate: Generate) -> dict[str, Any]:
    """Means of `text_score`.

    Args:
        cases: At least one.
        generate: The model.

    Returns:
        JSON values: "score", its standard error over cases "score_stderr" (None for one case),
        "cases", and "each", the score of each case.

    Raises:
        InputError: There are no cases.
    """
    return _summary([text_score(case.question, generate(case.question.ids)) for case in cases])


def score_choices(cases: Sequence[Case], likelihoods: Likelihoods) -> dict[str, Any]:
    """Means of `choice_score`, for models too small to write an answer.

    Args:
        cases: At least one.
        likelihoods: The model; see `likelihoods_of`.

    Returns:
        What `score_generated` returns, and "chance", the score of a guess.

    Raises:
        InputError: There are no cases, or a log-likelihood is not finite.
    """

    asked = [case.question for case in cases]
    summary = _summary([choice_score(q, likelihoods(q.ids, q.options)) for q in asked])
    return {**summary, "chance": statistics.fmean(len(q.right) / len(q.options) for q in asked)}


def score_forced(
    cases: Sequence[Case], predict: Predict, encode: Encode, batch: int = 16
) -> dict[str, Any]:
    """Means of the answers that a model would write next, each after the right ones before it.

    An answer counts if each of its tokens is the likeliest one. One forward of question and answers
    tells this, so it is cheap, and it suits models that were trained on such answers: see
    `needle_rows.NeedleRows`.

    Args:
        cases: At least one, all of as many tokens.
        predict: The model.
        encode: Its tokenizer.
        batch: Questions of a forward.

    Returns:
        What `score_generated` returns.

    Raises:
        InputError: There are no cases.
    """
    questions = [case.question for case in cases]
    shares: list[float] = []
    for first in range(0, len(questions), batch):
        shares += _forced(questions[first : first + batch], predict, encode)
    return _summary(shares)


def _forced(questions: Sequence[Question], predict: Predict, encode: Encode) -> list[float]:
    """Share of the answers of each question that a model writes."""
    answers = [answer_ids(question.right, encode) for question in questions]
    rows = [
        [*question.ids, *(token for part in parts for token in part)]
        for question, parts in zip(questions, answers, strict=True)
    ]
    ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, ids in enumerate(rows):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
    right_BT = predict(ids_BT)[:, :-1].cpu() == ids_BT[:, 1:]
    shares = []
    for row, (question, parts) in enumerate(zip(questions, answers, strict=True)):
        place = len(question.ids) - 1  # what it predicts is the first token of an answer
        written = []
        for index, part in enumerate(parts):
            if index % 2 == 0:  # the others are commas, and the full stop
                written.append(bool(right_BT[row, place : place + len(part)].all()))
            place += len(part)
        shares.append(statistics.fmean(written))
    return shares


def likelihoods_of(token_losses: TokenLosses, encode: Encode) -> Likelihoods:
    """The log-likelihoods that a model's token losses give.

    Args:
        token_losses: The model, as `eval.losses.losses_of` gives it.
        encode: Its tokenizer. Options are encoded with a space before them.
    """

    def likelihoods(ids: Sequence[int], options: Sequence[str]) -> list[float]:
        rows = [[*ids, *encode(f" {option}")] for option in options]
        longest = max(map(len, rows))
        whole = torch.zeros(len(rows), longest, dtype=torch.int64)
        targets = torch.full_like(whole, IGNORED)
        for row, values in enumerate(rows):
            whole[row, : len(values)] = torch.tensor(values)
            targets[row, len(ids) - 1 : len(values) - 1] = whole[row, len(ids) : len(values)]
        starts = torch.zeros(whole.shape, dtype=torch.bool)
        starts[:, 0] = True
        kept = targets != IGNORED
        with torch.no_grad():
            losses = token_losses(Batch(whole, targets, starts)).double().cpu()
        return (-losses.where(kept, torch.zeros_like(losses)).sum(1)).tolist()

    return likelihoods


# --- sums -----------------------------------------------------------------------------------------


def _summary(scores: Sequence[float]) -> dict[str, Any]:
    if not scores:
        raise InputError("cases: expected at least one, found none")
    error = None
    if len(scores) > 1:
        error = statistics.stdev(scores) / math.sqrt(len(scores))
    return {
        "score": statistics.fmean(scores),
        "score_stderr": error,
        "cases": len(scores),
        "each": list(scores),
    }
