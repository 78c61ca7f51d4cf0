"""Look-ups refuse to be traced: a traced graph would keep the rows of one input as constants.

Row ids are computed with numpy and rows are read from stores, both outside of any graph. Under
tracing, export, CUDA graph capture and the transforms of torch.func a look-up raises InputError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _python_dispatch

from ..errors import InputError

_MODES = {"ProxyTorchDispatchMode", "FakeTensorMode", "FunctionalTensorMode"}
_KINDS = {"FakeTensor", "FunctionalTensor", "Proxy"}
REASON = (
    "a memory looks up rows outside of the graph, for the token ids of each call: compile the "
    "blocks (block.compile()), or leave fullgraph off; export the model detached (engraphy.detach)"
)


_Function = TypeVar("_Function", bound=Callable[..., Any])


def uncompiled(function: _Function) -> _Function:
    """torch.compiler.disable, but type checkers still see the type of the decorated function."""
    disabled: Any = torch.compiler.disable(function, reason=REASON)
    return disabled


def refuse_tracing(ids: Any) -> None:
    """Raises InputError if the operations on `ids` are being recorded. Takes microseconds."""
    recorder = _recorder(ids)
    if recorder is not None:
        raise InputError(
            f"token ids: expected an ordinary forward, found {recorder}, which would keep the "
            "rows of these ids as constants: a memory looks up rows outside of the graph, for the "
            "token ids of each call. Trace or export the model without it (engraphy.detach, or "
            "inside memory.disabled()); to compile, compile the blocks (block.compile())"
        )


def _recorder(ids: Any) -> str | None:
    """What is recording the operations on `ids`, in words; None = nothing."""
    if type(ids) is not Tensor:
        kinds = {kind.__name__ for kind in type(ids).__mro__}
        if kinds & _KINDS:
            return f"a {type(ids).__name__}"
    if torch.compiler.is_exporting():
        return "torch.export"
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return "torch.jit.trace"
    functorch: Any = torch._C
    if functorch._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func (vmap, grad, jvp, functionalize)"
    if torch._C._len_torch_dispatch_stack():
        modes = _python_dispatch._get_current_dispatch_mode_stack()
        tracing = _MODES.intersection(type(mode).__name__ for mode in modes)
        if tracing:
            return f"tracing ({tracing.pop()})"
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return "the capture of a CUDA graph"
    if isinstance(ids, Tensor) and ids.is_meta:
        return "a tensor on the meta device"
    return None
