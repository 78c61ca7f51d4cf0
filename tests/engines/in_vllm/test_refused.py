"""What a memory was not tried with inside vLLM is refused by name, before anything is loaded."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

SETTINGS: dict[str, dict[str, Any]] = {
    "tensor parallelism": dict(tensor_parallel_size=2),
    "pipeline parallelism": dict(pipeline_parallel_size=2),
    "asynchronous scheduling": dict(async_scheduling=True),
    "speculative decoding": dict(
        speculative_config=dict(method="ngram", num_speculative_tokens=2, prompt_lookup_max=3)
    ),
    "prompt embeddings": dict(enable_prompt_embeds=True),
    "LoRA adapters": dict(enable_lora=True),
    "a KV connector": dict(
        kv_transfer_config=dict(kv_connector="ExampleConnector", kv_role="kv_both")
    ),
}


def configured(model: Any, **settings: Any) -> Any:
    return EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=512,
        kv_cache_memory_bytes=64 << 20,
        **settings,
    ).create_engine_config()


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_was_not_tried_is_named(models, setting):
    with pytest.raises(Exception, match=f"a model with a memory: expected vLLM without {setting}"):
        configured(models / "llama", **SETTINGS[setting])


def test_the_model_is_not_compiled_without_being_asked(models):
    config = configured(models / "llama")
    assert config.model_config.enforce_eager
    assert config.scheduler_config.async_scheduling is False


def test_another_backbone_is_named(models, tmp_path):
    folder = shutil.copytree(models / "llama", tmp_path / "other")
    fields = json.loads((folder / "config.json").read_text())
    fields["text_config"]["architectures"] = ["MistralForCausalLM"]
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(
        Exception, match="expected a backbone of LlamaForCausalLM, Qwen3ForCausalLM"
    ):
        configured(folder)
