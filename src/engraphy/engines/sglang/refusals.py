"""Settings of SGLang under which a memory would miss tokens, or see wrong ones.

A memory has to see the ids of all tokens of a request, and to find what it noted about earlier ones
in their KV slots. What moves keys and values without it, or runs tokens whose ids the host does not
have, is refused by name when the model loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ...errors import ConfigError


class Setting(NamedTuple):
    """A setting of SGLang's, and what it has to be.

    Attributes:
        bag: Where sglang.srt.runtime_context has it: a function, without get_, and perhaps a part
            of what that returns.
        name: Its name there.
        expected: The only value that is accepted; None is as False.
        option: How to get that value.
        reason: Why no other is.
    """

    bag: str
    name: str
    expected: Any
    option: str
    reason: str


_MOVED = "keys and values would move without the memory's values beside them"
_RANKS = "a memory runs in one process"
SETTINGS = (
    Setting(
        "schedule",
        "disable_overlap_schedule",
        True,
        "--disable-overlap-schedule",
        "with overlap scheduling the newest token of a request is not on the host yet",
    ),
    Setting(
        "spec",
        "speculative_algorithm",
        None,
        "no --speculative-algorithm",
        "tokens of a draft may be taken back",
    ),
    Setting("parallel", "tp_size", 1, "--tp-size 1", _RANKS),
    Setting("parallel", "pp_size", 1, "--pp-size 1", _RANKS),
    Setting("parallel", "attn_cp_size", 1, "--attn-cp-size 1", _RANKS),
    Setting("parallel", "dcp_size", 1, "--dcp-size 1", _RANKS),
    Setting("parallel", "enable_dp_attention", False, "no --enable-dp-attention", _RANKS),
    Setting("lora", "enable_lora", False, "no --enable-lora", "not tried"),
    Setting("disagg", "disaggregation_mode", "null", "no --disaggregation-mode", _MOVED),
    Setting("disagg", "enable_pdmux", False, "no --enable-pdmux", "a prefill is cut by layers"),
    Setting("memory", "enable_hierarchical_cache", False, "no --enable-hierarchical-cache", _MOVED),
    Setting("memory", "enable_hisparse", False, "no --enable-hisparse", _MOVED),
    Setting("memory", "enable_lmcache", False, "no --enable-lmcache", _MOVED),
    Setting("memory", "enable_flexkv", False, "no --enable-flexkv", _MOVED),
    Setting(
        "memory",
        "enable_unified_cache_external_linker",
        False,
        "no --enable-unified-cache-external-linker",
        _MOVED,
    ),
    Setting(
        "exec.overlap",
        "enable_two_batch_overlap",
        False,
        "no --enable-two-batch-overlap",
        "a forward is cut into two",
    ),
    Setting(
        "exec.graph",
        "enable_torch_compile",
        False,
        "no --enable-torch-compile",
        "reading rows is not compiled",
    ),
    Setting(
        "exec.dllm",
        "dllm_algorithm",
        None,
        "no --dllm-algorithm",
        "tokens of a block are written more than once",
    ),
)


def check_settings(found: Mapping[str, Any], graphs: bool) -> None:
    """Raises ConfigError naming the settings that a memory cannot be combined with.

    Args:
        found: Their values by name.
        graphs: Whether SGLang captures CUDA graphs.
    """
    wrong = [
        f"{setting.name}: expected {setting.expected!r} ({setting.option}), "
        f"found {found[setting.name]!r}: {setting.reason}"
        for setting in SETTINGS
        if (found[setting.name] or None) != (setting.expected or None)
    ]
    if graphs:
        wrong.append(
            "CUDA graphs: expected none (--disable-cuda-graph): reading rows is not captured"
        )
    if wrong:
        raise ConfigError("a memory inside SGLang: " + "; ".join(wrong))
