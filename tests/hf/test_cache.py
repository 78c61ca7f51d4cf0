"""What happens to the memory's part of a cache: errors, masks that cannot be meant, caches in wrong
hands."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, GPT2DoubleHeadsModel, StaticCache

import engraphy
from engraphy import _native
from engraphy.errors import ConfigError, InputError, StateTooShort
from engraphy.fusion.layer import EngramLayer
from engraphy.hf import versions
from tests.tools.hf_models import CACHE, PAD, build, cache_of, cached, with_memory
from tests.tools.hf_modes import PROMPT, clean, far, in_chunks, logits, prompts

EXACT = 1e-9


@pytest.fixture
def model():
    return with_memory(build("llama")).requires_grad_(False)


def filled(model, ids_BT):
    cache = DynamicCache(config=model.config)
    model(ids_BT, **cached(cache))
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
        model(ids[:, :first], **cached(cache))
    cut_short(model, block, lambda: model(ids[:, first:], **cached(cache)))
    with pytest.raises(InputError, match="cut short"):
        model(ids[:, :1], **cached(cache))
    cache.reset()
    assert far(logits(model, ids, **cached(cache)), clean(model, ids)) <= EXACT


@pytest.mark.skipif(_native.core is None, reason=_native.reason)
@torch.no_grad()
def test_a_bfloat16_model_decodes_natively_what_it_decodes_plainly(model, monkeypatch):
    ids, native, told = prompts(), EngramLayer.decode, []

    def decode(*args):
        told.append(native(*args))
        return told[-1]

    def by_tokens():
        cache = filled(model, ids[:, :5])
        return torch.cat(
            [logits(model, token, **cached(cache)) for token in ids[:, 5:].split(1, 1)], 1
        )

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
        model(ids[:, :5], **cached(cache))
    hook.remove()
    assert far(logits(model, ids[:, 5:], **cached(cache)), clean(model, ids)[:, 5:]) <= EXACT


def test_a_call_that_is_refused_leaves_the_cache_as_it_was(model):
    ids = prompts()
    cache = filled(model, ids[:, :5])
    for wrong in (
        dict(input_ids=torch.full((2, 1), 500)),
        dict(input_ids=ids[:1, :1]),
        dict(input_ids=ids[:, :1], attention_mask=torch.ones(2, 3)),
        dict(inputs_embeds=torch.zeros(2, 1, 32, dtype=torch.float64)),
    ):
        with pytest.raises(InputError):
            model(**wrong, **cached(cache))
    assert far(logits(model, ids[:, 5:], **cached(cache)), clean(model, ids)[:, 5:]) <= EXACT


def running_positions(mask):
    return (mask.cumsum(1) - 1).clamp_min(0)


def test_tokens_after_right_padding_follow_the_last_token(model):
    """With any positions: 0 at the padding, as generate() gives them, or those of the columns."""
    ids, mask = (
        torch.cat([prompts(), prompts(seed=2)], 1),
        torch.ones(2, 2 * PROMPT, dtype=torch.long),
    )
    ids[1, 8:PROMPT], mask[1, 8:PROMPT] = PAD, 0
    running = running_positions(mask)
    for positions in (running, running.masked_fill(mask == 0, 0)):
        text = in_chunks(model, ids, (PROMPT, PROMPT + 1, 2 * PROMPT), mask, positions)
        assert far(text[0], clean(model, ids[:1])[0]) <= EXACT
        there = mask[1].bool()
        assert far(text[1, there], clean(model, ids[1:, there])[0]) <= EXACT


def test_a_hole_after_the_first_token_of_a_static_cache_is_no_document_s_start(model):
    """Position ids 0, 0, 1, 2 are those of padding before a sequence as well: the mask's diagonal
    tells."""
    ids, mask = prompts(), torch.ones(2, PROMPT, dtype=torch.long)
    ids[0, 1], mask[0, 1] = PAD, 0
    ids[1, 0], mask[1, 0] = PAD, 0
    options = dict(
        attention_mask=mask,
        max_new_tokens=4,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    static = model.generate(ids, cache_implementation="static", **options)
    for b in range(2):
        bare = model.generate(ids[b : b + 1, mask[b].bool()], **options | {"attention_mask": None})
        assert torch.equal(static.sequences[b, PROMPT:], bare.sequences[0, PROMPT - 1 :])
        for found, expected in zip(static.logits, bare.logits, strict=True):
            assert far(found[b], expected[0]) <= EXACT


def test_a_mask_of_a_kind_that_does_not_tell_needs_positions_that_follow_each_other(model):
    ids = prompts(1)
    positions = running_positions(torch.ones_like(ids))
    with pytest.raises(InputError, match="go up by one"):
        model(ids, attention_mask={"full_attention": None}, position_ids=positions + 1)


def test_taking_tokens_back_over_holes_equals_never_having_seen_them(model):
    ids, mask = prompts(), torch.ones(2, PROMPT, dtype=torch.long)
    ids[0, 4:6], mask[0, 4:6] = PAD, 0
    positions = running_positions(mask)
    cache = DynamicCache(config=model.config)
    model(ids[:, :7], attention_mask=mask[:, :7], position_ids=positions[:, :7], **cached(cache))
    cache.crop(-4)
    found = logits(
        model, ids[:, 3:], attention_mask=mask, position_ids=positions[:, 3:], **cached(cache)
    )
    for b in range(2):
        there = mask[b].bool()
        assert far(found[b, there[3:]], clean(model, ids[b : b + 1, there])[0, 3:]) <= EXACT


def test_padding_between_documents_is_not_padding_inside_one(model):
    ids, mask = prompts(1), torch.ones(1, PROMPT, dtype=torch.long)
    ids[0, 4:6], mask[0, 4:6] = PAD, 0
    positions = torch.cat(
        [torch.arange(4), torch.zeros(2, dtype=torch.long), torch.arange(PROMPT - 6)]
    )[None]
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
    assert (
        far(logits(model, ids, attention_mask=causal, position_ids=positions), clean(model, ids))
        <= EXACT
    )
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
        found.append(
            logits(
                model,
                ids[:, first:last],
                attention_mask=mask,
                **cached(cache),
                position_ids=positions[:, first:last],
            )
        )
    text = torch.cat(found, 1)
    assert far(text[0], clean(model, ids[:1])[0]) <= EXACT
    assert far(text[1, 3:], clean(model, ids[1:, 3:])[0]) <= EXACT
    with pytest.raises(InputError, match=f"at least {PROMPT + 1}"):
        model(ids[:, :1], attention_mask=mask[:, :1], **cached(cache))


def test_a_cache_that_another_model_filled_on_is_refused(model):
    ids, other = prompts(), build("llama")
    cache = filled(model, ids[:, :5])
    other(ids[:, 5:7], **cached(cache))
    with pytest.raises(InputError, match="the model has seen 7 tokens, the memory 5"):
        model(ids[:, 7:8], **cached(cache))


def test_a_cache_of_another_number_of_sequences_is_refused(model):
    cache = filled(model, prompts(2))
    with pytest.raises(InputError, match="3 sequences, found 2"):
        model(prompts(3)[:, :1], **cached(cache))


def test_what_is_no_cache_of_a_decoder_is_refused(model):
    for wrong in (
        ((torch.zeros(1), torch.zeros(1)),),
        EncoderDecoderCache(DynamicCache(), DynamicCache()),
    ):
        with pytest.raises(InputError, match="expected a Cache of a decoder"):
            model(prompts(), **cached(wrong))


def test_a_cache_outlives_detaching_and_attaching_again(model):
    ids = prompts()
    cache = filled(model, ids[:, :5])
    engraphy.attach(model, engraphy.detach(model))
    assert far(logits(model, ids[:, 5:], **cached(cache)), clean(model, ids)[:, 5:]) <= EXACT


def test_use_cache_false_still_follows_the_cache_that_is_given(model):
    ids = prompts()
    cache = filled(model, ids[:, :5])
    found = logits(model, ids[:, 5:], **cached(cache), use_cache=False)
    assert far(found, clean(model, ids)[:, 5:]) <= EXACT
    assert cache_of(model(ids, use_cache=False)) is None


def test_a_cache_counts_as_many_layers_as_the_model_has(model):
    ids = prompts()
    for cache in (
        DynamicCache(config=model.config),
        DynamicCache(),
        StaticCache(config=model.config, max_cache_len=PROMPT),
    ):
        kind = type(cache)
        model(ids[:, :5], **cached(cache))
        assert len(cache) == len(cache.layers) == model.config.num_hidden_layers
        assert isinstance(cache, kind) and type(cache).__name__ == kind.__name__
        for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            assert len(other) == len(cache) and type(other) is type(cache)
            assert (
                far(logits(model, ids[:, 5:], **cached(other)), clean(model, ids)[:, 5:]) <= EXACT
            )


def test_a_crop_beyond_the_margin_leaves_the_cache_as_it_was(model):
    ids, cache = prompts(), DynamicCache(config=model.config)
    engraphy.attach(model, engraphy.detach(model), margin=2)
    model(ids[:, :8], **cached(cache))
    with pytest.raises(StateTooShort, match="the margin is 2"):
        cache.crop(-3)
    assert far(logits(model, ids[:, 8:], **cached(cache)), clean(model, ids)[:, 8:]) <= EXACT
    with pytest.raises(InputError, match="expected minus the number"):
        cache.crop(3)


def test_a_cache_that_came_with_tokens_is_told_from_one_that_went_on_elsewhere(model):
    ids, other = prompts(), build("llama")
    cache = filled(other, ids[:, :4])
    with pytest.raises(
        InputError, match=r"came with 4 tokens that the memory has not seen.*prefix tuning"
    ):
        model(ids[:, 4:5], **cached(cache))


@pytest.mark.skipif(CACHE != "cache", reason="this version of transformers knows one name alone")
def test_a_cache_is_found_by_its_old_name_and_by_its_new_one(model):
    ids, cache, unused = (
        prompts(),
        DynamicCache(config=model.config),
        DynamicCache(config=model.config),
    )
    calls = (
        {"past_key_values": cache},
        {"cache": cache},
        {"past_key_values": unused, "cache": cache},
    )
    found = []
    for call, part in zip(calls, ids.split([5, 3, PROMPT - 8], 1), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            found.append(model.lm_head(model.model(part, **call).last_hidden_state))
    assert (
        far(torch.cat(found, 1), clean(model, ids)) <= EXACT
        and len(unused) == 3
        and not unused.get_seq_length()
    )


@pytest.mark.parametrize("version", ["5.19.2", "5.25.0", "6.0.0.dev0"])
def test_a_version_that_was_not_tested_is_refused_until_it_is_asked_for(version, monkeypatch):
    model = build("llama")
    monkeypatch.setattr(versions, "__version__", version)
    with pytest.raises(
        ConfigError, match=f"expected a version from 5.20 to 5.24.*found {version}.*=untested"
    ):
        with_memory(model)
    monkeypatch.setenv("ENGRAPHY_TRANSFORMERS", "untested")
    with_memory(model)


def test_ids_of_several_choices_are_flattened_as_the_decoder_does():
    torch.manual_seed(0)
    config = build("gpt2").config
    model = GPT2DoubleHeadsModel(config).double().eval()
    with_memory(model)
    ids = prompts(6).view(2, 3, PROMPT)
    choices = torch.full((2, 3), PROMPT - 1)
    found = model(ids, mc_token_ids=choices, use_cache=False).logits
    for b in range(2):
        expected = model(ids[b : b + 1], mc_token_ids=choices[:1], use_cache=False).logits
        assert far(found[b], expected[0]) <= EXACT
    with pytest.raises(InputError, match=r"input_ids: expected \[B, T\]"):
        model.transformer(ids[0, 0])


def test_a_copy_and_its_original_share_nothing(model):
    ids = prompts()
    cache = filled(model, ids[:, :5])
    copied = copy.deepcopy(cache)
    model(prompts(seed=2)[:, 5:], **cached(copied))
    assert far(logits(model, ids[:, 5:], **cached(cache)), clean(model, ids)[:, 5:]) <= EXACT


def test_sequences_can_be_repeated_and_selected(model):
    ids, wanted = prompts(), torch.tensor([3, 0])
    cache = filled(model, ids[:, :5])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(wanted)
    chosen = ids.repeat_interleave(2, 0)[wanted]
    assert far(logits(model, chosen[:, 5:], **cached(cache)), clean(model, chosen)[:, 5:]) <= EXACT
