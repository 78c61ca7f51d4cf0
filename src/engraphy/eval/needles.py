"""Needles in a long text: facts stand between filler, and a question at the end asks for one.

The tasks are those of RULER (arXiv 2404.06654, section 3) that ask for more than one needle, in
shorter words, for models that are not instructed:

- "multi-query": some keys have a value each, and all of them are asked for, in a question each.
- "multi-key": the same text, but one of the keys is asked for.
- "multi-value": one key has some values, which are all asked for, beside another key with as many.
- "variable-tracking": variables get their value from each other, in two chains of equal length. All
  variables of one value are asked for.

A case depends on the task, the tokenizer, the sizes and the seed alone. Its questions have exactly
the number of tokens that is asked for, whatever the tokenizer.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.packing import IGNORED, Batch
from ..errors import ConfigError, InputError
from .losses import TokenLosses

TASKS = ("multi-query", "multi-key", "multi-value", "variable-tracking")
Encode = Callable[[str], Sequence[int]]
"""Token ids of a text, without special tokens."""
Generate = Callable[[Sequence[int]], str]
"""Takes the ids of a question, returns the text that continues it."""
Likelihoods = Callable[[Sequence[int], Sequence[str]], Sequence[float]]
"""Takes the ids of a question and the texts of options, returns the nats of each option."""

_SYLLABLES = ("ba", "de", "fi", "go", "lu", "ma", "ne", "pi", "ro", "su", "ta", "vo")
_LETTERS = "BCDFGHJKLMNPQRSTVWXZ"
_FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
_SENTENCE = re.compile(r"[^.!?\n]+[.!?]*\n*|\n+")


@dataclass(frozen=True)
class Question:
    """A question at the end of a text.

    Attributes:
        ids: Token ids of text and question.
        right: The answers, without the space before them. Each is one of the options.
        options: All answers to choose from. The wrong ones stand in the text too.
    """

    ids: tuple[int, ...]
    right: tuple[str, ...]
    options: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """A text, and what is asked about it.

    Attributes:
        task: One of TASKS.
        questions: One, or in "multi-query" one a key.
    """

    task: str
    questions: tuple[Question, ...]


def needle_cases(
    task: str,
    encode: Encode,
    tokens: int,
    count: int,
    *,
    seed: int = 0,
    items: int = 4,
    filler: str | None = None,
    start: int | None = None,
) -> list[Case]:
    """Makes cases.

    Args:
        task: One of TASKS.
        encode: The tokenizer.
        tokens: Tokens of each question with its text.
        count: Number of cases.
        seed: Of keys, values and places.
        items: Keys, values of a key, or variables of a chain; 2 or more.
        filler: Text that stands between the needles, from a place in it that the seed chooses, as
            often as it takes. None = short sentences that repeat, as RULER's noise.
        start: Id that begins a document; it counts as a token. None = no such id.

    Raises:
        ConfigError: The task is unknown, or items is below 2.
        InputError: Needles and question alone have more tokens, or the filler has no text.
    """
    if task not in TASKS:
        raise ConfigError(f"task: expected one of {list(TASKS)}, found {task!r}")
    if items < 2:
        raise ConfigError(f"items: expected 2 or more, found {items}")
    pieces = _pieces(encode, filler)
    pools = _Pools(encode)
    cases = []
    for index in range(count):
        random = np.random.default_rng([seed, TASKS.index(task), index])
        needles, asked = _facts(task, pools, items, random)
        text = _Text(encode, pieces, needles, tokens, start, random)
        questions = [
            Question(text.ids(question), right, _shuffled(options, random))
            for question, right, options in asked
        ]
        cases.append(Case(task, tuple(questions)))
    return cases


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
    return _summary([_mean(case, lambda q: text_score(q, generate(q.ids))) for case in cases])


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

    def scored(question: Question) -> float:
        return choice_score(question, likelihoods(question.ids, question.options))

    summary = _summary([_mean(case, scored) for case in cases])
    chances = [_mean(case, lambda q: len(q.right) / len(q.options)) for case in cases]
    return {**summary, "chance": statistics.fmean(chances)}


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


# --- facts ----------------------------------------------------------------------------------------

_Asked = tuple[str, tuple[str, ...], tuple[str, ...]]
"""A question, its answers, and the options."""


class _Pools:
    """Keys, values and variables, each of one number of tokens, so that no option is likelier by
    its length."""

    def __init__(self, encode: Encode):
        words = [a + b + c for a in _SYLLABLES for b in _SYLLABLES for c in _SYLLABLES]
        names = [a + b + c for a in _LETTERS for b in _LETTERS for c in _LETTERS]
        self.keys = _alike(encode, words)
        self.values = _alike(encode, [str(number) for number in range(1000, 10_000)])
        self.variables = _alike(encode, names)


def _alike(encode: Encode, words: Sequence[str]) -> list[str]:
    """The words of the number of tokens that is most common among them."""
    by_length: dict[int, list[str]] = defaultdict(list)
    for word in words:
        by_length[len(encode(f" {word}"))].append(word)
    return max(by_length.values(), key=len)


def _facts(
    task: str, pools: _Pools, items: int, random: np.random.Generator
) -> tuple[list[str], list[_Asked]]:
    """Needles in the order of the text, and what is asked."""
    if task == "variable-tracking":
        return _chains(pools, items, random)
    values = _drawn(pools.values, 2 * items, random)
    if task == "multi-value":
        first, second = _drawn(pools.keys, 2, random)
        needles = [_needle(first, value) for value in values[:items]]
        needles += [_needle(second, value) for value in values[items:]]
        asked = [(_question(first), values[:items], values)]
        return list(_shuffled(needles, random)), asked
    values = values[:items]
    keys = _drawn(pools.keys, items, random)
    needles = [_needle(key, value) for key, value in zip(keys, values, strict=True)]
    pairs = list(zip(keys, values, strict=True))
    if task == "multi-key":
        pairs = pairs[:1]
    return list(_shuffled(needles, random)), [
        (_question(key), (value,), values) for key, value in pairs
    ]


def _chains(
    pools: _Pools, items: int, random: np.random.Generator
) -> tuple[list[str], list[_Asked]]:
    """Two chains of assignments. Each keeps its order, and they lie among each other."""
    names = _drawn(pools.variables, 2 * items, random)
    values = _drawn(pools.values, 2, random)
    chains = []
    for value, chain in zip(values, (names[:items], names[items:]), strict=True):
        sources = [value, *chain[:-1]]
        chains.append([f"VAR {name} = {of}." for name, of in zip(chain, sources, strict=True)])
    turns = _shuffled([0] * items + [1] * items, random)
    needles = [chains[turn].pop(0) for turn in turns]
    question = f" Variables with the value {values[0]}:"
    return needles, [(question, names[:items], names)]


def _needle(key: str, value: str) -> str:
    return f"The number of {key} is {value}."


def _question(key: str) -> str:
    return f" The number of {key} is"


def _drawn(pool: list[str], count: int, random: np.random.Generator) -> tuple[str, ...]:
    if count > len(pool):
        raise ConfigError(f"items: expected at most {len(pool)} different ones, found {count}")
    return tuple(pool[index] for index in random.choice(len(pool), count, replace=False))


def _shuffled(values: Sequence[Any], random: np.random.Generator) -> tuple[Any, ...]:
    return tuple(values[index] for index in random.permutation(len(values)))


# --- the text -------------------------------------------------------------------------------------


class _Text:
    """Filler with needles in it, before a question.

    Args:
        encode: The tokenizer.
        pieces: Sentences of the filler as ids.
        needles: In their order.
        tokens: Of text and question.
        start: Id that the text begins with; None = none.
        random: Chooses the places.
    """

    def __init__(
        self,
        encode: Encode,
        pieces: Sequence[Sequence[int]],
        needles: Sequence[str],
        tokens: int,
        start: int | None,
        random: np.random.Generator,
    ):
        self.encode = encode
        self.pieces = pieces
        self.needles = [list(encode(f" {needle}")) for needle in needles]
        self.tokens = tokens
        self.begin = [] if start is None else [start]
        self.first = int(random.integers(len(pieces)))
        self.places = np.sort(random.random(len(needles)))  # shares of the filler

    def ids(self, question: str) -> tuple[int, ...]:
        """Text and question, exactly `tokens` ids. Needles stand between sentences."""
        asked = list(self.encode(question))
        room = self.tokens - len(self.begin) - sum(map(len, self.needles)) - len(asked)
        if room < 0:
            raise InputError(
                f"tokens: expected at least {self.tokens - room} for needles and question, "
                f"found {self.tokens}"
            )
        sentences = self._filler(room)
        ends = np.cumsum([len(sentence) for sentence in sentences])
        before = np.searchsorted(ends, self.places * room)  # sentences before each needle
        ids = list(self.begin)
        for index, sentence in enumerate([*sentences, []]):
            for needle in np.flatnonzero(before == index):
                ids += self.needles[needle]
            ids += sentence
        return tuple(ids + asked)

    def _filler(self, room: int) -> list[Sequence[int]]:
        """Sentences of `room` ids together; the first one may be cut."""
        sentences: list[Sequence[int]] = []
        index = self.first
        while room > 0:
            sentence = self.pieces[index % len(self.pieces)]
            sentences.append(sentence)
            room -= len(sentence)
            index += 1
        if room:  # less than the last sentence is too much, which the first may be shorter than
            rest = -room
            while rest >= len(sentences[0]):
                rest -= len(sentences.pop(0))
            sentences[0] = sentences[0][rest:]
        return sentences


def _pieces(encode: Encode, filler: str | None) -> list[Sequence[int]]:
    """Sentences as ids, none of them empty."""
    sentences = _FILLER if filler is None else _SENTENCE.findall(filler)
    texts = [sentence.strip(" ") for sentence in sentences]
    pieces: list[Sequence[int]] = [list(encode(f" {text}")) for text in texts if text.strip()]
    pieces = [piece for piece in pieces if piece]
    if not pieces:
        raise InputError("filler: expected text, found none")
    return pieces


# --- sums -----------------------------------------------------------------------------------------


def _mean(case: Case, score: Callable[[Question], float]) -> float:
    return statistics.fmean(score(question) for question in case.questions)


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
