"""Fuses one decoded token with one native call.

`EngramLayer.forward` is the specification, and does whatever the kernel cannot do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling

from .. import _native
from ..spec.layer import LayerSpec

if TYPE_CHECKING:
    from .._native._core import Cursor, FusePlan

# Most sequences that are decoded natively. With more, a matrix product is faster, since it keeps
# weights in registers.
_MOST_SEQUENCES = 8
_KINDS = (torch.float32, torch.float64, torch.bfloat16)  # as FuseKind in fuse.hpp


Weights = Sequence[nn.Parameter | None]
Key = list[Any]  # dtype of x; then address, dtype and strides of each weight


class Columns(NamedTuple):
    """Where the conv inputs of a few sequences lie: addresses of two columns of a buffer.

    Attributes:
        oldest: The first sequence's oldest column that the conv looks at.
        next: The first sequence's next column, which is to be written.
        stride: Values from one sequence's columns to the next one's.
    """

    oldest: int
    next: int
    stride: int


NO_COLUMNS = Columns(0, 0, 0)  # for a layer without a conv


class TokenFuser:
    """Calls the native kernel for one layer, with a plan: sizes and addresses of the weights.

    The plan is made with the first token, and again when weights have moved. A copy of the layer
    starts without a plan.
    """

    def __init__(self, spec: LayerSpec) -> None:
        self._spec = spec
        # What the plan was made for and the plan, exchanged as one: another thread that decodes in
        # another dtype must not find one with the other.
        self._made: tuple[Key, FusePlan | None] = ([], None)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenFuser, (self._spec,)

    def __call__(
        self,
        weights: Weights,
        x_B1SD: Tensor,
        rows_B1E: Tensor,
        live: Tensor | None,
        columns: Columns,
        gate_B1S: Tensor | None,
    ) -> Tensor | None:
        """x + update for one token of each sequence, or None if the kernel cannot do it.

        Args:
            weights: key weight and bias, value weight and bias, query_norm, key_norm, conv_norm and
                conv; None for those that the layer does not have.
            x_B1SD: Hidden states; [B, 1, D] is accepted for one stream.
            rows_B1E: Rows, of a float dtype other than float64.
            live: bool [B, 1]; None = all positions are live.
            columns: Where the conv inputs lie.
            gate_B1S: Filled with the gates unless it is None.
        """
        if _native.core is None or not self._accepts(x_B1SD, len(rows_B1E)):
            return None
        plan = self._plan(weights, x_B1SD.dtype)
        if plan is None:
            return None
        if rows_B1E.dtype is torch.float64:
            return None
        if rows_B1E.dtype is not torch.float32:
            rows_B1E = rows_B1E.float()
        rows_B1E = rows_B1E.contiguous()
        if live is not None:
            live = live.contiguous()
        out_B1SD = torch.empty_like(x_B1SD)
        plan.fuse(
            len(rows_B1E),
            x_B1SD.data_ptr(),
            rows_B1E.data_ptr(),
            *columns,
            0 if live is None else live.data_ptr(),
            out_B1SD.data_ptr(),
            0 if gate_B1S is None else gate_B1S.data_ptr(),
        )
        return out_B1SD

    def next(
        self, weights: Weights, x_B1SD: Tensor, rows: bytearray, cursor: Cursor, index: int
    ) -> Tensor | None:
        """x + update for the next token of a cursor's sequences, or None if the kernel cannot do
        it. Arguments as in `EngramLayer.decode_next`, weights as above.
        """
        if _native.core is None or is_grad_enabled() or is_compiling():
            return None
        if type(x_B1SD) is not Tensor or not x_B1SD.is_cpu or not x_B1SD.is_contiguous():
            return None
        shape = x_B1SD.shape
        if shape[1] != 1 or shape[-1] != self._spec.hidden_size:
            return None
        plan = self._plan(weights, x_B1SD.dtype)
        if plan is None:
            return None
        # To be overwritten. A model has just added its last block's output, so the code of a sum is
        # in the caches; that of an empty tensor is not.
        out_B1SD = x_B1SD + x_B1SD
        done = plan.fuse_next(
            index,
            shape[0],
            x_B1SD.data_ptr(),
            x_B1SD.numel(),
            rows,
            out_B1SD.data_ptr(),
            cursor,
        )
        return out_B1SD if done else None

    def _plan(self, weights: Weights, dtype: torch.dtype) -> FusePlan | None:
        """The plan for these weights where they are now; None if the kernel cannot use them."""
        made_for: Key = [dtype]
        for weight in weights:
            if weight is not None:
                made_for += (weight.data_ptr(), weight.dtype, weight.stride())
        key, plan = self._made
        if key != made_for:
            plan = self._new_plan(_native.compiled().FusePlan, weights, dtype)
            self._made = made_for, plan
        return plan

    def _accepts(self, x: Tensor, batch: int) -> bool:
        spec = self._spec
        return (
            not is_grad_enabled()
            and 0 < batch <= _MOST_SEQUENCES
            and not is_compiling()
            and x.shape[:: x.ndim - 1] == (batch, spec.hidden_size)
            and x.numel() == batch * spec.streams * spec.hidden_size
            and type(x) is Tensor
            and x.is_cpu
            and x.is_contiguous()
        )

    def _new_plan(
        self, make: type[FusePlan], weights: Weights, dtype: torch.dtype
    ) -> FusePlan | None:
        """A plan for these weights; None if the kernel cannot use them."""
        if dtype not in _KINDS:
            return None
        if not all(weight is None or _is_plain(weight, dtype) for weight in weights):
            return None
        spec = self._spec
        eps = spec.eps
        if eps is None:
            eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        return make(
            _KINDS.index(dtype),
            spec.streams,
            spec.hidden_size,
            spec.width,
            spec.kernel,
            spec.order,
            eps,
            spec.conv_eps,
            spec.unit_offset,
            *[0 if weight is None else weight.data_ptr() for weight in weights],
        )


def _is_plain(weight: nn.Parameter, dtype: torch.dtype) -> bool:
    return (
        type(weight) is nn.Parameter
        and weight.dtype is dtype
        and weight.is_cpu
        and weight.is_contiguous()
    )
