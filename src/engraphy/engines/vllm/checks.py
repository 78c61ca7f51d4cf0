"""Which settings of vLLM a memory was tried with; the others are refused by name."""

# pyright: reportMissingImports=false
from __future__ import annotations

import logging
from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from ...errors import ConfigError


class MemoryModelConfig(VerifyAndUpdateConfig):
    """vLLM calls it for a model with a memory, before anything is loaded."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Turns compilation off. Raises ConfigError for a setting that was not tried."""
        for setting, found in refused(vllm_config).items():
            if found:
                raise ConfigError(
                    f"a model with a memory: expected vLLM without {setting}, found {found}"
                )
        model = vllm_config.model_config
        if not model.enforce_eager:
            logging.getLogger("engraphy").info(
                "enforce_eager is set: rows are read by Python, which vLLM does not compile"
            )
            model.enforce_eager = True
        vllm_config.scheduler_config.scheduler_cls = (
            "engraphy.engines.vllm.scheduler.MemoryScheduler"
        )
        if vllm_config.device_config.device_type == "cpu":
            vllm_config.parallel_config.worker_cls = "engraphy.engines.vllm.worker.MemoryWorker"
        # None lets vLLM choose, and it chooses True on a GPU.
        vllm_config.scheduler_config.async_scheduling = False


def refused(vllm_config: Any) -> dict[str, Any]:
    """Settings that a memory was not tried with -> what is set, or something false."""
    parallel = vllm_config.parallel_config
    speculative = vllm_config.speculative_config
    return {
        "tensor parallelism": parallel.tensor_parallel_size > 1 and parallel.tensor_parallel_size,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1
        and parallel.pipeline_parallel_size,
        "decode context parallelism": parallel.decode_context_parallel_size > 1
        and parallel.decode_context_parallel_size,
        "micro-batches (DBO)": parallel.use_ubatching,
        "asynchronous scheduling": vllm_config.scheduler_config.async_scheduling,
        "speculative decoding": speculative and speculative.method,
        "prompt embeddings": vllm_config.model_config.enable_prompt_embeds,
        "LoRA adapters": vllm_config.lora_config,
        "a KV connector": vllm_config.kv_transfer_config,
    }
