"""A model is read by its own code: the head of the last layer gives its logits, and reading leaves
nothing behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engraphy import EngramConfig, EngramMemory, HashSpec, LayerSpec, VocabMap
from engraphy.analysis.inspection import pushes
from engraphy.lm import LM, LMConfig
from engraphy.recipes.inspected import reference_subject, transformers_subject
from tests.tools import hf_models, qwen4_models

VOCAB = 40


def reference(tie: bool = False) -> LM:
    torch.manual_seed(0)
    spec = HashSpec.demo((1, 2), (2, 3), 2, 53, vocab_size=VOCAB, pad_id=0)
    config = EngramConfig(spec, LayerSpec(16, spec.columns * 4), 4)
    memory = EngramMemory(config, VocabMap.identity(VOCAB))
    memory.init_rows(1.0, 0)
    sizes = LMConfig(VOCAB, 16, 3, 2, 24, tie_embeddings=tie)
    return LM(sizes, hf_models.wake(memory)).eval()


def attached(name: str):
    return hf_models.with_memory(hf_models.build(name, torch.float32))


def qwen4():
    return qwen4_models.make()


def subject_of(name: str):
    if name == "reference":
        return reference_subject(reference())
    return transformers_subject(qwen4() if name == "qwen4" else attached(name))


NAMES = ["reference", "qwen4", *hf_models.FAMILIES]
IDS_BT = torch.tensor([[5, 9, 9, 7, 31, 6, 5, 9]])


@pytest.mark.parametrize("name", NAMES)
def test_the_head_of_the_last_layer_gives_the_logits_of_the_forward(name):
    subject = subject_of(name)
    with torch.no_grad():
        plain_BTV = subject.forward(IDS_BT, None)
    logits_BTV, trace = subject.read(IDS_BT)
    assert torch.equal(logits_BTV, plain_BTV)
    head = subject.head(IDS_BT)
    assert torch.equal(head(trace.hidden[max(trace.hidden)]), logits_BTV)
    assert not torch.equal(head(trace.hidden[0]), logits_BTV)
    off_BTV, without = subject.read_without(IDS_BT)
    assert torch.equal(head(without.hidden[max(without.hidden)]), off_BTV)
    assert not torch.allclose(off_BTV, logits_BTV)
    first = min(subject.layers)
    for layer in range(len(subject.blocks)):
        same = torch.equal(trace.hidden[layer], without.hidden[layer])
        assert same == (layer < first)
    with torch.no_grad():
        assert torch.equal(subject.forward(IDS_BT, None), plain_BTV)
    assert not any(block._forward_hooks or "forward" in vars(block) for block in subject.blocks)


@pytest.mark.parametrize("name", ["reference", "qwen4", "llama", "deepseek_v4"])
def test_updates_are_what_the_memory_adds(name):
    subject = subject_of(name)
    _, trace = subject.read(IDS_BT)
    layer = subject.layers[0]
    update_BTSD, input_BTSD = trace.updates[layer], trace.inputs[layer]
    assert trace.gates[layer].shape == update_BTSD.shape[:3]
    assert np.array_equal(trace.row_ids[layer], subject.addresser.rows(IDS_BT.numpy(), layer))
    if layer:
        before = trace.hidden[layer - 1].float().reshape(input_BTSD.shape)
        assert torch.equal(before, input_BTSD)
    # Fed to the block without a memory, what the trace says gives what the block returned.
    given = (input_BTSD + update_BTSD).reshape(trace.hidden[layer].shape)
    assert torch.equal(_after(subject, layer, given), trace.hidden[layer])
    assert not torch.equal(_after(subject, layer, 0 * given), trace.hidden[layer])


def _after(subject, layer, given):
    """What the block of a layer returns for hidden states, in a forward without the memory."""
    block = subject.blocks[layer]

    def replaced(module, args, kwargs):
        if args:
            return (given, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": given}

    handle = block.register_forward_pre_hook(replaced, with_kwargs=True)
    try:
        return subject.read_without(IDS_BT)[1].hidden[layer]
    finally:
        handle.remove()


def test_rows_that_add_nothing_push_nowhere_and_a_push_ignores_length():
    subject = subject_of("llama")
    _, trace = subject.read(IDS_BT)
    head = subject.head(IDS_BT)
    layer = subject.layers[0]
    like = trace.hidden[layer]
    assert not pushes(torch.zeros_like(trace.updates[layer]), like, head).any()
    one = pushes(trace.updates[layer], like, head)
    other = pushes(100 * trace.updates[layer], like, head)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_a_push_is_the_projection_on_the_head():
    model = reference()
    subject = reference_subject(model)
    _, trace = subject.read(IDS_BT)
    update_BTD = trace.updates[1][:, :, 0]
    found_BTV = pushes(trace.updates[1], trace.hidden[1], subject.head(IDS_BT))
    projection_BTV = update_BTD * model.norm.weight @ model.head.weight.T
    # The norm divides each token's projection by one number, so both point the same way.
    alike_BT = torch.cosine_similarity(projection_BTV.double(), found_BTV, dim=-1)
    assert (alike_BT > 1 - 1e-10).all()
