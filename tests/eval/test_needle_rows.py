"""Needle rows: exact, answered, in the share that is asked for; and answers that a model writes."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from engraphy.data.packing import IGNORED, Batches
from engraphy.errors import ConfigError, InputError
from engraphy.eval.needle_cases import TASKS, NeedleTexts, needle_cases
from engraphy.eval.needle_rows import NeedleRows
from engraphy.eval.needles import score_forced
from tests.eval.test_needles import letters, reader

START = 7
LENGTH = 320


def text_batches(tokens=LENGTH, seed: int | None = 0, batch=4) -> Batches:
    documents = [np.full(200, 200 + index, dtype=np.int32) for index in range(60)]
    return Batches(documents, START, batch=batch, tokens=tokens, seed=seed)


def rows(share: float, **settings) -> NeedleRows:
    texts = NeedleTexts(letters, items=2, start=START)
    return NeedleRows(text_batches(**settings), texts, share, 5)


def is_needle(row) -> bool:
    return int(row.max()) < 200


def written(ids) -> str:
    return "".join(map(chr, ids))


def test_a_needle_row_is_one_document_whose_targets_are_the_answers_to_its_question():
    seen = set()
    for step in range(6):
        batch = rows(1.0)[step]
        assert batch.ids_BT.shape == (4, LENGTH)
        for ids, targets, starts in zip(*batch, strict=True):
            kept = targets != IGNORED
            assert kept[-1] and starts.tolist() == [True] + [False] * (LENGTH - 1)
            assert ids[0] == START and torch.equal(ids[1:][kept[:-1]], targets[:-1][kept[:-1]])
            first = LENGTH - int(kept.sum())
            assert kept[first:].all()
            answers = re.findall(r"\w+", written(targets[first:].tolist()))
            text = written(ids[: first + 1].tolist())
            assert answers == re.findall(r"\w+", reader(map(ord, text)))
            seen.add(len(answers))
    assert seen == {1, 2}  # multi-key, and the tasks of several answers


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.6, 1.0])
def test_the_share_is_met_over_many_steps(share):
    made = rows(share)
    needles = [sum(map(is_needle, made[step].ids_BT)) for step in range(40)]
    assert sum(needles) == round(share * 160)
    assert max(needles) - min(needles) <= 1


def test_the_other_rows_are_those_of_the_text():
    plain, mixed = text_batches()[3], rows(0.5)[3]
    assert torch.equal(plain.ids_BT[2:], mixed.ids_BT[2:])
    assert torch.equal(plain.targets_BT[2:], mixed.targets_BT[2:])
    assert torch.equal(plain.starts_BT[2:], mixed.starts_BT[2:])


def test_a_step_is_always_the_same_and_each_step_another_one():
    made = rows(1.0)
    assert torch.equal(made[2].ids_BT, rows(1.0)[2].ids_BT)
    assert not torch.equal(made[2].ids_BT, made[3].ids_BT)
    assert len({tuple(row.tolist()) for row in made[2].ids_BT}) == 4


def test_the_digest_follows_all_that_the_batches_depend_on():
    texts = NeedleTexts(letters, items=2, start=START)
    others = [
        rows(0.5),
        rows(0.25),
        rows(0.5, batch=8),
        NeedleRows(text_batches(), texts, 0.5, 6),
        NeedleRows(text_batches(), NeedleTexts(letters, items=3, start=START), 0.5, 5),
    ]
    assert rows(0.5).digest == rows(0.5).digest
    assert len({made.digest for made in others}) == len(others)


def test_invalid_rows_are_refused():
    with pytest.raises(ConfigError, match="share: expected 0 to 1, found 1.5"):
        rows(1.5)
    with pytest.raises(ConfigError, match="training batches"):
        rows(0.5, seed=None)
    with pytest.raises(InputError, match="tokens: expected at least"):
        rows(0.5, tokens=60)


# --- answers that a model writes ------------------------------------------------------------------


def copies(texts_until: int):
    """A model that reads the text, and writes the first `texts_until` answers and then nothing."""

    def predict(ids_BT):
        next_BT = torch.zeros_like(ids_BT)
        for row, ids in enumerate(ids_BT.tolist()):
            whole = written(ids).rstrip("\0")
            question = list(re.finditer(r" is| are|value \d+:", whole))[-1]
            end = question.end()
            answers = re.findall(r"\w+", reader(map(ord, whole[:end])))
            said = " " + ", ".join(answers[:texts_until])
            for place, letter in enumerate(said):
                if end - 1 + place < len(ids):
                    next_BT[row, end - 1 + place] = ord(letter)
        return next_BT

    return predict


@pytest.mark.parametrize("task", TASKS)
def test_answers_count_one_by_one(task):
    cases = needle_cases(task, letters, 400, 4, items=2)
    asked = 1 if task == "multi-key" else 2
    for said in range(asked + 1):
        found = score_forced(cases, copies(said), letters, batch=3)
        assert found["score"] == said / asked and found["cases"] == 4


def test_half_an_answer_is_none():
    cases = needle_cases("multi-key", letters, 400, 4, items=2)

    def predict(ids_BT):
        next_BT = copies(1)(ids_BT)
        next_BT[:, 402] = 0  # the second digit
        return next_BT

    assert score_forced(cases, predict, letters)["score"] == 0.0
