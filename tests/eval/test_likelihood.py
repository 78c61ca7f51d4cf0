"""Log-likelihoods: the same for our reference model, for transformers models with and without a
memory, and for lm-evaluation-harness."""

from __future__ import annotations

from importlib import util

import pytest
import torch

import engraphy
from engraphy import EngramConfig, EngramMemory, HashSpec, LayerSpec, VocabMap
from engraphy.data.tokens import train_tokenizer
from engraphy.errors import InputError
from engraphy.eval.choices import Item, score
from engraphy.eval.likelihood import Text, log_likelihoods, logits_of, texts_of
from engraphy.lm import LM, LMConfig
from tests.tools import harness_items
from tests.tools.tiny_model import fill, lives

needs_harness = pytest.mark.skipif(
    util.find_spec("lm_eval") is None, reason="lm_eval is not installed: make test-eval"
)


def attached():
    """The model of the items, with a memory that says something."""
    model = harness_items.model()
    vocab = VocabMap.identity(300)
    config = EngramConfig.for_model(
        model.config, layers=(1,), heads=2, rows_per_head=101, dim=8, vocab_size=300
    )
    return model, fill(engraphy.attach(model, config, vocab))


def one_by_one(logits, texts):
    """Sums of log-softmax, in float64, a text at a time and without padding."""
    sums = []
    for ids, given in texts:
        ids_BT = torch.tensor([ids])
        with torch.no_grad():
            logs = logits(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool))[0].double()
        logs = logs.log_softmax(-1)
        sums.append(sum(float(logs[at - 1, ids[at]]) for at in range(given, len(ids))))
    return sums


def item_texts(tokenizer):
    return [
        text
        for item in harness_items.ITEMS
        for text in texts_of(tokenizer, item.question, item.options)
    ]


@pytest.fixture(scope="module")
def reference():
    """A reference model with a memory that says something, and its tokenizer."""
    torch.manual_seed(0)
    spec = HashSpec.demo((1,), (2, 3), 2, 53, vocab_size=300, pad_id=0)
    layer = LayerSpec(24, spec.columns * 4)
    memory = fill(EngramMemory(EngramConfig(spec, layer, 4), VocabMap.identity(300)))
    config = LMConfig(300, 24, layers=2, heads=2, ffn=20, max_tokens=64)
    return LM(config, memory), train_tokenizer(lives(200), 300)


def test_the_reference_model_is_scored_like_a_text_at_a_time(reference):
    model, tokenizer = reference
    texts = item_texts(tokenizer)
    expected = one_by_one(logits_of(model), texts)
    for batch in (1, 8):
        assert log_likelihoods(logits_of(model), texts, batch) == pytest.approx(expected, abs=1e-4)
    memory, model.memory = model.memory, None
    try:
        bare = log_likelihoods(logits_of(model), texts)
    finally:
        model.memory = memory
    assert max(abs(one - other) for one, other in zip(bare, expected, strict=True)) > 0.1


def test_one_text_is_tokenized_alike_by_both_kinds_of_tokenizer():
    tokenizer = harness_items.tokenizer()
    assert item_texts(tokenizer) == item_texts(train_tokenizer(lives(200), 300))


def test_an_attached_memory_is_scored_like_a_text_at_a_time():
    model, memory = attached()
    texts = item_texts(harness_items.tokenizer())
    expected = one_by_one(logits_of(model), texts)
    for batch in (1, 8):
        found = log_likelihoods(logits_of(model), texts, batch)
        assert found == pytest.approx(expected, abs=1e-4)
    with memory.disabled():
        off = log_likelihoods(logits_of(model), texts)
    assert off == pytest.approx(one_by_one(logits_of(harness_items.model()), texts), abs=1e-4)
    assert max(abs(one - other) for one, other in zip(off, expected, strict=True)) > 0.1


def test_a_function_is_scored_as_it_is():
    def even(ids_BT, live_BT):
        assert not ids_BT[~live_BT].any()
        return torch.zeros(*ids_BT.shape, 4)

    found = log_likelihoods(even, [Text([0, 1, 2], 1), Text([3, 1], 1)], batch=2)
    nats = -torch.tensor(4.0).log().item()
    assert found == pytest.approx([2 * nats, nats])


def test_a_pair_is_scored_after_the_token_that_begins_a_text():
    tokenizer = harness_items.tokenizer()
    ids = tokenizer("Ada was").input_ids
    assert texts_of(tokenizer, "", ["Ada was"]) == [Text([0, *ids], 1)]
    assert texts_of(tokenizer, "", ["<|endoftext|>Ada was"]) == [Text([0, *ids], 1)]
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="a token that begins or ends texts"):
        texts_of(tokenizer, "", ["Ada was"])


def test_the_scorer_equals_the_numbers_of_the_harness():
    result = score(harness_items.model(), harness_items.tokenizer(), harness_items.ITEMS, batch=4)
    found = [item["log_likelihood"] for item in result["each"]]
    expected = harness_items.saved()["log_likelihood"]
    for item, one, other in zip(harness_items.ITEMS, found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-4), item
    assert len({round(value, 3) for item in expected for value in item}) == 15


@needs_harness
@pytest.mark.parametrize("batch", [1, 8])
def test_the_numbers_of_the_harness_are_what_the_harness_finds(batch):
    found = harness_items.harness_log_likelihoods(batch)
    for one, other in zip(found, harness_items.saved()["log_likelihood"], strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_groups_of_pairs_and_choices_stand_side_by_side():
    result = score(harness_items.model(), harness_items.tokenizer(), harness_items.ITEMS)
    assert {name: group["items"] for name, group in result["groups"].items()} == {
        "choice": 4,
        "pair": 2,
    }
    assert isinstance(harness_items.ITEMS[0], Item)
