"""Gradients of an attached memory: checkpointed, cached, beside LoRA; and the memory in compiled
models."""

from __future__ import annotations

import math
import os
import shutil

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.modeling_layers import GradientCheckpointingLayer

import engraphy
from engraphy.errors import InputError
from tests.tools.hf_models import FAMILIES, Run, build, cached, run_of, with_memory
from tests.tools.hf_modes import (
    FORWARD,
    TEXT,
    blocks_of,
    clean,
    compiled_layers,
    far,
    logits,
    prompts,
)

pytestmark = pytest.mark.slow

EXACT = 1e-9
SHARED_CALL = "__call__" in vars(
    GradientCheckpointingLayer
)  # transformers 5.20: compiled once for all blocks


def gradients(model, **kwargs):
    """Of the memory's parameters by name, and of its rows by layer, after one backward."""
    memory = model.engraphy
    model.zero_grad()
    torch.manual_seed(0)  # dropout
    ids = prompts()
    model(ids, labels=ids, **kwargs).loss.backward()
    found = {name: parameter.grad.numpy().copy() for name, parameter in memory.named_parameters()}
    for part in memory.drain_row_grads():
        found |= {f"ids {part.layer}": part.ids, f"rows {part.layer}": part.grad}
    return found


def assert_equal(found, expected):
    assert list(found) == list(expected) and any(name.startswith("rows") for name in found)
    for name, values in expected.items():
        assert np.abs(values).max() > 0
        np.testing.assert_allclose(
            found[name], values, atol=EXACT * max(1, np.abs(values).max()), rtol=0, err_msg=name
        )


@pytest.fixture(scope="module", params=FAMILIES)
def training(request):
    """A model of the family in training mode, and its gradients without checkpointing."""
    model = with_memory(build(request.param)).train()
    return model, gradients(model, use_cache=False)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient(training, reentrant):
    model, expected = training
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    runs = []
    hook = next(blocks_of(model)[1].children()).register_forward_hook(lambda *_: runs.append(1))
    assert_equal(gradients(model), expected)
    assert len(runs) == 2  # forward, and again in backward
    hook.remove()
    model.gradient_checkpointing_disable()


def test_a_cache_changes_no_gradient(training):
    """use_cache is on by default, in training too."""
    model, expected = training
    assert_equal(gradients(model), expected)


def test_a_memory_beside_lora_decodes_and_learns():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False
    )
    attached = with_memory(build("llama"))
    for model in (
        peft.get_peft_model(attached, config),
        with_memory(peft.get_peft_model(build("llama"), config)),
    ):
        inner = model.get_base_model()
        inner.engraphy.requires_grad_(True)
        found = gradients(inner.train())
        assert {"rows 1", "rows 2", "blocks.1.value.weight"} <= set(found)
        assert all(
            parameter.grad is not None
            for name, parameter in model.named_parameters()
            if "lora_" in name
        )
        assert not [name for name, _ in inner.engraphy.named_parameters() if "lora_" in name]
        model.eval()
        with torch.no_grad():
            assert FORWARD["chunks"](Run(model, None, None)) <= EXACT
            assert TEXT["greedy"](Run(inner, None, None)) <= EXACT
        engraphy.detach(model)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_compiled_layers_decode_on_a_static_cache(family):
    model, ids = run_of(family, torch.float64, memory=True).model, prompts()
    cache, expected = (
        StaticCache(config=model.config, max_cache_len=ids.shape[1]),
        clean(model, ids),
    )
    first = logits(model, ids[:, :8], **cached(cache))
    with compiled_layers(model, backend="aot_eager"):
        rest = [logits(model, part, **cached(cache)) for part in ids[:, 8:].split(1, 1)]
    assert far(torch.cat([first, *rest], 1), expected) <= EXACT


@torch.no_grad()
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_layers_compiled_to_machine_code_are_as_near_as_the_bare_ones():
    """The compiler fuses the float32 parts of the model's norms."""
    found = []
    for memory in (False, True):
        model, ids = run_of("llama", torch.float64, memory).model, prompts()
        expected = clean(model, ids)
        with compiled_layers(model, backend="inductor"):
            found.append(far(clean(model, ids), expected))
    bare, with_a_memory = found
    if (
        math.isnan(bare) and "ATEN_CPU_CAPABILITY" in os.environ
    ):  # seen with avx2 on a CPU with AVX-512
        pytest.skip("with this ATEN_CPU_CAPABILITY what torch compiles of the bare model gives NaN")
    assert with_a_memory <= 10 * bare <= 1e-4


@torch.no_grad()
def test_a_compiled_model_notices_that_its_memory_comes_and_goes():
    """A compiler does not look for hooks again."""
    model, ids = with_memory(build("llama")), prompts()
    with_it, memory = clean(model, ids), engraphy.detach(model)
    without = clean(model, ids)
    blocks = blocks_of(model)
    for block in blocks:
        block.compile(backend="eager")
    assert far(clean(model, ids), without) <= EXACT
    engraphy.attach(model, memory)
    assert far(clean(model, ids), with_it) <= EXACT < far(with_it, without)
    engraphy.detach(model)
    for block in blocks:
        block._compiled_call_impl = None
    compiled = torch.compile(model, backend="eager")
    assert far(clean(compiled, ids), without) <= EXACT
    engraphy.attach(model, memory)
    if SHARED_CALL:
        with pytest.raises(InputError, match="compile the blocks"):
            clean(compiled, ids)
    else:
        assert far(clean(compiled, ids), with_it) <= EXACT
    engraphy.detach(model)
    assert far(clean(compiled, ids), without) <= EXACT
    torch.compiler.reset()


def test_a_whole_compiled_model_is_the_same():
    """Its graph breaks where the memory is looked up; the state travels in the cache as ever."""
    model, ids = with_memory(build("llama")), prompts()
    expected = gradients(model.train(), use_cache=False)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    if SHARED_CALL:
        with pytest.raises(InputError, match="compile the blocks"):
            gradients(compiled, use_cache=False)
        return
    assert_equal(gradients(compiled, use_cache=False), expected)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")  # without gradients the other one adds nothing
    with torch.no_grad():
        cache, parts = DynamicCache(config=model.config), ids.split([9, 1, 1], 1)
        found = [logits(compiled.eval(), part, **cached(cache)) for part in parts]
        assert far(torch.cat(found, 1), clean(model, ids)) <= EXACT
    torch.compiler.reset()
    assert engraphy.detach(compiled) is not None
