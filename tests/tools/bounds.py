"""How far correct computations of one formula may lie apart: bounds of rounding errors by stages.

A value is carried in float64 beside a bound of the error with which a computation in another dtype
may reach it, in any order of its sums, fused or not. u is the unit roundoff, and gamma(n) =
n u / (1 - n u) bounds n roundings in a row (Higham, "Accuracy and Stability of Numerical
Algorithms", section 3.1). The float64 value is rounded as well, so each rounding counts for both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engraphy.fusion.layer import EngramLayer

ELEMENTARY = 40
"""Roundings that exp, sqrt and the like count for: 20 units in the last place, torch's loosest."""


def unit(dtype: torch.dtype) -> float:
    """u of a computation in `dtype` and of the float64 that it is compared with."""
    return torch.finfo(dtype).eps / 2 + torch.finfo(torch.float64).eps / 2


def gamma(roundings: int, u: float) -> float:
    """Largest relative error of so many roundings in a row."""
    return roundings * u / (1 - roundings * u)


@dataclass(frozen=True)
class Bounded:
    """value: float64, any shape. error: the same shape, a bound of |computed - value|. u: of the
    dtype that is computed in."""

    value: Tensor
    error: Tensor
    u: float

    @classmethod
    def exact(cls, value: Tensor, u: float) -> Bounded:
        """What both computations are given."""
        return cls(value.double(), torch.zeros_like(value, dtype=torch.float64), u)

    def rounded(self, roundings: int = 1) -> Bounded:
        return self.with_error(self.error + gamma(roundings, self.u) * self.most())

    def with_error(self, error: Tensor) -> Bounded:
        return Bounded(self.value, error, self.u)

    def most(self) -> Tensor:
        """The largest size that the computed value can have."""
        return self.value.abs() + self.error

    def map(self, change: Callable[[Tensor], Tensor]) -> Bounded:
        """Value and error with a change that rounds nothing, such as of the shape."""
        return Bounded(change(self.value), change(self.error), self.u)

    def __add__(self, other: Bounded) -> Bounded:
        return Bounded(self.value + other.value, self.error + other.error, self.u).rounded()

    def __mul__(self, other: Bounded) -> Bounded:
        error = self.error * other.most() + other.error * self.value.abs()
        return Bounded(self.value * other.value, error, self.u).rounded()

    def sum(self, dim: int, roundings: int = 0) -> Bounded:
        """roundings: of each term besides those of the sum, whether before it or after it."""
        terms = self.value.shape[dim] + roundings
        error = self.error.sum(dim) + gamma(terms, self.u) * self.most().sum(dim)
        return Bounded(self.value.sum(dim), error, self.u)

    def monotone(self, function: Callable[[Tensor], Tensor]) -> Bounded:
        """A function that only rises or only falls, jumps included."""
        value, low, high = (function(self.value + side * self.error) for side in (0, -1, 1))
        error = torch.maximum((high - value).abs(), (value - low).abs())
        return Bounded(value, error, self.u).rounded(ELEMENTARY)

    def stored(self, dtype: torch.dtype) -> Bounded:
        """Rounded to a dtype that may be narrower. Rounding keeps order, so the ends do."""
        if dtype in (torch.float32, torch.float64):
            return self
        ends = (self.value + side * self.error for side in (0, -1, 1))
        value, low, high = (end.to(dtype).double() for end in ends)
        return Bounded(value, torch.maximum(high - value, value - low), self.u)

    def assert_holds(self, computed: Tensor, where: Tensor | None = None) -> None:
        """`computed` lies within the bound, at the places of `where`."""
        beyond = (computed.double() - self.value).abs() - self.error
        beyond = beyond if where is None else beyond[where]
        worst = beyond.max().item() if beyond.numel() else 0.0
        assert worst <= 0, f"{worst:.3g} beyond a bound of at most {self.error.max().item():.3g}"


def joined(join: Callable[..., Tensor], parts: list[Bounded], dim: int) -> Bounded:
    """Several as one. join: torch.cat or torch.stack."""
    values, errors = [part.value for part in parts], [part.error for part in parts]
    return Bounded(join(values, dim), join(errors, dim), parts[0].u)


@dataclass(frozen=True)
class BoundedFusion:
    """What EngramLayer gives, each with its bound. inputs: of this chunk's conv. inputs and window
    are None without a conv."""

    update: Bounded
    gate: Bounded
    inputs: Bounded | None
    window: Bounded | None


