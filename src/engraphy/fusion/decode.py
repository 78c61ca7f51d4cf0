"""Fuses one decoded token with one native call.

`EngramLayer.forward` is the specification, and does whatever the kernel cannot do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling

from .. import _native
from ..spec.layer import LayerSpec
from .tensors import introduce_tensors

if TYPE_CHECKING:
    from .._native._core import FusePlan

# Most sequences that are decoded natively. With more, a matrix product is faster, since it keeps
# weights in registers.
_MOST_SEQUENCES = 8
_KINDS = (torch.float32, torch.float64, torch.bfloat16)  # as FuseKind in fuse.hpp

Weights = Sequence[nn.Parameter | None]


class Parts(NamedTuple):
    """What a fusion layer is made of.

    Attributes:
        weights: Key weight and bias, value weight and bias, query_norm, key_norm, conv_norm and
            conv; None for those that the layer does not have.
        entries: Where weights and projections are registered: dictionary, name, and what the
            dictionary has there.
        hooks: Dictionaries of hooks, all of them empty.
    """

    weights: Weights
    entries: list[tuple[dict[str, Any], str, Any]]
    hooks: list[dict[Any, Any]]


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

    Attributes:
        plan: The last one that was made. It checks by itself that it still holds.
    """

    def __init__(self, spec: LayerSpec) -> None:
        self._spec = spec
        self.plan: FusePlan | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenFuser, (self._spec,)

    def __call__(
        self,
        parts: Callable[[], Parts | None],
        x_B1SD: Tensor,
        rows_B1E: Tensor,
        live: Tensor | None,
        columns: Columns,
        gate_B1S: Tensor | None,
    ) -> Tensor | None:
        """x + update for one token of each sequence, or None if the kernel cannot do it.

        Args:
            parts: As in `renewed`.
            x_B1SD: Hidden states; [B, 1, D] is accepted for one stream.
            rows_B1E: Rows, of a float dtype other than float64.
            live: bool [B, 1]; None = all positions are live.
            columns: Where the conv inputs lie.
            gate_B1S: Filled with the gates unless it is None.
        """
        if _native.core is None or not self._accepts(x_B1SD, len(rows_B1E)):
            return None
        plan = self.renewed(parts)
        if plan is None or plan.kind != _KINDS.index(x_B1SD.dtype):
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

    def renewed(self, parts: Callable[[], Parts | None]) -> FusePlan | None:
        """The plan for the weights where they are now; None if the kernel cannot use them.

        Args:
            parts: Returns the layer's parts, or None if something else computes `forward`.
        """
        plan = self.plan
        if plan is None or not plan.holds():
            found = parts()
            plan = self.plan = None if found is None else self._new_plan(found)
        return plan

    def _accepts(self, x: Tensor, batch: int) -> bool:
        spec = self._spec
        return (
            not is_grad_enabled()
            and x.dtype in _KINDS
            and 0 < batch <= _MOST_SEQUENCES
            and not is_compiling()
            and x.shape[:: x.ndim - 1] == (batch, spec.hidden_size)
            and x.numel() == batch * spec.streams * spec.hidden_size
            and type(x) is Tensor
            and x.is_cpu
            and x.is_contiguous()
        )

    def _new_plan(self, parts: Parts) -> FusePlan | None:
        """A plan for these weights; None if the kernel cannot use them."""
        weights = [weight for weight in parts.weights if weight is not None]
        dtype = weights[0].dtype
        if dtype not in _KINDS or not all(_is_plain(weight, dtype) for weight in weights):
            return None
        introduce_tensors()
        spec = self._spec
        eps = spec.eps
        if eps is None:
            eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        plan = _native.compiled().FusePlan(
            _KINDS.index(dtype),
            spec.streams,
            spec.hidden_size,
            spec.width,
            spec.kernel,
            spec.order,
            eps,
            spec.conv_eps,
            spec.unit_offset,
            *[0 if weight is None else weight.data_ptr() for weight in parts.weights],
        )
        plan.stand_on(parts.hooks, parts.entries, weights)
        return plan


def _is_plain(weight: nn.Parameter, dtype: torch.dtype) -> bool:
    return (
        type(weight) is nn.Parameter
        and weight.dtype is dtype
        and weight.is_cpu
        and weight.is_contiguous()
    )
