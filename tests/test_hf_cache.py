"""What happens to the memory's part of a cache: errors, masks that cannot be meant, caches in wrong hands."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import PAD, build, with_memory
from hf_modes import PROMPT, clean, far, logits, prompts
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import engraphy
from engraphy import _native
from engraphy.errors import InputError
from engraphy.layer import EngramLayer

EXACT = 1e-9


@pytest.fixture
def model():
    return with_memory(build("llama")).requires_grad_(False)


def filled(model, ids_BT):
    cache = DynamicCache(config=model.config)
    model(ids_BT, past_key_values=cache)
    return cache


class Broken(Exception):
    pass


def cut_short(model, block, call):
    """Run `call`, in which a block of the model fails."""
    def fail(*_):
        raise Broken

    hook = model.model.layers[block].register_forward_pre_hook(fail)
    with pytest.raises(Broken):
        call()
    hook.remove()


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("first", [0, 5])
def test_a_cache_that_an_error_left_half_filled_is_refused_until_it_is_reset(model, block, first):
    ids, cache = prompts(), DynamicCache(config=model.config)
    if first:
        model(ids[:, :first], past_key_values=cache)
    cut_short(model, block, lambda: model(ids[:, first:], past_key_values=cache))
    with pytest.raises(InputError, match="cut short"):
        model(ids[:, :1], past_key_values=cache)
    cache.reset()
    assert far(logits(model, ids, past_key_values=cache), clean(model, ids)) <= EXACT


@pytest.mark.skipif(_native.core is None, reason=_native.reason)
@torch.no_grad()
def test_a_bfloat16_model_decodes_natively_what_it_decodes_plainly(model, monkeypatch):
    ids, native, told = prompts(), EngramLayer.decode, []

    def decode(*args):
        told.append(native(*args))
        return told[-1]

    def by_tokens():
        cache = filled(model, ids[:, :5])
        return torch.cat([logits(model, token, past_key_values=cache) for token in ids[:, 5:].split(1, 1)], 1)

    exact = clean(model, ids)[:, 5:]
    model.bfloat16()
    monkeypatch.setattr(EngramLayer, "decode", decode)
    found = by_tokens()
    assert len(told) == 2 * (PROMPT - 5) and all(out is not None for out in told)
    with _native.forced("off"):
        expected = by_tokens()
    assert far(found, expected) <= 0.02 and far(found, exact) <= 1.2 * far(expected, exact) < 0.3


def test_an_error_after_the_blocks_leaves_the_cache_usable(model):
    ids, cache = prompts(), DynamicCache(config=model.config)

    def fail(*_):
        raise Broken

    hook = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(Broken):
        model(ids[:, :5], past_key_values=cache)
    hook.remove()
    assert far(logits(model, ids[:, 5:], past_key_values=cache), clean(model, ids)[:, 5:]) <= EXACT


def test_a_call_that_is_refused_leaves_the_cache_as_it_was(model):
    ids = prompts()
    cache = filled(model, ids[:, :5])
    for wrong in (dict(input_ids=torch.full((2, 1), 500)), dict(input_ids=ids[:1, :1]),
                  dict(input_ids=ids[:, :1], attention_mask=torch.ones(2, 3)),
                  dict(inputs_embeds=torch.zeros(2, 1, 32, dtype=torch.float64))):
        with pytest.raises(InputError):
            model(**wrong, past_key_values=cache)
    assert far(logits(model, ids[:, 5:], past_key_values=cache), clean(model, ids)[:, 5:]) <= EXACT


def test_tokens_after_right_padding_are_refused(model):
    """Look-back would have to skip the padding, which crops and beams count."""
    ids, mask = prompts(), torch.ones(2, PROMPT + 1, dtype=torch.long)
    ids[1, -3:], mask[1, -4:-1] = PAD, 0
    cache = DynamicCache(config=model.config)
    model(ids, attention_mask=mask[:, :-1], past_key_values=cache)
    positions = torch.tensor([[PROMPT], [PROMPT - 3]])
    for given in ({}, {"position_ids": positions}):
        with pytest.raises(InputError, match="between the tokens of sequence 1; pad on the left"):
            model(ids[:, :1], attention_mask=mask, past_key_values=cache, **given)
    with pytest.raises(InputError, match="pad on the left"):
        model.generate(ids, attention_mask=mask[:, :-1], max_new_tokens=2)


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_padding_inside_a_prompt_is_refused(model, implementation):
    ids, mask = prompts(), torch.ones(2, PROMPT, dtype=torch.long)
    ids[1, 4:6], mask[1, 4:6] = PAD, 0
    with pytest.raises(InputError, match="attention_mask"):
        model.generate(ids, attention_mask=mask, max_new_tokens=2, cache_implementation=implementation)


def test_padding_between_documents_is_not_padding_inside_one(model):
    ids, mask = prompts(1), torch.ones(1, PROMPT, dtype=torch.long)
    ids[0, 4:6], mask[0, 4:6] = PAD, 0
    positions = torch.cat([torch.arange(4), torch.zeros(2, dtype=torch.long), torch.arange(PROMPT - 6)])[None]
    own = torch.zeros(1, 1, PROMPT, PROMPT, dtype=torch.bool)
    for part in (slice(0, 4), slice(6, None)):
        own[:, :, part, part] = torch.ones(PROMPT, PROMPT, dtype=torch.bool).tril()[part, part]
    own[:, :, 4:6, 4:6] = True
    found = logits(model, ids, attention_mask=own, position_ids=positions, use_cache=False)
    for part in (slice(0, 4), slice(6, None)):
        assert far(found[:, part], clean(model, ids[:, part])) <= EXACT
    model(ids, attention_mask=mask, position_ids=positions)


def test_a_mask_of_four_dimensions_needs_positions_that_follow_each_other(model):
    ids = prompts()
    causal = torch.ones(PROMPT, PROMPT, dtype=torch.bool).tril().expand(2, 1, PROMPT, PROMPT)
    positions = torch.arange(PROMPT)[None]
    assert far(logits(model, ids, attention_mask=causal, position_ids=positions), clean(model, ids)) <= EXACT
    tree = positions.clone()
    tree[0, 6:] -= 1  # two candidates for one place
    with pytest.raises(InputError, match="go up by one"):
        model(ids, attention_mask=causal, position_ids=tree)


def test_the_columns_of_a_mask_are_places_in_the_cache(model):
    """A static cache may come with a mask as long as itself."""
    ids, mask = prompts(), torch.zeros(2, 2 * PROMPT, dtype=torch.long)
    ids[1, :3] = PAD
    cache, found = StaticCache(config=model.config, max_cache_len=2 * PROMPT), []
    positions = torch.stack([torch.arange(PROMPT), (torch.arange(PROMPT) - 3).clamp_min(0)])
    for first, last in ((0, 7), (7, 8), (8, PROMPT)):
        mask[:, first:last] = 1
        mask[1, :3] = 0
        found.append(logits(model, ids[:, first:last], attention_mask=mask, past_key_values=cache,
                            position_ids=positions[:, first:last]))
    text = torch.cat(found, 1)
    assert far(text[0], clean(model, ids[:1])[0]) <= EXACT
    assert far(text[1, 3:], clean(model, ids[1:, 3:])[0]) <= EXACT
    with pytest.raises(InputError, match=f"at least {PROMPT + 1}"):
        model(ids[:, :1], attention_mask=mask[:, :1], past_key_values=cache)


def test_a_cache_that_another_model_filled_on_is_refused(model):
    ids, other = prompts(), build("llama")
    cache = filled(model, ids[:, :5])
    other(ids[:, 5:7], past_key_values=cache)
    with pytest.raises(InputError, match="the model has seen 7 tokens, the memory 5"):
        model(ids[:, 7:8], past_key_values=cache)


def test_a_cache_of_another_number_of_sequences_is_refused(model):
    cache = filled(model, prompts(2))
    with pytest.raises(InputError, match="3 sequences, found 2"):
        model(prompts(3)[:, :1], past_key_values=cache)


def test_what_is_no_cache_of_a_decoder_is_refused(model):
    for wrong in (((torch.zeros(1), torch.zeros(1)),), EncoderDecoderCache(DynamicCache(), DynamicCache())):
        with pytest.raises(InputError, match="expected a Cache of a decoder"):
            model(prompts(), past_key_values=wrong)


def test_a_cache_outlives_detaching_and_attaching_again(model):
    ids = prompts()
    cache = filled(model, ids[:, :5])
    engraphy.attach(model, engraphy.detach(model))
    assert far(logits(model, ids[:, 5:], past_key_values=cache), clean(model, ids)[:, 5:]) <= EXACT


def test_use_cache_false_still_follows_the_cache_that_is_given(model):
    ids = prompts()
    cache = filled(model, ids[:, :5])
    found = logits(model, ids[:, 5:], past_key_values=cache, use_cache=False)
    assert far(found, clean(model, ids)[:, 5:]) <= EXACT
    assert model(ids, use_cache=False).past_key_values is None


def test_a_copy_and_its_original_share_nothing(model):
    ids = prompts()
    cache = filled(model, ids[:, :5])
    copied = copy.deepcopy(cache)
    model(prompts(seed=2)[:, 5:], past_key_values=copied)
    assert far(logits(model, ids[:, 5:], past_key_values=cache), clean(model, ids)[:, 5:]) <= EXACT


def test_sequences_can_be_repeated_and_selected(model):
    ids, wanted = prompts(), torch.tensor([3, 0])
    cache = filled(model, ids[:, :5])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(wanted)
    chosen = ids.repeat_interleave(2, 0)[wanted]
    assert far(logits(model, chosen[:, 5:], past_key_values=cache), clean(model, chosen)[:, 5:]) <= EXACT
