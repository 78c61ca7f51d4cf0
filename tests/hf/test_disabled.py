"""A model without its memory for a moment: the bare model bit for bit, no cache out of step."""

from __future__ import annotations

import contextvars
import threading

import peft
import pytest
import torch
from transformers import DynamicCache, StaticCache

import engraphy
from engraphy import Trace
from engraphy.errors import InputError
from tests.tools.hf_models import FAMILIES, answers, build, with_memory
from tests.tools.tiny_training import attach_tiny, tiny_model, token_data

IDS_BT = torch.stack([each["input_ids"] for each in token_data(2)])


def attached():
    """(model, memory, logits of the bare model, logits with the memory)."""
    model = tiny_model().eval()
    without = logits(model)
    memory = attach_tiny(model)
    return model, memory, without, logits(model)


@torch.no_grad()
def logits(model, **options):
    return model(IDS_BT, **options).logits


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_disabled_memory_leaves_every_family_bit_for_bit(family):
    ids_BT = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))

    model = build(family, torch.float32)
    before = answers(model, ids_BT)
    with_it = answers(with_memory(model), ids_BT)
    assert not torch.equal(with_it, before)
    with model.engraphy.disabled():
        assert torch.equal(answers(model, ids_BT), before)
    assert torch.equal(answers(model, ids_BT), with_it)


def test_what_a_memory_refuses_is_the_bare_model_s_matter_while_it_is_disabled():
    model, memory, without, _ = attached()
    embedded = model.get_input_embeddings()(IDS_BT)
    hole = torch.ones_like(IDS_BT)
    with memory.disabled():
        with torch.no_grad():
            assert torch.equal(model(inputs_embeds=embedded).logits, without)
            assert model(IDS_BT, attention_mask=hole[:, None, None].bool()).logits.isfinite().all()
        trace = Trace()
        assert torch.equal(logits(model, engraphy_trace=trace), without)
        assert not trace.gates and not trace.row_ids
    with pytest.raises(InputError, match="inputs_embeds"):
        model(inputs_embeds=embedded)


def test_it_may_be_nested_and_an_error_ends_it():
    model, memory, without, with_it = attached()
    with memory.disabled():
        with memory.disabled():
            assert not memory.enabled
        assert torch.equal(logits(model), without)
    assert memory.enabled and torch.equal(logits(model), with_it)
    with pytest.raises(RuntimeError), memory.disabled():
        raise RuntimeError
    assert memory.enabled and torch.equal(logits(model), with_it)


def test_another_memory_stays_as_it_is():
    (_, memory, _, _), (other, _, _, with_it) = attached(), attached()
    with memory.disabled():
        assert torch.equal(logits(other), with_it)


def test_other_threads_go_on_with_the_memory():
    model, memory, without, with_it = attached()
    found = {}
    with memory.disabled():
        context = contextvars.copy_context()
        for name, run in (
            ("fresh", logits),
            ("handed on", lambda model: context.run(logits, model)),
        ):
            thread = threading.Thread(
                target=lambda name=name, run=run: found.update({name: run(model)})
            )
            thread.start()
            thread.join()
        assert torch.equal(logits(model), without)
    assert torch.equal(found["fresh"], with_it)
    assert torch.equal(found["handed on"], without)


