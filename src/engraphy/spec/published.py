"""The memories of published models: what their papers and releases say of their sizes."""

from __future__ import annotations

from .config import EngramConfig
from .hash import HashSpec
from .layer import LayerSpec

PAPER_VOCABULARY = 99_092
"""Distinct ids of DeepSeek's tokenizer once its texts are normalised."""


def engram_27b() -> EngramConfig:
    """Engram-27B's memory (arXiv 2601.07372): 5.79e9 values in two tables."""
    return _paper(2_262_400)


def engram_40b() -> EngramConfig:
    """Engram-40B's memory (arXiv 2601.07372): 18.53e9 values in two tables."""
    return _paper(7_239_680)


def deepseek_v41() -> EngramConfig:
    """DeepSeek-V4.1-Flash's memory as released: 196.6e9 values, 5120 wide, four streams."""
    spec = HashSpec.deepseek_v41()
    dim = 256
    return EngramConfig(spec, LayerSpec.deepseek_v41(5120, spec.columns * dim), dim)


def qwen38() -> EngramConfig:
    """Qwen3.8-Flash-Next's memory as released: one table, in the second block."""
    spec = HashSpec.qwen4((1,), (2, 3), 8, 20_000_000, 248_320, eos_id=0)  # no size depends on EOS
    dim = 160
    return EngramConfig(spec, LayerSpec.qwen4(2560, spec.columns * dim, order=spec.order), dim)


def _paper(rows_per_head: int) -> EngramConfig:
    """2560 wide, four streams; the paper counts the layers 1 and 14 as 2 and 15."""
    spec = HashSpec.demo((1, 14), (2, 3), 8, rows_per_head, PAPER_VOCABULARY, pad_id=2)
    dim = 80
    layer = LayerSpec.demo(2560, spec.columns * dim, streams=4, order=spec.order)
    return EngramConfig(spec, layer, dim)
