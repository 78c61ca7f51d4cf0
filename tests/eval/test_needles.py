"""Needle cases: exact lengths, answers that the text holds, and scores solved by hand and by models
that copy."""

from __future__ import annotations

import re

import pytest
import torch

from engraphy.data.packing import IGNORED
from engraphy.errors import ConfigError, InputError
from engraphy.eval.losses import losses_of
from engraphy.eval.needle_cases import TASKS, Case, Question, needle_cases
from engraphy.eval.needles import (
    choice_score,
    likelihoods_of,
    score_choices,
    score_generated,
    text_score,
)
from engraphy.lm import LM, LMConfig


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def pairs_of_letters(text: str) -> list[int]:
    """A tokenizer of two letters a token, or one at the end."""
    whole = [text[index : index + 2] for index in range(0, len(text), 2)]
    return [ord(part[0]) * 256 + (ord(part[1]) if len(part) > 1 else 0) for part in whole]


def text_of(question: Question) -> str:
    return "".join(map(chr, question.ids))


def facts(text: str) -> list[tuple[str, str]]:
    return re.findall(r"The number of (\w+) is (\d+)\.", text)


def variables(text: str, value: str) -> list[str]:
    """Solves variable tracking: the variables that have a value, in one pass over the text."""
    known: dict[str, str] = {}
    for name, of in re.findall(r"VAR (\w+) = (\w+)\.", text):
        known[name] = known.get(of, of)
    return [name for name, given in known.items() if given == value]


def reader(ids) -> str:
    """A model that looks the answers up in the text."""
    text = "".join(map(chr, ids))
    if match := re.search(r"Variables with the value (\d+):$", text):
        return f" {', '.join(variables(text, match[1]))}."
    asked = re.search(r"The numbers? of ([\w, ]+) (?:is|are)$", text)[1]
    keys = re.split(", | and ", asked)
    return " " + ", ".join(value for key in keys for name, value in facts(text) if name == key)


@pytest.mark.parametrize("encode", [letters, pairs_of_letters])
@pytest.mark.parametrize("tokens", [420, 421, 1000, 4096])
@pytest.mark.parametrize("task", TASKS)
def test_a_question_has_exactly_the_tokens_that_are_asked_for(task, tokens, encode):
    cases = needle_cases(task, encode, tokens, 3, start=7)
    assert [len(case.question.ids) for case in cases] == [tokens] * 3
    assert [case.question.ids[0] for case in cases] == [7] * 3


@pytest.mark.parametrize("task", TASKS)
def test_a_reader_of_the_text_is_right_and_one_who_says_nothing_wrong(task):
    cases = needle_cases(task, letters, 800, 5, seed=2)
    assert score_generated(cases, reader) == {
        "score": 1.0,
        "score_stderr": 0.0,
        "cases": 5,
        "each": [1.0] * 5,
    }
    assert score_generated(cases, lambda ids: "")["score"] == 0.0


@pytest.mark.parametrize("task", TASKS)
def test_all_options_stand_in_the_text_and_the_right_ones_among_them(task):
    for case in needle_cases(task, letters, 800, 5):
        question = case.question
        text = text_of(question)
        assert set(question.right) < set(question.options)
        assert all(f" {option}" in text for option in question.options)
        assert len({len(option) for option in question.options}) == 1


def test_multi_key_asks_for_one_of_the_keys_and_multi_query_for_half_of_them_in_its_order():
    (one,) = needle_cases("multi-key", letters, 500, 1, items=6)
    held = dict(facts(text_of(one.question)))
    assert len(held) == len(one.question.options) == 6 and len(one.question.right) == 1
    (some,) = needle_cases("multi-query", letters, 900, 1, items=6)
    text = text_of(some.question)
    held = dict(facts(text))
    keys = re.search(r"The numbers of (\w+), (\w+), (\w+), (\w+), (\w+) and (\w+) are$", text)
    assert len(held) == len(some.question.options) == 12
    assert some.question.right == tuple(held[key] for key in keys.groups())


def test_multi_value_asks_for_all_values_of_one_of_two_keys():
    (case,) = needle_cases("multi-value", letters, 600, 1, items=3)
    question = case.question
    held = facts(text_of(question))
    assert len({key for key, _ in held}) == 2
    assert len(question.right) == 3 and len(question.options) == 6


def test_variables_are_assigned_before_they_are_used():
    for case in needle_cases("variable-tracking", letters, 700, 10, items=5):
        question = case.question
        known = set()
        for name, of in re.findall(r"VAR (\w+) = (\w+)\.", text_of(question)):
            assert of.isdigit() or of in known
            known.add(name)
        assert len(known) == 10 and len(question.right) == 5


def test_needles_spread_over_the_text_and_stand_between_sentences():
    places = []
    for case in needle_cases("multi-key", letters, 4000, 40):
        text = text_of(case.question)
        matches = list(re.finditer(r" The number of \w+ is \d+\.", text))
        places += [match.start() / len(text) for match in matches]
        assert all(match.start() == 0 or text[match.start() - 1] == "." for match in matches)
    assert min(places) < 0.05 and max(places) > 0.9
    assert 0.4 < sum(places) / len(places) < 0.6


