"""Whether the arguments of a fusion layer fit it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import InputError
from ..spec.layer import LayerSpec

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_call(
    spec: LayerSpec,
    x_BTSD: Tensor,
    rows_BTE: Tensor,
    window: Tensor | None,
    live: Tensor | None,
    starts: Tensor | None,
) -> None:
    """Raise InputError naming the first argument of `EngramLayer.forward` that does not fit."""
    batch, tokens = _check_hidden(spec, x_BTSD)
    _expect("rows", rows_BTE, (batch, tokens, spec.width), FLOATS)
    if window is not None:
        if not spec.kernel:
            raise InputError(
                f"window: expected None for a layer without a conv, found {list(window.shape)}"
            )
        _expect("window", window, (batch, spec.window, spec.streams, spec.hidden_size), FLOATS)
    for name, flags in (("live", live), ("starts", starts)):
        if flags is not None:
            _expect(name, flags, (batch, tokens), (torch.bool,))


def _check_hidden(spec: LayerSpec, x: Tensor) -> torch.Size:
    """B and T of the hidden states."""
    if x.ndim != 4 or x.shape[2:] != (spec.streams, spec.hidden_size) or x.dtype not in FLOATS:
        raise InputError(
            f"x: expected floats [B, T, {spec.streams}, {spec.hidden_size}], "
            f"found {x.dtype} {list(x.shape)}"
        )
    return x.shape[:2]


def _expect(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if tensor.shape != shape or tensor.dtype not in dtypes:
        kind = "bool" if dtypes == (torch.bool,) else "floats"
        raise InputError(
            f"{name}: expected {kind} {list(shape)}, found {tensor.dtype} {list(tensor.shape)}"
        )


def watched() -> bool:
    """Whether each operation has to be seen by itself.

    A transform of torch.func and forward-mode differentiation see them; and an exporter, whose
    graph has to do without this library.
    """
    if torch.compiler.is_compiling():
        # What is_exporting() returns; within a graph, torch 2.9 has it return True always.
        compiler: Any = torch.compiler
        return compiler._is_exporting_flag
    core: Any = torch._C
    forward_level: int = forward_ad._current_level
    return core._functorch.peek_interpreter_stack() is not None or forward_level >= 0