@pytest.mark.parametrize(
    "cache_of",
    [
        lambda model: DynamicCache(config=model.config),
        lambda model: StaticCache(model.config, max_cache_len=40),
    ],
    ids=["dynamic", "static"],
)
@torch.no_grad()
def test_a_cache_that_saw_tokens_while_it_was_disabled_is_refused_afterwards(cache_of):
    model, memory, without, _ = attached()
    with memory.disabled():
        cache = cache_of(model)
        model(IDS_BT[:, :-1], past_key_values=cache)
        last = model(IDS_BT[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(last, without[:, -1:])
    with pytest.raises(InputError, match="the model has seen 12 tokens, the memory 0"):
        model(IDS_BT[:, :1], past_key_values=cache)
    cache = cache_of(model)
    model(IDS_BT, past_key_values=cache)
    with memory.disabled():
        model(IDS_BT[:, :2], past_key_values=cache)
    with pytest.raises(InputError, match="the model has seen 14 tokens, the memory 12"):
        model(IDS_BT[:, :1], past_key_values=cache)


def test_a_cache_that_is_taken_back_does_not_come_into_step_again():
    model, memory, _, _ = attached()
    with torch.no_grad():
        cache = model(IDS_BT, use_cache=True).past_key_values
        with memory.disabled():
            model(IDS_BT[:, :2], past_key_values=cache)
        cache.crop(-2)
        with pytest.raises(InputError, match="the model has seen 12 tokens, the memory 10"):
            model(IDS_BT[:, :1], past_key_values=cache)


def test_compiled_blocks_stay_compiled():
    model, memory, without, with_it = attached()
    torch.compiler.reset()
    for block in model.model.layers:
        block.compile(backend="eager")
    try:
        torch.testing.assert_close(logits(model), with_it)
        logits(model)
        with torch.compiler.set_stance("fail_on_recompile"):
            with memory.disabled():
                assert torch.equal(logits(model), without)
            torch.testing.assert_close(logits(model), with_it)
    finally:
        torch.compiler.reset()


def test_gradients_flow_past_a_disabled_memory_and_none_reaches_its_rows():
    model, memory, _, _ = attached()
    model.train()
    model.gradient_checkpointing_enable()
    with memory.disabled():
        loss = model(IDS_BT, labels=IDS_BT, use_cache=False).loss
    loss.backward()  # blocks run again, outside
    assert memory.row_grads == []
    assert all(parameter.grad is None for parameter in memory.parameters())
    assert all(parameter.grad is not None for parameter in model.model.layers.parameters())


def lora(**changes):
    settings = dict(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    return peft.LoraConfig(**(settings | changes))


@pytest.mark.parametrize("order", ["attached first", "attached last"])
def test_disabling_the_adapters_disables_the_memory(order, caplog):
    model = tiny_model().eval()
    bare = logits(model)
    memory = attach_tiny(model) if order == "attached first" else None
    alone = None if memory is None else logits(model)
    adapted = peft.get_peft_model(model, lora()).eval()
    memory = memory or attach_tiny(adapted)
    both = logits(adapted)
    with caplog.at_level("INFO", "engraphy"), adapted.disable_adapter():
        assert torch.equal(logits(adapted), bare)
        assert torch.equal(logits(adapted), bare)
        memory.follows_adapters = False
        with_memory_alone = logits(adapted)
        memory.follows_adapters = True
    assert len([line for line in caplog.messages if "follows_adapters" in line]) == 1
    assert not torch.equal(with_memory_alone, bare)
    assert alone is None or torch.equal(with_memory_alone, alone)
    assert torch.equal(logits(adapted), both)


def test_adapters_that_come_and_go_are_noticed():
    model, memory, without, with_it = attached()
    for _ in range(2):
        adapted = peft.get_peft_model(model, lora()).eval()
        with adapted.disable_adapter():
            assert torch.equal(logits(adapted), without)
            adapted.add_adapter("other", lora(target_modules=["q_proj", "lm_head"]))
        adapted.base_model.disable_adapter_layers()
        assert torch.equal(logits(adapted), without)
        adapted.base_model.model.model.layers[0].self_attn.q_proj.enable_adapters(True)
        assert not torch.equal(logits(adapted), without)
        assert adapted.unload() is model
        assert torch.equal(logits(model), with_it)


def test_transformers_own_way_of_disabling_adapters_reaches_it_too():
    model, _, without, with_it = attached()
    try:
        model.add_adapter(lora())
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))  # transformers 5.24 asks for a PEFT that is not out yet
    model.disable_adapters()
    assert torch.equal(logits(model), without)
    model.enable_adapters()
    assert not torch.equal(logits(model), with_it)


def test_a_detached_memory_was_disabled_for_nobody():
    model, memory, without, _ = attached()
    with memory.disabled():
        engraphy.detach(model)
        assert torch.equal(logits(model), without)
