"""Settings of the backbone's config in a model that is loaded with its memory."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tools.hf_saved import IDS_BT

SETTINGS = {
    "use_cache": False,
    "output_hidden_states": True,
    "attn_implementation": "eager",
    "num_labels": 5,
    "pad_token_id": 7,
}


def settings_of(model):
    config = model.config
    return {
        "use_cache": config.use_cache,
        "output_hidden_states": config.output_hidden_states,
        "attn_implementation": config._attn_implementation,
        "num_labels": config.num_labels,
        "pad_token_id": config.pad_token_id,
    }


@pytest.mark.parametrize("name", [*SETTINGS, "all"])
def test_settings_of_the_backbones_config_reach_it(saved, base, name):
    wanted = SETTINGS if name == "all" else {name: SETTINGS[name]}
    loaded = AutoModelForCausalLM.from_pretrained(saved, **wanted)
    bare = AutoModelForCausalLM.from_pretrained(base, **wanted)
    assert (
        settings_of(loaded) == settings_of(bare) and settings_of(loaded).items() >= wanted.items()
    )
    config = AutoConfig.from_pretrained(saved, **wanted)
    assert settings_of(AutoModelForCausalLM.from_pretrained(saved, config=config)) == settings_of(
        bare
    )


@pytest.mark.parametrize("inner", [True, False], ids=["on the text config", "on the whole config"])
def test_what_is_set_on_a_config_that_is_given_is_in_force(saved, inner):
    config = AutoConfig.from_pretrained(saved)
    changed = config.text_config if inner else config
    changed.use_cache, changed.output_hidden_states = False, True
    loaded = AutoModelForCausalLM.from_pretrained(saved, config=config)
    assert not loaded.config.use_cache and loaded.config.output_hidden_states
    output = loaded(IDS_BT)
    assert output.past_key_values is None and len(output.hidden_states) == 4
    assert loaded.config.id2label == AutoModelForCausalLM.from_pretrained(saved).config.id2label


def test_a_setting_that_no_config_has_is_refused_as_the_backbone_refuses_it(saved):
    with pytest.raises(TypeError, match="nonsense"):
        AutoModelForCausalLM.from_pretrained(saved, nonsense=1)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_both_names_of_the_dtype_are_the_memorys_too(saved, name):
    half = AutoModelForCausalLM.from_pretrained(saved, **{name: torch.bfloat16})
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
