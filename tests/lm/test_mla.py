"""Multi-head latent attention: DeepSeek's numbers, documents, and decoding over its cache."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from engraphy.errors import ConfigError, InputError
from engraphy.lm import LM, LMConfig, MLAConfig, YarnConfig
from engraphy.lm.mla import LatentAttention
from engraphy.lm.yarn import rotary_table, temperature
from tests.lm.test_model import MOE, VOCAB, make_memory, sample

SIZES = MLAConfig(kv_rank=12, plain=8, turned=4, value=6, query_rank=10)
YARN = YarnConfig(4.0, trained_tokens=8)
LATENT = dataclasses.replace(MOE, heads=3, mla=SIZES)
PAPER = dataclasses.replace(LATENT, streams=4, yarn=YARN)
DIRECT = dataclasses.replace(LATENT, mla=dataclasses.replace(SIZES, query_rank=None))


def make(config: LMConfig, memory: bool = True) -> LM:
    torch.manual_seed(0)
    return LM(config, make_memory(streams=config.streams) if memory else None).eval()


@pytest.mark.parametrize("query_rank", [10, None])
@pytest.mark.parametrize("yarn", [None, YarnConfig(4.0, trained_tokens=64)])
def test_attention_equals_deepseek_v3s(query_rank, yarn):
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

    rope: dict[str, object] = {"rope_type": "default", "rope_theta": 10_000.0}
    if yarn is not None:
        rope |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
        rope |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    config = transformers.DeepseekV3Config(
        hidden_size=24,
        num_attention_heads=3,
        num_key_value_heads=3,
        kv_lora_rank=12,
        q_lora_rank=query_rank,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
        max_position_embeddings=256,
        rope_parameters=rope,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    oracle = modeling.DeepseekV3Attention(config, 0)
    sizes = dataclasses.replace(SIZES, query_rank=query_rank)
    ours = LatentAttention(24, 3, sizes, 1e-6, temperature(yarn))
    names = {
        "q_a_proj": "query_down",
        "q_a_layernorm": "query_norm",
        "q_b_proj": "query",
        "q_proj": "query",
        "kv_a_proj_with_mqa": "latent",
        "kv_a_layernorm": "latent_norm",
        "kv_b_proj": "key_value",
        "o_proj": "out",
    }
    with torch.no_grad():
        for parameter in oracle.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    state = {}
    for name, value in oracle.state_dict().items():
        module, _, rest = name.partition(".")
        state[f"{names[module]}.{rest}"] = value
    ours.load_state_dict(state)
    x = torch.randn(2, 9, 24)
    positions = modeling.DeepseekV3RotaryEmbedding(config)(x, torch.arange(9)[None])
    mask = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    expected, _ = oracle(x, positions, mask)
    rotation = torch.view_as_complex(rotary_table(9, 2, 10_000.0, yarn))
    torch.testing.assert_close(ours(x, rotation, None), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(x, rotation, mask), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunks", [[1] * 16, [7, 1, 1, 4, 3]])
@pytest.mark.parametrize("config", [MOE, LATENT, DIRECT, PAPER])
def test_decoding_over_the_cache_equals_one_forward_in_float64(config, chunks):
    model = make(config).double()
    ids, _, _ = sample()
    cache = model.new_cache(len(ids))
    with torch.no_grad():
        expected = model(ids)
        parts = [model(part, cache=cache) for part in ids.split(chunks, 1)]
    assert cache.tokens == 16
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-9)


def test_the_cache_keeps_the_latent_and_one_key_a_token():
    model = make(LATENT, memory=False)
    cache = model.new_cache(2)
    model(torch.zeros(2, 5, dtype=torch.int64), cache=cache)
    assert cache.values() == 2 * 5 * LATENT.layers * (SIZES.kv_rank + SIZES.turned)


@pytest.mark.parametrize("config", [LATENT, PAPER])
def test_packed_documents_get_the_logits_that_each_gets_alone(config):
    model, (ids, _, _) = make(config), sample(batch=1, tokens=20)
    starts = torch.zeros(1, 20, dtype=torch.bool)
    starts[0, [0, 7, 8, 15]] = True
    packed = model(ids, starts)
    for begin, end in ((0, 7), (7, 8), (8, 15), (15, 20)):
        torch.testing.assert_close(
            packed[:, begin:end], model(ids[:, begin:end]), rtol=1e-4, atol=1e-4
        )
    assert not torch.allclose(packed[:, 8:], model(ids)[:, 8:], atol=1e-3)


def test_autocast_to_bfloat16_stays_close_and_gives_gradients():
    model, (ids, targets, starts) = make(PAPER).train(), sample()
    plain = model.loss(ids, targets, starts)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(ids, targets, starts)
    loss.backward()
    torch.testing.assert_close(loss, plain, rtol=0.02, atol=0.02)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_generation_over_the_cache_takes_the_likeliest_token_and_outlives_the_longest_row():
    model = make(PAPER)
    ids = [3, 1, 4]
    found = model.generate(ids, 34)
    assert len(ids) + len(found) > PAPER.max_tokens + 2
    for token in found:
        row = torch.tensor([ids[-PAPER.max_tokens :]])
        assert token == int(model(row)[0, -1].argmax())
        ids.append(token)


def test_a_cache_that_does_not_fit_is_refused():
    model, (ids, _, starts) = make(LATENT), sample()
    with pytest.raises(InputError, match="starts"):
        model(ids, starts, cache=model.new_cache(3))
    with pytest.raises(InputError, match="2 sequences"):
        model(ids, cache=model.new_cache(2))
    cache = model.new_cache(3)
    model(ids, cache=cache)
    model(ids[:, :15], cache=cache)
    with pytest.raises(InputError, match="at most 1 more"):
        model(ids[:, :2], cache=cache)
    assert cache.tokens == 31
    model(ids[:, :1], cache=cache)


def test_sizes_survive_json_and_old_configs_stay_as_they_were():
    for config in (PAPER, LATENT, DIRECT):
        assert LMConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert {"mla", "yarn", "streams"}.isdisjoint(MOE.to_json())
    with pytest.raises(ConfigError, match="LMConfig"):
        LMConfig.from_json({**PAPER.to_json(), "mla": {"rank": 3}})


@pytest.mark.parametrize("change", [{"turned": 3}, {"kv_rank": 0}, {"query_rank": 0}])
def test_widths_that_cannot_be_meant_are_refused(change):
    with pytest.raises(ConfigError, match="mla"):
        dataclasses.replace(SIZES, **change)


def test_heads_of_latent_attention_need_not_divide_the_hidden_size():
    model = LM(LMConfig(VOCAB, 10, layers=1, heads=3, ffn=8, mla=SIZES))
    assert model(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 4, VOCAB)
