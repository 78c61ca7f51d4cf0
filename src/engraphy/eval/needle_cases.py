"""Needles in a long text: facts stand between filler, and a question at the end asks for one.

The tasks are those of RULER (arXiv 2404.06654, section 3) that ask for more than one needle, in
shorter words, for models that are not instructed:

- "multi-query": keys have a value each, and half of them are asked for in one question.
- "multi-key": keys have a value each, and one of them is asked for.
- "multi-value": one key has some values, which are all asked for, beside another key with as many.
- "variable-tracking": variables get their value from each other, in two chains of equal length. All
  variables of one value are asked for.

A case depends on the task, the tokenizer, the sizes and the seed alone. Its question has exactly
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
        right: The answers in their order, without the space before them. Each is one of the
            options.
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
        question: The text with its question.
    """

    task: str
    question: Question


class NeedleTexts:
    """Makes cases of all tasks with one tokenizer.

    Args:
        encode: The tokenizer.
        items: Keys of a text (of "multi-query" those that are asked for), values of a key, or
            variables of a chain; 2 or more.
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
        """A case whose question has `tokens` ids.

        Raises:
            ConfigError: The task is unknown, or there are not as many different items.
            InputError: Needles and question alone have more tokens.
        """
        text, (asked, right, options) = self._drawn(task, random)
        return Case(task, Question(text.ids(asked, tokens), right, _shuffled(options, random)))

    def answered(
        self, task: str, tokens: int, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """A text with its question and the answers: `tokens` ids.

        Returns:
            The ids, int64 [tokens], and bool [tokens], True where an id is one of an answer.

        Raises:
            ConfigError, InputError: As `case`.
        """
        text, (asked, right, _) = self._drawn(task, random)
        answers = [token for part in answer_ids(right, self.encode) for token in part]
        head = text.ids(asked, tokens - len(answers))
        return np.array([*head, *answers]), np.arange(tokens) >= len(head)

    def _drawn(self, task: str, random: np.random.Generator) -> tuple[_Text, _Asked]:
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
        tokens: Tokens of a question with its text.
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


def answer_ids(right: Sequence[str], encode: Encode) -> list[Sequence[int]]:
    """Ids of answers as a text gives them, " A, B.": each answer, and what follows it."""
    parts: list[Sequence[int]] = []
    for answer in right:
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
) -> tuple[list[str], _Asked]:
    """Needles in the order of the text, and what is asked."""
    if task == "variable-tracking":
        return _chains(pools, items, random)
    count = items if task == "multi-key" else 2 * items
    values = _drawn(pools.values, count, random)
    keys = _drawn(pools.keys, 2 if task == "multi-value" else count, random)
    each = count // len(keys)  # values of a key
    pairs = _shuffled([(keys[place // each], values[place]) for place in range(count)], random)
    asked = keys[:items] if task == "multi-query" else keys[:1]
    right = [value for name in asked for key, value in pairs if key == name]  # as the text has them
    needles = [_needle(key, value) for key, value in pairs]
    return needles, (_question(asked), tuple(right), values)


def _chains(pools: _Pools, items: int, random: np.random.Generator) -> tuple[list[str], _Asked]:
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
    return needles, (question, names[:items], names)


def _needle(key: str, value: str) -> str:
    return f"The number of {key} is {value}."


def _question(keys: Sequence[str]) -> str:
    *others, last = keys
    if not others:
        return f" The number of {last} is"
    return f" The numbers of {', '.join(others)} and {last} are"


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
