"""The most frequent n-grams of a study's training text, counted once for all arms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ...addresses.addresser import Addresser
from ...addresses.counting import count_ngrams
from ...addresses.ngrams import Ngrams
from ...data.corpus import Corpus
from ...spec.hash import HashSpec
from .arm_recipe import ArmRecipe
from .backbones import Backbone

FILE_NAME = "ngrams"
"""Name of the file of counts in a corpus's folder."""


def count_frequent(
    corpus: Corpus, folder: Path, recipes: Iterable[ArmRecipe], backbone: Backbone
) -> None:
    """Counts as many n-grams as the arms need, and writes them to the corpus's folder.

    Nothing is done if no arm has hot n-grams, or they are there.

    Args:
        corpus: The text.
        folder: Of the corpus.
        recipes: The arms.
        backbone: What they change.
    """
    most: dict[int, int] = {}
    for recipe in recipes:
        if recipe.has_hot:
            slots = recipe.arm(backbone, corpus.vocab, corpus.end_id).hot
            most |= {order: max(most.get(order, 0), count) for order, count in slots.items()}
    if most and not _holds(folder / FILE_NAME, most):
        _counted(corpus, most).save(folder / FILE_NAME)


def frequent_ngrams(corpus: Corpus, folder: Path, slots: Mapping[int, int]) -> Ngrams:
    """The most frequent n-grams of a training text, from what `count_frequent` wrote.

    Args:
        corpus: The text.
        folder: Of the corpus.
        slots: How many of each order.
    """
    path = folder / FILE_NAME
    ngrams = Ngrams.load(path) if _holds(path, slots) else _counted(corpus, slots)
    return ngrams.top(slots)


def ngram_addresser(corpus: Corpus, orders: Iterable[int]) -> Addresser:
    """Says which n-grams a text has: those that the memories of all arms hash."""
    spec = HashSpec.demo((0,), tuple(orders), 1, 1, len(corpus.vocab), corpus.end_id)
    return Addresser(spec, corpus.vocab)


def _holds(path: Path, slots: Mapping[int, int]) -> bool:
    """Whether a file has so many n-grams of each order."""
    if not path.exists():
        return False
    ngrams = Ngrams.load(path)
    return all(len(ngrams.ids.get(order, ())) >= count for order, count in slots.items())


def _counted(corpus: Corpus, slots: Mapping[int, int]) -> Ngrams:
    """Counts the whole training text, each document after an end token, as `pack` has it."""
    end = np.array([corpus.end_id], dtype=np.int32)
    ids_T = np.concatenate([part for ids in corpus.training for part in (end, ids)])
    sizes = [len(ids) + 1 for ids in corpus.training]
    begins = np.cumsum([0, *sizes[:-1]])
    addresser = ngram_addresser(corpus, sorted(slots))
    return count_ngrams(addresser, ids_T, max(slots.values()), begins=begins)
