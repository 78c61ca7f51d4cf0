"""What kind of word a token belongs to: name, number, function word, code. Losses divide by it.

The kind is that of the whole word, since a name is often several tokens. It is told from spelling
alone, so it is rough: a capital within a sentence makes a name, and a name that begins a sentence
counts as a word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..errors import InputError
from .losses import named_mean

KINDS = ("name", "number", "function word", "word", "other", "code", "end")
"""`word` is any other word, `other` marks and white space, `end` the end of a document."""
FUNCTION_WORDS = frozenset(
    # English
    "a an the this that these those and or but nor so yet if of to in on at by for from with into "
    "onto over under about after before between through during without within against upon as than "
    "then when while where who whom whose which what why how i you he she it we they me him her us "
    "them my your his its our their is am are was were be been being has have had do does did will "
    "would shall should can could may might must not no there here also all any some each such "
    # French
    "le la les un une des du de d l et ou mais donc ni car si que qui quoi dont où ce cet cette "
    "ces se s il elle ils elles on nous vous je tu ne n pas plus est sont était étaient été être "
    "a ont avait avoir au aux en dans par pour sur sous avec sans entre vers chez comme son sa "
    "ses leur leurs y c qu j m t "
    # Spanish
    "el los las uno una unos unas del al y e o u pero ni que quien cual cuyo donde cuando como si "
    "no se lo le les su sus mi tu es son era eran fue fueron ser ha han había hay en con por para "
    "sin sobre entre desde hasta hacia este esta estos estas ese esa eso más muy también".split()
)
_WORD = re.compile(r"[^\W_]+")
_BEGINS = re.compile(r"(?:^|[.!?:…\n])[\s\"'“”‘’«»()\[\]¿¡—-]*$")
_BEFORE = 16  # characters before a word that are looked at


def word_kind(word: str, begins_sentence: bool) -> str:
    """The kind of a word of letters and digits.

    Args:
        word: The word.
        begins_sentence: Whether it is the first one of a sentence, where a capital says nothing.
    """
    if any(letter.isdigit() for letter in word):
        return "number"
    if word.lower() in FUNCTION_WORDS:
        return "function word"
    if word[0].isupper() and not begins_sentence:
        return "name"
    return "word"


def token_kinds(tokenizer: Tokenizer, ids: np.ndarray, is_code: bool = False) -> list[str]:
    """The kind of each token of a document.

    A token that holds a part of two words counts for the first.

    Args:
        tokenizer: The tokenizer that gave the ids.
        ids: Token ids [T] of a whole text, without special tokens.
        is_code: Whether the document is code: then all its tokens are.

    Returns:
        T of KINDS.

    Raises:
        InputError: The tokenizer gives other ids for the text.
    """
    if is_code:
        return ["code"] * len(ids)
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    spans = _spans(tokenizer, ids, text)
    kinds = np.full(len(text), "other", dtype=object)
    for match in _WORD.finditer(text):
        begin = match.start()
        first = _BEGINS.search(text[max(0, begin - _BEFORE) : begin]) is not None
        kinds[begin : match.end()] = word_kind(match[0], first)
    return [_first(kinds[begin:end]) for begin, end in spans]


def target_kinds(
    tokenizer: Tokenizer, documents: Sequence[np.ndarray], is_code: np.ndarray
) -> np.ndarray:
    """The kind of each target of held-out documents, in the order of `heldout_losses` and
    `Losses.losses`: the tokens of each document, and its end.

    Args:
        tokenizer: The tokenizer that gave the ids.
        documents: Held-out documents, as their `Batches` have them.
        is_code: bool, for each document.

    Returns:
        str [M], of KINDS.
    """
    kinds: list[str] = []
    for ids, code in zip(documents, is_code, strict=True):
        kinds += [*token_kinds(tokenizer, ids, bool(code)), "end"]
    return np.array(kinds)


def mean_by_label(
    values: np.ndarray, documents: np.ndarray, labels: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Means of what has the same label.

    Args:
        values: f64 [M], losses or differences.
        documents: int64 [M], the document of each.
        labels: str [M], the label of each: a kind, or the source of its document.

    Returns:
        By label: "mean", its standard error over documents "stderr" if two documents or more have
        the label, "tokens", and "share" of all tokens. So shares times means add up to the mean.

    Raises:
        InputError: The shapes differ.
    """
    if not len(values) == len(documents) == len(labels):
        raise InputError(
            "labels: expected one for each value and document, found "
            f"{len(values)}, {len(documents)} and {len(labels)}"
        )
    means = {}
    for label in np.unique(labels).tolist():
        inside = labels == label
        means[label] = {
            **named_mean(values[inside], documents[inside], "mean", "stderr"),
            "tokens": int(inside.sum()),
            "share": float(inside.mean()),
        }
    return means


def _spans(tokenizer: Tokenizer, ids: np.ndarray, text: str) -> list[tuple[int, int]]:
    """The characters of each token, from encoding the text again."""
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        encoding = tokenizer.encode(text, add_special_tokens=False)
    finally:
        tokenizer.encode_special_tokens = before
    if encoding.ids != ids.tolist():
        raise InputError("ids: expected those of a whole text by this tokenizer, found others")
    return encoding.offsets


def _first(kinds: np.ndarray) -> str:
    """The first kind that is a word's."""
    return next((kind for kind in kinds if kind != "other"), "other")
