"""Look-ups refuse to be traced: a traced graph would keep the rows of one input as constants.

Row ids are computed with numpy and rows are read from stores, both outside of any graph. Under
tracing, export, CUDA graph capture and the transforms of torch.func a look-up raises InputError.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_exporting
from torch.utils import _python_dispatch

from ..errors import InputError

# Looked up once: reaching them through their modules takes longer than calling them.
_core: Any = torch._C
_is_tracing: Any = _core._is_tracing
_transform: Any = _core._functorch.peek_interpreter_stack
_dispatch_modes: Any = _core._len_torch_dispatch_stack
# The function that says which compiler is given the frames of this thread, if torch has it.
_compiler: Any = getattr(_core._dynamo.eval_frame, "get_eval_frame_callback", None)
_MODES = {"ProxyTorchDispatchMode", "FakeTensorMode", "FunctionalTensorMode"}
_KINDS = {"FakeTensor", "FunctionalTensor", "Proxy"}
REASON = (
    "a memory looks up rows outside of the graph, for the token ids of each call: compile the "
    "blocks (block.compile()), or leave fullgraph off; export the model detached (engraphy.detach)"
)


_Function = TypeVar("_Function", bound=Callable[..., Any])


def uncompiled(function: _Function) -> _Function:
    """torch.compiler.disable, but type checkers still see the type of the decorated function.

    While nothing is compiled, the function is called as it is: what `disable` does around each call
    takes longer than the look-up of a token.
    """
    disabled: Any = torch.compiler.disable(function, reason=REASON)
    if _compiler is None:
        return disabled

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Compilers trace this call (then it is compiling), or its frame is theirs to compile.
        if is_compiling() or _compiler() is not None:
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    plain: Any = call
    return plain


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
    if is_exporting():
        return "torch.export"
    if _is_tracing():
        return "torch.jit.trace"
    if _transform() is not None:
        return "a transform of torch.func (vmap, grad, jvp, functionalize)"
    if _dispatch_modes():
        modes = _python_dispatch._get_current_dispatch_mode_stack()
        tracing = _MODES.intersection(type(mode).__name__ for mode in modes)
        if tracing:
            return f"tracing ({tracing.pop()})"
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return "the capture of a CUDA graph"
    if isinstance(ids, Tensor) and ids.is_meta:
        return "a tensor on the meta device"
    return None
