"""What a memory can join is found before anything is made: a forward of one token up to the first
block."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from packaging.version import Version
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

import engraphy
from engraphy import EngramConfig
from engraphy.errors import ConfigError, InputError
from engraphy.hf.backbone import find_backbone
from engraphy.hf.joins import check_joins
from tests.tools.hf_models import FAMILIES, build, with_memory
from tests.tools.hf_modes import prompts

VOCAB = 97
_SIZES = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, pad_token_id=0)
_HEADS = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=48)
_VISION = dict(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    image_size=28,
    patch_size=14,
)
NOT_JOINED = {
    "bloom": (
        lambda: tf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=3, n_head=4),
        "hands keyword arguments",
    ),
    "falcon": (lambda: tf.FalconConfig(**_SIZES, num_attention_heads=4), "hands keyword arguments"),
    "gptj": (
        lambda: tf.GPTJConfig(
            vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, rotary_dim=4, pad_token_id=0
        ),
        "hands keyword arguments",
    ),
    "mamba2": (
        lambda: tf.Mamba2Config(**_SIZES, state_size=8, num_heads=4, head_dim=16, n_groups=1),
        "expected a decoder with a cache of attention layers",
    ),
    "gemma3, multimodal": (
        lambda: tf.Gemma3Config(text_config=_SIZES | _HEADS, vision_config=_VISION),
        "hands token ids to its decoder",
    ),
}
MINIMAX = dict(
    **_SIZES,
    **_HEADS,
    num_local_experts=2,
    num_experts_per_tok=1,
    block_size=4,
    layer_types=["full_attention", "linear_attention", "full_attention"],
)


@pytest.fixture
def model():
    return build("llama")


def refused(model, match):
    config = EngramConfig.for_model(
        model.config.get_text_config(), layers=(1, 2), heads=2, rows_per_head=101, dim=8, pad_id=0
    )
    with pytest.raises(ConfigError, match=match):
        engraphy.attach(model, config)
    assert not hasattr(model, "engraphy")
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", [name for name in NOT_JOINED if name not in FAMILIES])
def test_models_that_cannot_have_a_memory_are_told_so_when_it_is_attached(name):
    config, match = NOT_JOINED[name]
    refused(AutoModelForCausalLM.from_config(config()), match)


def test_blocks_that_take_no_keywords_of_others_are_refused(model):
    model.model.layers[0].forward = lambda hidden_states: hidden_states
    refused(model, "expected blocks that take keyword arguments of others, found LlamaDecoderLayer")


def test_a_decoder_with_a_cache_of_its_own_is_refused():
    refused(AutoModelForCausalLM.from_config(tf.MiniMaxConfig(**MINIMAX)), "cache of its own")


def test_a_model_that_drops_layers_in_training_may_drop_the_memorys():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        tf.OPTConfig(
            **_SIZES, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=32, layerdrop=0.5
        )
    ).train()
    with_memory(model)
    for _ in range(10):
        model(prompts(), use_cache=False)


def test_blocks_that_were_compiled_without_breaks_are_looked_at_as_they_are(model):
    ids = prompts()
    model.model.layers[0].compile(backend="eager", fullgraph=True)
    with torch.no_grad():
        bare = model(ids).logits
        with_memory(model)
        assert not torch.allclose(model(ids).logits, bare)
    torch.compiler.reset()


def test_hidden_states_of_another_shape_are_refused(model):
    model.model.embed_tokens.register_forward_hook(lambda _, args, out: out.repeat(1, 1, 2))
    refused(model, r"get hidden states \[1, 1, 32\] for one token, found \[1, 1, 64\]")


def test_a_model_that_does_not_run_is_refused(model):
    def fail(*_):
        raise RuntimeError("no luck")

    model.model.embed_tokens.register_forward_hook(fail)
    refused(model, "found RuntimeError before its first block: no luck")


def test_a_decoder_that_never_calls_its_blocks_is_refused(model):
    nothing = BaseModelOutputWithPast(last_hidden_state=torch.zeros(1, 1, 32, dtype=torch.float64))
    # takes a cache by the name of every version
    model.model.forward = lambda input_ids=None, past_key_values=None, cache=None, **kwargs: nothing
    refused(model, "expected a forward that calls its blocks")


@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek_v4"])
def test_looking_changes_nothing_not_even_random_numbers(family):
    model = build(family).train()
    before, random = (
        {name: value.clone() for name, value in model.state_dict().items()},
        torch.get_rng_state(),
    )
    check_joins(model, find_backbone(model))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())


def test_a_cache_that_carries_no_state_of_the_memory_is_refused(model):
    with_memory(model)
    with pytest.raises(InputError, match="not generate_batch"):
        model(prompts(), cache=object())


@pytest.mark.skipif(
    Version(tf.__version__) < Version("5.23"), reason="an error there ends the whole process"
)
def test_continuous_batching_is_refused(model):
    """It hands pages of its own to the decoder, token by token."""
    with_memory(model)
    options = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1, pad_token_id=0)
    pages = tf.ContinuousBatchingConfig(num_blocks=4, block_size=32, max_batch_tokens=32)
    told = model.float().generate_batch([prompts()[0].tolist()], options, pages)
    assert told and all("not generate_batch" in each.error for each in told.values())


@torch.no_grad()
def test_a_token_without_a_cache_is_the_first_one_or_refused(model):
    with_memory(model)
    ids, mask = prompts()[:, :1], torch.ones(2, 1, 1, 1, dtype=torch.bool)
    model(ids, position_ids=torch.tensor([[0]]), attention_mask=mask, use_cache=False)
    with pytest.raises(InputError, match="begin at 0"):
        model(ids, position_ids=torch.tensor([[11]]), attention_mask=mask, use_cache=False)
