"""Every way of decoding gives what the clean forward gives, on every family of models, with a memory attached.

A mode (hf_modes.py) tells how far its logits are from one call over the whole, unpadded, uncached text. In float64 that
is rounding, unless the bare model is further from itself: BARE_ROUNDS and BARE_FAILS say where and why, and are tested.
"""

from __future__ import annotations

import functools

import pytest
import torch
from hf_models import FAMILIES, run_of
from hf_modes import FORWARD, TEXT

EXACT = 1e-9
ROUNDING = 1e-4  # what float32 parts of a model may cost; a mode that fails is beyond it
FLOAT32 = 1e-3  # in float32, where the text is what counts

ANY = "any"
_STATEFUL = "its compressors keep state that cannot be taken back, so transformers refuses"
_NO_STATIC = "transformers has no static cache for its compressed attention"
_WINDOWS = "its compressors count windows from the first column, padding included"
_ALL_FULL = "transformers quantises caches of full attention alone"

# Where the bare model does not hold: (family, mode) -> why. Nothing is asked of the memory there.
BARE_FAILS = {
    (ANY, "offloaded cache"): "needs an accelerator's streams",
    ("gpt2", "left padding, no positions"): "absolute positions count the padding",
    ("gpt2", "left padding, no positions, cached"): "absolute positions count the padding",
    ("gpt_oss", "packed documents"): "its masks do not look at position ids",
    ("mistral", "quantised cache"): _ALL_FULL,
    ("gemma3", "quantised cache"): _ALL_FULL,
    ("gpt_oss", "quantised cache"): _ALL_FULL,
    ("deepseek_v4", "quantised cache"): _ALL_FULL,
    ("deepseek_v4", "cache without config"): "its cache layers are its own",
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
    ("deepseek_v4", "tokens taken back"): _STATEFUL,
    ("deepseek_v4", "prompt lookup"): _STATEFUL,
    ("deepseek_v4", "assisted"): _STATEFUL,
    ("deepseek_v4", "assisted by a model with a memory"): _STATEFUL,
}

# Where the bare model in float64 is off by float32 rounding: its own distance is then the memory's tolerance.
BARE_ROUNDS = {
    ("deepseek_v3", ANY): "its router works in float32, where sums depend on the size of the batch",
    ("deepseek_v4", ANY): "norms, hyper-connections and router work in float32",
    (ANY, "left padding, no positions"): "rotary tables are float32, and the positions are shifted",
    (ANY, "left padding, no positions, cached"): "rotary tables are float32, and the positions are shifted",
    (ANY, "quantised cache"): "codes of 32 bits",
}
MODES = FORWARD | TEXT


def reason(table: dict[tuple[str, str], str], family: str, mode: str) -> str | None:
    return next((table[key] for key in ((family, mode), (ANY, mode), (family, ANY)) if key in table), None)


def pairs(modes: dict, fail: bool) -> list:
    return [pytest.param(family, mode, id=f"{family}-{mode.replace(' ', '_')}") for family in FAMILIES for mode in modes
            if (reason(BARE_FAILS, family, mode) is not None) == fail]


@torch.no_grad()
def distance(family: str, mode: str, dtype: torch.dtype = torch.float64, memory: bool = True) -> float:
    return MODES[mode](run_of(family, dtype, memory))


@functools.cache
def bare_rounding(family: str) -> float:
    """The bare model's greatest distance in the modes that it does not fail; compiling it would tell nothing more."""
    return max(distance(family, mode, memory=False) for mode in FORWARD
               if mode != "compiled layers" and reason(BARE_FAILS, family, mode) is None)


@pytest.mark.parametrize("family, mode", pairs(MODES, fail=False))
def test_decoding_with_a_memory_is_the_clean_forward(family, mode):
    tolerance = EXACT
    if (family, ANY) in BARE_ROUNDS:
        tolerance = 10 * bare_rounding(family)
    elif (ANY, mode) in BARE_ROUNDS:
        tolerance = 10 * distance(family, mode, memory=False)
    assert tolerance <= ROUNDING and distance(family, mode) <= max(tolerance, EXACT)


@pytest.mark.parametrize("family, mode", pairs(TEXT, fail=False))
def test_the_text_in_float32_is_the_clean_forwards(family, mode):
    assert distance(family, mode, torch.float32) <= FLOAT32


@pytest.mark.parametrize("family, mode", pairs(MODES, fail=True))
def test_the_bare_model_fails_where_the_table_says_so(family, mode):
    try:
        found = distance(family, mode, memory=False)
    except Exception:  # transformers refuses in many words
        return
    assert found > ROUNDING


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bare_model_rounds_where_the_table_says_so(family):
    modes = [mode for mode in FORWARD if reason(BARE_ROUNDS, family, mode) and not reason(BARE_FAILS, family, mode)]
    if (family, ANY) in BARE_ROUNDS:
        assert bare_rounding(family) > EXACT
    else:
        assert all(EXACT < distance(family, mode, memory=False) <= ROUNDING for mode in modes)