@torch.no_grad()
def fusion(
    layer: EngramLayer,
    x_BTSD: Tensor,
    rows_BTE: Tensor,
    window: Bounded | Tensor | None = None,
    live: Tensor | None = None,
    starts: Tensor | None = None,
) -> BoundedFusion:
    """EngramLayer.forward in float64, with the bound of a computation in the layer's own dtypes."""
    spec, dtype = layer.spec, layer.value.weight.dtype
    wide = torch.promote_types(x_BTSD.dtype, torch.float32)
    u = max(unit(wide), unit(torch.promote_types(dtype, torch.float32)))

    def given(tensor: Tensor) -> Bounded:
        return Bounded.exact(tensor, u)

    def scale(norm: Tensor) -> Bounded:
        return given(norm) + given(torch.ones_like(norm)) if spec.unit_offset else given(norm)

    def rstd(values: Bounded, eps: float | None) -> Bounded:
        eps = torch.finfo(wide).eps if eps is None else eps
        size = given(torch.tensor(1 / values.value.shape[-1], dtype=torch.float64))
        floor = given(torch.tensor(eps, dtype=torch.float64)).rounded()
        return ((values * values).sum(-1) * size.rounded() + floor).monotone(torch.rsqrt)

    rows_BTE, x = rows_BTE.to(dtype), given(x_BTSD)
    key = _projected(layer.key, rows_BTE, u)
    key = key.map(lambda t: t.unflatten(-1, (spec.streams, spec.hidden_size)))
    value = _projected(layer.value, rows_BTE, u)
    dot = (x * (scale(layer.query_norm) * scale(layer.key_norm)) * key).sum(-1, roundings=8)
    root = given(torch.tensor(spec.hidden_size**-0.5, dtype=torch.float64)).rounded(2)
    similarity = dot * rstd(x, spec.eps) * rstd(key, spec.eps) * root
    signed = similarity.monotone(lambda t: t.sign() * t.abs().clamp_min(1e-6).sqrt())
    gate = signed.monotone(torch.sigmoid)
    if live is not None:
        gate = gate.map(lambda t: t * live[..., None])
    update = gate.map(lambda t: t[..., None]) * value.map(lambda t: t[:, :, None])
    inputs = after = None
    if layer.conv is not None and layer.conv_norm is not None:
        factor = rstd(update, spec.conv_eps).map(lambda t: t[..., None])
        inputs = update * factor * scale(layer.conv_norm)
        mixed, after = _mixed(layer, inputs, window, starts)
        slope = 1.1  # of SiLU, at most
        active = Bounded(torch.nn.functional.silu(mixed.value), slope * mixed.error, u)
        update = update + active.rounded(ELEMENTARY)
        if live is not None:
            update = update.map(lambda t: t * live[..., None, None])
    return BoundedFusion(update.stored(x_BTSD.dtype), gate, inputs, after)


def _projected(projection: torch.nn.Module, rows_BTE: Tensor, u: float) -> Bounded:
    """rows W^T + b, stored in the weights' dtype."""
    weight, bias = projection.weight, projection.bias
    value = rows_BTE.double() @ weight.double().T
    most = rows_BTE.double().abs() @ weight.double().abs().T
    if bias is not None:
        value, most = value + bias.double(), most + bias.double().abs()
    return Bounded(value, gamma(weight.shape[1] + 1, u) * most, u).stored(weight.dtype)


def _mixed(
    layer: EngramLayer, inputs: Bounded, window: Bounded | Tensor | None, starts: Tensor | None
) -> tuple[Bounded, Bounded]:
    """What the conv's taps make of the inputs and of those before them; and the last inputs of the
    last document."""
    spec, before, (batch, tokens) = layer.spec, layer.spec.window, inputs.value.shape[:2]
    if window is None:
        window = torch.zeros(batch, before, *inputs.value.shape[2:])
    past = window if isinstance(window, Bounded) else Bounded.exact(window, inputs.u)
    padded = joined(torch.cat, [past, inputs], 1)
    starts = torch.zeros(batch, tokens, dtype=torch.bool) if starts is None else starts
    document = torch.cat([torch.zeros(batch, before, dtype=torch.int64), starts.cumsum(1)], 1)
    now, final = document[:, before:], document[:, -1:]

    def tap(number: int) -> Bounded:
        first = number * spec.order
        same = (document[:, first : first + tokens] == now)[..., None, None]
        shifted = padded.map(lambda t: t[:, first : first + tokens] * same)
        return shifted * Bounded.exact(layer.conv[..., number], inputs.u)

    taps = [tap(number) for number in range(spec.kernel)]
    stacked = joined(torch.stack, taps, 0)
    last = (document[:, tokens:] == final)[..., None, None]
    return stacked.sum(0), padded.map(lambda t: t[:, tokens:] * last)
