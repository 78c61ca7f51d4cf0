"""What records a forward to run it again: it would keep the row ids of one input as constants.

Row ids are computed from token ids by numpy, and rows are read from stores, both outside of any
graph. Under tracing, export, capture and the transforms of torch.func that is a named error.
"""

from __future__ import annotations

from typing import Any

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


def refuse_tracing(ids: Any) -> None:
    """Raises InputError while something records what is done with `ids`. Takes microseconds."""
    what = _recorder(ids)
    if what is not None:
        raise InputError(
            f"token ids: expected an ordinary forward, found {what}, which would keep the rows of "
            "these ids as constants: a memory looks up rows outside of the graph, for the token "
            "ids of each call. Trace or export the model without it (engraphy.detach, or inside "
            "memory.disabled()); to compile, compile the blocks (block.compile())"
        )


def _recorder(ids: Any) -> str | None:
    if type(ids) is not Tensor and not _KINDS.isdisjoint(
        kind.__name__ for kind in type(ids).__mro__
    ):
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
        found = _MODES.intersection(type(mode).__name__ for mode in modes)
        if found:
            return f"tracing ({found.pop()})"
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return "the capture of a CUDA graph"
    if isinstance(ids, Tensor) and ids.is_meta:
        return "a tensor on the meta device"
    return None
