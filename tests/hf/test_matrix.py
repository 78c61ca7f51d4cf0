"""Every way of decoding gives what the clean forward gives, on every family of models, with a
memory attached.

A mode (hf_modes.py) tells how far its logits are from one call over the whole, unpadded, uncached
text. In float64 that is rounding, unless the bare model is further from itself: BARE_ROUNDS and
BARE_FAILS say where and why, and are tested. What the DeepSeeks compute in float32 is computed in
float64 for this (hf_models.py): a bit of rounding before a router would be as large as a fault.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from tests.tools.hf_models import FAMILIES, all_in_float64, run_of
from tests.tools.hf_modes import FORWARD, TEXT

pytestmark = pytest.mark.slow

EXACT = 1e-9
ROUNDING = 1e-4  # what float32 parts of a model may cost; a mode that fails is beyond it
FLOAT32 = 1e-3  # in float32, where the text is what counts

ANY = "any"
_OTHER = None  # no error: other logits or another text
_STATEFUL = (ValueError, "transformers drafts for no model with state that cannot be taken back")
_NO_STATIC = (KeyError, "transformers has no static cache for its compressed attention")
_WINDOWS = (_OTHER, "its compressors count windows from the first column, padding included")
_ALL_FULL = (ValueError, "transformers quantises caches of full attention alone")
_COUNTED = (_OTHER, "absolute positions count the padding")
_SLIDING = (_OTHER, "its sliding windows count holes")

# Where the bare model does not hold: (family, mode) -> its error, and why. Nothing is asked of the
# memory there.
BARE_FAILS = {
    (ANY, "offloaded cache"): ((AssertionError, RuntimeError), "needs an accelerator's streams"),
    ("gpt2", "left padding, no positions"): _COUNTED,
    ("gpt2", "left padding, no positions, cached"): _COUNTED,
    ("gpt_oss", "packed documents"): (_OTHER, "its masks do not look at position ids"),
    ("mistral", "quantised cache"): _ALL_FULL,
    ("gemma3", "quantised cache"): _ALL_FULL,
    ("gpt_oss", "quantised cache"): _ALL_FULL,
    ("deepseek_v4", "quantised cache"): _ALL_FULL,
    ("deepseek_v4", "cache without config"): (AttributeError, "its cache layers are its own"),
    ("deepseek_v4", "static chunks"): _NO_STATIC,
    ("deepseek_v4", "static cache"): _NO_STATIC,
    ("deepseek_v4", "static cache, prefill in chunks"): _NO_STATIC,
    ("deepseek_v4", "static cache, left padding"): _NO_STATIC,
    ("deepseek_v4", "static cache, reset and used again"): _NO_STATIC,
    ("deepseek_v4", "left padding, no positions"): _WINDOWS,
    ("deepseek_v4", "left padding, positions"): _WINDOWS,
    ("deepseek_v4", "left padding, no positions, cached"): _WINDOWS,
    ("deepseek_v4", "left padding, positions, cached"): _WINDOWS,
    ("deepseek_v4", "batch with left padding"): _WINDOWS,
    ("deepseek_v4", "packed documents"): _WINDOWS,
    ("deepseek_v4", "tokens taken back"): (
        RuntimeError,
        "its compressors' state is not taken back with the tokens",
    ),
    ("deepseek_v4", "prompt lookup"): _STATEFUL,
    ("deepseek_v4", "assisted"): _STATEFUL,
    ("deepseek_v4", "assisted by a model with a memory"): _STATEFUL,
}

# Where the bare model in float64 is off by float32 rounding: its own distance is then the memory's
# tolerance.
BARE_ROUNDS = {
    (ANY, "left padding, no positions"): "rotary tables are float32, and the positions are shifted",
    (
        ANY,
        "left padding, no positions, cached",
    ): "rotary tables are float32, and the positions are shifted",
    (ANY, "quantised cache"): "codes of 32 bits",
}
if Version(transformers.__version__) < Version("5.23"):
    BARE_FAILS["deepseek_v4", "beams"] = (
        _OTHER,
        "its compressors' state does not follow the beams",
    )
MODES = FORWARD | TEXT
for _mode in (
    "right padding, then more tokens",
    "holes",
    "holes, cached",
    "holes in the prompt",
    "holes in the prompt that generate() finds",
    "static cache, holes in the prompt",
    "holes in the prompt, prefill in chunks",
):
    BARE_FAILS |= {(family, _mode): _SLIDING for family in ("mistral", "gemma3", "gpt_oss")}
    BARE_FAILS["deepseek_v4", _mode] = _NO_STATIC if "static" in _mode else _WINDOWS
BARE_FAILS["deepseek_v4", "beams over holes"] = _WINDOWS


def reason(table: dict[tuple[str, str], Any], family: str, mode: str) -> Any:
    return next((table[key] for key in ((family, mode), (ANY, mode)) if key in table), None)


def pairs(modes: dict, fail: bool) -> list:
    return [
        pytest.param(family, mode, id=f"{family}-{mode.replace(' ', '_')}")
        for family in FAMILIES
        for mode in modes
        if (reason(BARE_FAILS, family, mode) is not None) == fail
    ]


@torch.no_grad()
def distance(
    family: str, mode: str, dtype: torch.dtype = torch.float64, memory: bool = True
) -> float:
    with (
        all_in_float64()
        if dtype is torch.float64 and family.startswith("deepseek")
        else nullcontext()
    ):
        return MODES[mode](run_of(family, dtype, memory))


@pytest.mark.parametrize("family, mode", pairs(MODES, fail=False))
def test_decoding_with_a_memory_is_the_clean_forward(family, mode):
    tolerance = EXACT
    if reason(BARE_ROUNDS, family, mode):
        bare = distance(family, mode, memory=False)
        tolerance = max(EXACT, 10 * bare)
        if mode in FORWARD:
            assert EXACT < bare <= ROUNDING, "the table is wrong"
    assert distance(family, mode) <= tolerance <= ROUNDING


@pytest.mark.parametrize("family, mode", pairs(TEXT, fail=False))
def test_the_text_in_float32_is_the_clean_forwards(family, mode):
    assert distance(family, mode, torch.float32) <= FLOAT32


@pytest.mark.parametrize("family, mode", pairs(MODES, fail=True))
def test_the_bare_model_fails_where_the_table_says_so(family, mode):
    error, _ = reason(BARE_FAILS, family, mode)
    if error is _OTHER:
        assert distance(family, mode, memory=False) > ROUNDING
    else:
        with pytest.raises(error):
            distance(family, mode, memory=False)
