"""Kinds of tokens, told from the word that a token belongs to, and losses divided by them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engraphy.data.packing import Batches
from engraphy.data.tokens import encode, train_tokenizer
from engraphy.errors import InputError
from engraphy.eval.kinds import KINDS, mean_by_label, target_kinds, token_kinds, word_kind
from engraphy.eval.losses import heldout_losses

TEXTS = [
    "The river of Zürich rises in 1815. Anna said: Go home, Bob!",
    "Où est la maison de Marie Curie?\nElle est née en 1867.",
    "El rey fue coronado. ¿Dónde está el Álamo?",
]
TOKENIZER = train_tokenizer(TEXTS * 3, 280)


def kinds_of_words(text: str) -> dict[str, str]:
    """The kind of each word of a text, which all of its tokens have to share."""
    (ids,) = encode(TOKENIZER, [text])
    kinds = token_kinds(TOKENIZER, ids)
    spans = TOKENIZER.encode(text).offsets
    assert len(kinds) == len(ids) > len(text.split())
    found: dict[str, set[str]] = {}
    place = 0
    for word in text.split():
        begin = text.index(word, place)
        place = begin + len(word)
        bare = word.strip(".:,!?¿")
        inside = [
            kind
            for kind, (low, high) in zip(kinds, spans, strict=True)
            if any(letter in bare for letter in text[low:high].strip())
            and begin <= low + text[low:high].count(" ") < place
        ]
        found[bare] = set(inside)
    assert all(len(kinds) == 1 for kinds in found.values()), found
    return {word: kinds.pop() for word, kinds in found.items()}


def test_all_tokens_of_a_word_have_its_kind():
    assert kinds_of_words(TEXTS[0]) == {
        "The": "function word",
        "river": "word",
        "of": "function word",
        "Zürich": "name",
        "rises": "word",
        "in": "function word",
        "1815": "number",
        "Anna": "word",  # begins a sentence
        "said": "word",
        "Go": "word",  # after a colon
        "home": "word",
        "Bob": "name",
    }


def test_french_and_spanish_have_function_words_and_names_too():
    french = kinds_of_words(TEXTS[1])
    assert [french[word] for word in ("Où", "est", "la", "de", "en")] == ["function word"] * 5
    assert (french["Marie"], french["Curie"], french["1867"]) == ("name", "name", "number")
    spanish = kinds_of_words(TEXTS[2])
    assert (spanish["El"], spanish["fue"], spanish["rey"]) == ("function word",) * 2 + ("word",)
    assert spanish["Dónde"] == "word" and spanish["Álamo"] == "name"


@pytest.mark.parametrize(
    "word, begins, kind",
    [
        ("I", False, "function word"),
        ("Paris", False, "name"),
        ("Paris", True, "word"),
        ("NATO", False, "name"),
        ("3rd", False, "number"),
        ("walk", False, "word"),
    ],
)
def test_a_word_has_a_kind_of_its_own(word, begins, kind):
    assert word_kind(word, begins) == kind and kind in KINDS


def test_marks_are_other_and_all_of_code_is_code():
    (ids,) = encode(TOKENIZER, ["!? ..."])
    assert set(token_kinds(TOKENIZER, ids)) == {"other"}
    assert set(token_kinds(TOKENIZER, ids, is_code=True)) == {"code"}


def test_ids_that_this_tokenizer_would_not_give_are_refused():
    letters = np.concatenate(encode(TOKENIZER, list(TEXTS[0])))
    with pytest.raises(InputError, match="of a whole text by this tokenizer"):
        token_kinds(TOKENIZER, letters)


def test_kinds_lie_beside_the_losses_of_their_targets():
    documents = encode(TOKENIZER, TEXTS)
    batches = Batches(documents, 0, batch=2, tokens=8, seed=None)

    def ids_as_losses(batch):
        return batch.targets_BT.clamp(min=0).double()

    losses, of = heldout_losses(ids_as_losses, batches)
    kinds = target_kinds(TOKENIZER, documents, np.array([False, True, False]))
    assert len(kinds) == len(losses)
    assert (losses[kinds == "end"] == 0).all() and (kinds == "end").sum() == 3
    assert set(of[kinds == "code"]) == {2}
    numbers = TOKENIZER.decode(losses[kinds == "number"].astype(int).tolist())
    assert numbers.strip() == "1815"


def test_means_by_label_add_up_to_the_mean():
    values = torch.arange(12, dtype=torch.float64).numpy()
    documents = np.repeat([1, 2, 3], 4)
    labels = np.array(["a", "b", "b", "c"] * 2 + ["a"] * 4)
    found = mean_by_label(values, documents, labels)
    assert found["b"]["mean"] == 3.5 and found["b"]["tokens"] == 4
    assert sum(part["share"] * part["mean"] for part in found.values()) == pytest.approx(5.5)
    assert found["a"]["stderr"] > 0
    assert "stderr" not in mean_by_label(values[:4], documents[:4], labels[:4])["b"]
    with pytest.raises(InputError, match="found 12, 12 and 11"):
        mean_by_label(values, documents, labels[1:])
