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

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError, InputError

TASKS = ("multi-query", "multi-key", "multi-value", "variable-tracking")
Encode = Callable[[str], Sequence[int]]
"""Token ids of a text, without special tokens."""

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


class NeedleTexts:
    """Makes cases of all tasks with one tokenizer.

    Args:
        encode: The tokenizer.
        items: Keys, values of a key, or variables of a chain; 2 or more.
        filler: Text that stands between the needles, from a place in it that chance chooses, as
            often as it takes. None = short sentences that repeat, as RULER's noise.
        start: Id that begins a document; it counts as a token. None = no such id.

    Raises:
        ConfigError: items is below 2.
        InputError: The filler has no text.
    """

    def __init__(
        self,
        encode: Encode,
        *,
        items: int = 4,
        filler: str | None = None,
        start: int | None = None,
    ):
        if items < 2:
            raise ConfigError(f"items: expected 2 or more, found {items}")
        self.encode = encode
        self.items = items
        self.start = start
        self._pieces = _pieces(encode, filler)
        self._pools = _Pools(encode)

    def case(self, task: str, tokens: int, random: np.random.Generator) -> Case:
        """A case whose questions have `tokens` ids each.

        Raises:
            ConfigError: The task is unknown, or there are not as many different items.
            InputError: Needles and question alone have more tokens.
        """
        text, asked = self._drawn(task, random)
        questions = [
            Question(text.ids(question, tokens), right, _shuffled(options, random))
            for question, right, options in asked
        ]
        return Case(task, tuple(questions))

    def answered(
        self, task: str, tokens: int, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """A text with its questions, in an order of chance, each with its answers: `tokens` ids.

        Returns:
            The ids, int64 [tokens], and bool [tokens], True where an id is one of an answer.

        Raises:
            ConfigError, InputError: As `case`.
        """
        text, asked = self._drawn(task, random)
        first, *others = _shuffled(asked, random)
        tail, is_answer = self._answers(first)
        for question in others:
            ids = list(self.encode(question[0]))
            answers, flags = self._answers(question)
            tail += ids + answers
            is_answer += [False] * len(ids) + flags
        head = text.ids(first[0], tokens - len(tail))
        return np.array([*head, *tail]), np.array([False] * len(head) + is_answer)

    def _answers(self, asked: _Asked) -> tuple[list[int], list[bool]]:
        """The ids of a question's answers, and a flag for each."""
        question = Question((), asked[1], asked[2])
        ids = [token for part in answer_ids(question, self.encode) for token in part]
        return ids, [True] * len(ids)

    def _drawn(self, task: str, random: np.random.Generator) -> tuple[_Text, list[_Asked]]:
        if task not in TASKS:
            raise ConfigError(f"task: expected one of {list(TASKS)}, found {task!r}")
        needles, asked = _facts(task, self._pools, self.items, random)
        return _Text(self.encode, self._pieces, needles, self.start, random), asked


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
        items: As in `NeedleTexts`.
        filler: As in `NeedleTexts`.
        start: As in `NeedleTexts`.

    Raises:
        ConfigError: The task is unknown, or items is below 2.
        InputError: Needles and question alone have more tokens, or the filler has no text.
    """
    texts = NeedleTexts(encode, items=items, filler=filler, start=start)
    return seeded_cases(texts, task, tokens, count, seed)


def seeded_cases(texts: NeedleTexts, task: str, tokens: int, count: int, seed: int) -> list[Case]:
    """As `needle_cases`, from texts that are there. Raises what `NeedleTexts.case` raises."""
    known = TASKS.index(task) if task in TASKS else len(TASKS)
    randoms = [np.random.default_rng([seed, known, index]) for index in range(count)]
    return [texts.case(task, tokens, random) for random in randoms]


def answer_ids(question: Question, encode: Encode) -> list[Sequence[int]]:
    """Ids of the right answers as a text gives them, " A, B.": each answer, and what follows it."""
    parts: list[Sequence[int]] = []
    for answer in question.right:
        parts += [encode(f" {answer}"), encode(",")]
    parts[-1] = encode(".")
    return parts


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
        pairs = [(first, value) for value in values[:items]]
        pairs += [(second, value) for value in values[items:]]
        pairs = _shuffled(pairs, random)
        right = tuple(value for key, value in pairs if key == first)  # as the text has them
        asked = [(_question(first), right, values)]
        return [_needle(key, value) for key, value in pairs], asked
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
        start: Id that the text begins with; None = none.
        random: Chooses the places.
    """

    def __init__(
        self,
        encode: Encode,
        pieces: Sequence[Sequence[int]],
        needles: Sequence[str],
        start: int | None,
        random: np.random.Generator,
    ):
        self.encode = encode
        self.pieces = pieces
        self.needles = [list(encode(f" {needle}")) for needle in needles]
        self.begin = [] if start is None else [start]
        self.first = int(random.integers(len(pieces)))
        self.places = np.sort(random.random(len(needles)))  # shares of the filler

    def ids(self, question: str, tokens: int) -> tuple[int, ...]:
        """Text and question, exactly `tokens` ids. Needles stand between sentences."""
        asked = list(self.encode(question))
        room = tokens - len(self.begin) - sum(map(len, self.needles)) - len(asked)
        if room < 0:
            raise InputError(
                f"tokens: expected at least {tokens - room} for needles and question, "
                f"found {tokens}"
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