def test_a_given_filler_is_the_text_between_the_needles():
    filler = "Stones fall. Rivers run.\nWinds blow!"
    (case,) = needle_cases("multi-key", letters, 900, 1, filler=filler)
    rest = re.sub(r" The number of \w+ is( \d+\.)?", "", text_of(case.question))
    assert re.fullmatch(r".*?( Stones fall\.| Rivers run\.\n| Winds blow!)+", rest)
    with pytest.raises(InputError, match="filler"):
        needle_cases("multi-key", letters, 900, 1, filler=" \n ")


def test_a_sentence_longer_than_the_room_is_cut():
    long = "a" * 5000 + "."
    (case,) = needle_cases("multi-key", letters, 300, 1, filler=long)
    assert len(case.question.ids) == 300 and reader(case.question.ids).strip().isdigit()


def test_cases_follow_the_seed():
    one, again = (needle_cases("multi-query", letters, 600, 2, seed=1) for _ in range(2))
    assert one == again and one[0] != one[1]
    assert one != needle_cases("multi-query", letters, 600, 2, seed=2)
    assert one == needle_cases("multi-query", letters, 600, 9, seed=1)[:2]


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(ConfigError, match="task"):
        needle_cases("single", letters, 500, 1)
    with pytest.raises(ConfigError, match="items: expected 2"):
        needle_cases("multi-key", letters, 500, 1, items=1)
    with pytest.raises(ConfigError, match="items: expected at most"):
        needle_cases("multi-key", letters, 10**6, 1, items=5000)
    with pytest.raises(InputError, match=r"tokens: expected at least \d+ .* found 50"):
        needle_cases("multi-key", letters, 50, 1)
    with pytest.raises(InputError, match="cases"):
        score_generated([], reader)


# --- scores by hand -------------------------------------------------------------------------------

QUESTION = Question((1, 2), ("12", "34"), ("56", "12", "34", "78"))


def test_a_generated_text_scores_by_the_whole_words_that_are_right():
    assert text_score(QUESTION, " 34 and 12.") == 1.0
    assert text_score(QUESTION, "12, 99") == 0.5
    assert text_score(QUESTION, "123 034") == 0.0


def test_choices_score_by_the_right_ones_among_the_first():
    assert choice_score(QUESTION, [-9.0, -1.0, -2.0, -8.0]) == 1.0
    assert choice_score(QUESTION, [-1.0, -2.0, -9.0, -8.0]) == 0.5
    assert choice_score(QUESTION, [-1.0, -9.0, -9.0, -2.0]) == 0.0
    with pytest.raises(InputError, match="4 finite numbers"):
        choice_score(QUESTION, [-1.0, float("nan"), -2.0, -3.0])


def test_means_errors_and_chance_over_cases():
    single = Question((1,), ("a",), ("b", "a"))
    cases = [Case("multi-key", single), Case("multi-value", QUESTION)]
    # The first options: 0 in the first case, one of two in the second one.
    found = score_choices(cases, lambda ids, options: [-float(i) for i in range(len(options))])
    assert found["each"] == [0.0, 0.5] and found["score"] == 0.25
    assert found["score_stderr"] == pytest.approx(0.25) and found["chance"] == 0.5


def copying_losses(batch):
    """Losses of a model that goes on as the text did after the longest part that repeats."""
    losses = torch.zeros(batch.targets_BT.shape)
    for row, column in (batch.targets_BT != IGNORED).nonzero().tolist():
        ids = batch.ids_BT[row, : column + 1].tolist()
        for length in range(min(24, column), 0, -1):
            suffix = ids[-length:]
            places = [i for i in range(column - length + 1) if ids[i : i + length] == suffix]
            if places:
                break
        expected = ids[places[-1] + length] if places else None
        losses[row, column] = 0.1 if expected == batch.targets_BT[row, column] else 5.0
    return losses


def test_a_model_that_copies_finds_the_value_of_a_key():
    cases = needle_cases("multi-key", letters, 300, 3)
    found = score_choices(cases, likelihoods_of(copying_losses, letters))
    assert found["score"] == 1.0 and found["chance"] == 0.25


def test_likelihoods_are_sums_over_the_options_tokens_alone():
    torch.manual_seed(0)
    model = LM(LMConfig(128, 16, 1, 2, 16))
    ids = letters("the number is")
    found = likelihoods_of(losses_of(model), letters)(ids, ("12", "345"))
    for value, option in zip(found, (" 12", " 345"), strict=True):
        row = torch.tensor([ids + letters(option)])
        with torch.no_grad():
            nats = model(row)[0, :-1].log_softmax(-1)[range(row.shape[1] - 1), row[0, 1:]]
        assert value == pytest.approx(float(nats[len(ids) - 1 :].sum()), abs=1e-4)
