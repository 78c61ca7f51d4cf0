"""The fusion layer for the tokens of many requests, whose conv inputs lie in a paged cache.

A serving engine computes the next tokens of many requests at once, and keeps what it knows of each
token in one line of a cache. Here the conv inputs of all tokens are written to their lines first.
Then each token's conv reads its taps from the cache. So the tokens may come in any order, and in
chunks of any length.

`fuse_plainly` is the specification of the native pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _native
from ..errors import ConfigError, InputError
from . import chunk, plain
from .layer import EngramLayer
from .plain import Formula, Norms
from .projection import Projection

if TYPE_CHECKING:
    from .._native._core import PagedFusion as NativeFusion

# torch's matrix products on a CPU add in another order if there are fewer rows than this.
_FEW = 16


class Lines(NamedTuple):
    """Where the conv inputs of a forward's tokens lie in the cache of a layer.

    Attributes:
        cache: f32 [values], contiguous; of any number of lines, S*D values each.
        offsets_NK: int64, where each line that a token's taps read begins, oldest first; -1 = none
            (zeros). The last one is the token's own line, which gets its conv inputs.
    """

    cache: Tensor
    offsets_NK: Tensor


class PagedFusion:
    """The fusion layer of an engine. Its parameters must not change any more.

    A token's result has the same bits whatever else the call computes.
    """

    def __init__(self, layer: EngramLayer) -> None:
        """Joins the weights of the two projections. Those of the layer become views of them.

        Raises:
            ConfigError: A subclass or a hook changes what the layer computes.
        """
        kinds = [type(part) for part in (layer.key, layer.value)]
        if not layer.is_bare or kinds != [Projection, Projection]:
            names = " and ".join(kind.__name__ for kind in kinds)
            raise ConfigError(
                "a served fusion layer: expected an EngramLayer with plain projections and without "
                f"hooks, found {type(layer).__name__} with {names}"
            )
        spec = layer.spec
        self.spec = spec
        self._outputs = (spec.streams * spec.hidden_size, spec.hidden_size)
        self.weight = torch.cat([layer.key.weight.detach(), layer.value.weight.detach()])
        biases = [layer.key.bias, layer.value.bias]
        self._bias = torch.cat([bias.detach() for bias in biases]) if spec.bias else None
        for part, weight in zip(
            (layer.key, layer.value), self.weight.split(self._outputs), strict=True
        ):
            part.weight = nn.Parameter(weight, requires_grad=False)
        self._norms = Norms(layer.query_norm, layer.key_norm, layer.conv_norm, layer.conv)
        eps = torch.finfo(torch.float32).eps if spec.eps is None else spec.eps
        self._formula = Formula(spec.order, eps, spec.conv_eps, spec.unit_offset, True, True)
        self._native = self._native_plan()

    def __call__(
        self, x_NSD: Tensor, rows_NE: Tensor, live_N: Tensor | None, lines: Lines | None
    ) -> Tensor:
        """x + the layer's update, as `EngramLayer.forward` computes it.

        Args:
            x_NSD: Hidden states, in the dtype of the weights: float32, bfloat16 or float16.
            rows_NE: Rows, of any float dtype.
            live_N: bool. False: update, gate and conv inputs are 0. None = all are live.
            lines: Where the conv inputs lie. None if the layer has no conv.

        Returns:
            A new tensor of the shape of x.

        Raises:
            InputError: Shapes or dtypes do not fit.
        """
        self._check(x_NSD, rows_NE, live_N, lines)
        projected_N = self._project(rows_NE)
        if self._native is not None and _native.core is not None:
            return self._fuse_natively(self._native.plan, x_NSD, projected_N, live_N, lines)
        key_ND, value_ND = projected_N.split(self._outputs, dim=1)
        key_NSD = key_ND.unflatten(1, x_NSD.shape[1:])
        return fuse_plainly(x_NSD, key_NSD, value_ND, self._norms, live_N, lines, self._formula)

    def _fuse_natively(
        self,
        plan: NativeFusion,
        x_NSD: Tensor,
        projected_N: Tensor,
        live_N: Tensor | None,
        lines: Lines | None,
    ) -> Tensor:
        x_NSD = x_NSD.contiguous()
        live_N = None if live_N is None else live_N.contiguous()
        out_NSD = torch.empty_like(x_NSD)
        key = projected_N.data_ptr()
        plan.fuse(
            tokens=len(x_NSD),
            x=x_NSD.data_ptr(),
            key=key,
            value=key + self._outputs[0] * projected_N.element_size(),
            stride=projected_N.stride(0),
            live=0 if live_N is None else live_N.data_ptr(),
            offsets=0 if lines is None else lines.offsets_NK.data_ptr(),
            cache=0 if lines is None else lines.cache.data_ptr(),
            cache_values=0 if lines is None else lines.cache.numel(),
            out=out_NSD.data_ptr(),
            threads=min(torch.get_num_threads(), _native.threads()),
        )
        return out_NSD

    def _check(
        self, x_NSD: Tensor, rows_NE: Tensor, live_N: Tensor | None, lines: Lines | None
    ) -> None:
        spec = self.spec
        shape = (len(rows_NE), spec.streams, spec.hidden_size)
        if x_NSD.shape != shape or x_NSD.dtype is not self.weight.dtype:
            raise InputError(
                f"x: expected {self.weight.dtype} {list(shape)}, "
                f"found {x_NSD.dtype} {list(x_NSD.shape)}"
            )
        if live_N is not None and (live_N.dtype is not torch.bool or live_N.shape != shape[:1]):
            raise InputError(
                f"live: expected bool {list(shape[:1])}, found {live_N.dtype} {list(live_N.shape)}"
            )
        if (lines is None) is not (spec.kernel == 0):
            raise InputError(f"lines: expected some if there is a conv, found {lines is not None}")
        if lines is None:
            return
        cache, offsets_NK = lines
        taps = (shape[0], spec.kernel)
        parts = (cache, torch.float32, cache.shape[:1]), (offsets_NK, torch.int64, taps)
        if any(t.dtype is not d or t.shape != s or not t.is_contiguous() for t, d, s in parts):
            raise InputError(
                f"lines: expected contiguous float32 [values] and int64 {list(taps)}, found "
                f"{cache.dtype} {list(cache.shape)} and {offsets_NK.dtype} {list(offsets_NK.shape)}"
            )

    def _native_plan(self) -> _Plan | None:
        """None if the native pass does not take these weights."""
        spec, norms = self.spec, self._norms
        weight = self.weight
        takes = weight.is_cpu and weight.dtype in (torch.float32, torch.bfloat16)
        if _native.core is None or not takes or spec.kernel > chunk.MOST_TAPS:
            return None

        def factors(norm_SD: Tensor) -> Tensor:
            return plain.scale(norm_SD.detach(), torch.float32, self._formula).contiguous()

        scale_SD = factors(norms.query_norm) * factors(norms.key_norm)
        norm_SD = conv_KSD = torch.empty(0)
        if norms.conv is not None and norms.conv_norm is not None:
            norm_SD = factors(norms.conv_norm)
            conv_KSD = norms.conv.detach().float().permute(2, 0, 1).contiguous()
        plan = _native.compiled().PagedFusion(
            bf16=weight.dtype is torch.bfloat16,
            streams=spec.streams,
            hidden=spec.hidden_size,
            taps=spec.kernel,
            eps=self._formula.eps,
            conv_eps=spec.conv_eps,
            scale=scale_SD.data_ptr(),
            conv_norm=norm_SD.data_ptr(),  # 0 = absent
            conv=conv_KSD.data_ptr(),
        )
        return _Plan(plan, [scale_SD, norm_SD, conv_KSD])

    def _project(self, rows_NE: Tensor) -> Tensor:
        """Keys and values side by side. The product has a multiple of _FEW rows."""
        tokens = len(rows_NE)
        rows_NE = rows_NE.to(self.weight.dtype)
        missing = -tokens % _FEW
        if missing:
            rows_NE = F.pad(rows_NE, (0, 0, 0, missing))
        return F.linear(rows_NE, self.weight, self._bias)[:tokens]


class _Plan(NamedTuple):
    """The native pass of a layer, and the weights that it reads."""

    plan: NativeFusion
    weights: list[Tensor]


def fuse_plainly(
    x_NSD: Tensor,
    key_NSD: Tensor,
    value_ND: Tensor,
    norms: Norms,
    live_N: Tensor | None,
    lines: Lines | None,
    formula: Formula,
) -> Tensor:
    """From the projections of the rows on, in f32: x + update, of x's dtype.

    Args:
        x_NSD: Hidden states.
        key_NSD, value_ND: Projections of the rows.
        norms: Parameters.
        live_N, lines: As for `PagedFusion`. Writes the conv inputs of all tokens to the cache.
        formula: Numbers and variants.
    """
    gate_NS = plain.signed_sqrt(plain.match(x_NSD.float(), key_NSD.float(), norms, formula))
    if live_N is not None:
        gate_NS = torch.where(live_N[:, None], gate_NS, 0.0)
    update_NSD = gate_NS[..., None] * value_ND.float()[:, None]
    if lines is not None and norms.conv is not None and norms.conv_norm is not None:
        inputs_NSD = plain.conv_inputs(update_NSD, norms.conv_norm, formula)
        values_SD = torch.arange(inputs_NSD[0].numel(), device=x_NSD.device).view_as(inputs_NSD[0])
        lines.cache[lines.offsets_NK[:, -1, None, None] + values_SD] = inputs_NSD
        known_NK11 = (lines.offsets_NK >= 0)[:, :, None, None]
        seen_NKSD = lines.cache[lines.offsets_NK.clamp_min(0)[:, :, None, None] + values_SD]
        seen_NKSD = torch.where(known_NK11, seen_NKSD, 0.0)
        update_NSD = update_NSD + F.silu((seen_NKSD * norms.conv.float().permute(2, 0, 1)).sum(1))
        if live_N is not None:
            update_NSD = torch.where(live_N[:, None, None], update_NSD, 0.0)
    return x_NSD + update_NSD.to(x_NSD.dtype)
