"""EngramLayer: rows and a hidden state in, what is to be added to the hidden state out.

Knows no token, no address and no store. Sources: "Conditional Memory via Scalable Lookup" (arXiv
2601.07372, section 2.3) and its public demo, the DeepSeek-V4.1-Flash release, `qwen4_exp` in
transformers 5.23.

    u_s = RMSNorm(h_s) . RMSNorm(W_K,s e) / sqrt(D)        gate_s = sigmoid(sign(u_s) * sqrt(max(|u_s|, 1e-6)))
    v_s = gate_s * W_V e                                   out_s  = v_s + SiLU(conv(RMSNorm(v_s)))

for each residual stream s; the value is shared by all streams. conv is depthwise, causal, its
dilation is the largest n-gram order.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _native
from ..errors import ConfigError, InputError
from ..spec.layer import LayerSpec
from .decode import Columns

_GATE_FLOOR = 1e-6
_FEW = 8  # sequences that are decoded natively; for more, a matrix product that keeps weights in registers is faster
_FP8_BLOCK = 32  # side of the square blocks that share a scale in DeepSeek-V4.1's fp8 weights
_NATIVE = (torch.float32, torch.float64, torch.bfloat16)  # as FuseKind in fuse.hpp
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Projection(nn.Module):
    """y = x W^T + b; weight [out, in], bias [out] or None. An nn.Linear in all but its type.

    What rewrites a model by type (adapters on "all-linear", quantisation) leaves a memory's
    projections alone.
    """

    def __init__(self, width: int, out: int, bias: bool) -> None:
        super().__init__()
        linear = nn.Linear(width, out, bias=bias)
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class EngramLayer(nn.Module):
    """The fusion layer of one memory layer.

    Parameters: key.weight [S*D, E] and value.weight [D, E] with biases where `spec.bias`;
    query_norm, key_norm and conv_norm [S, D]; conv [S, D, kernel], last tap = present. Without a
    conv (kernel 0) the last two are None.
    """

    conv: nn.Parameter | None
    conv_norm: nn.Parameter | None

    def __init__(self, spec: LayerSpec):
        super().__init__()
        self.spec = spec
        self._known: Any = None  # weights that `_fixed` has looked at, and what came of it
        self._arguments: tuple[Any, ...] = ()
        streams, hidden = spec.streams, spec.hidden_size
        self.key = Projection(spec.width, streams * hidden, bias=spec.bias)
        self.value = Projection(spec.width, hidden, bias=spec.bias)
        self.query_norm = nn.Parameter(torch.empty(streams, hidden))
        self.key_norm = nn.Parameter(torch.empty(streams, hidden))
        self.conv_norm = nn.Parameter(torch.empty(streams, hidden)) if spec.kernel else None
        self.conv = nn.Parameter(torch.empty(streams, hidden, spec.kernel)) if spec.kernel else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Init for training from scratch: projections N(0, 1/E), so that values have the scale of
        the rows; biases and conv zero; norms scale by one."""
        for linear in (self.key, self.value):
            nn.init.normal_(linear.weight, std=self.spec.width**-0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for norm in (self.query_norm, self.key_norm, self.conv_norm):
            if norm is not None:
                nn.init.constant_(norm, 0.0 if self.spec.unit_offset else 1.0)
        if self.conv is not None:
            nn.init.zeros_(self.conv)

    def zero_value(self) -> None:
        """Set the value projection and its bias to zero: the layer then adds exactly nothing to a
        trained model, and learns from the first step as long as the rows are not zero."""
        nn.init.zeros_(self.value.weight)
        if self.value.bias is not None:
            nn.init.zeros_(self.value.bias)

    def forward(
        self,
        x_BTSD: Tensor,
        rows_BTE: Tensor,
        window: Tensor | None = None,
        live: Tensor | None = None,
        starts: Tensor | None = None,
        *,
        conv_inputs: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(update [B, T, S, D] in x's dtype, gate [B, T, S], window [B, W, S, D] or None); the
        caller adds the update.

        rows_BTE: any float dtype, converted to the projections'. window: the W = spec.window
        normalised conv inputs before this chunk, None = nothing there. live: bool [B, T], False =
        the position is not changed (update and gate 0) and its conv input is zero. starts: bool [B,
        T], a document begins here and the conv does not look across. The returned window is the
        last W conv inputs, zero before the last start; None without a conv. conv_inputs=True
        returns this chunk's conv inputs [B, T, S, D] in its place, unmasked, for a caller that may
        have to step back (SequenceState.push). Norms, gate and conv are computed in f32, or in f64
        where x is; so gate and window have that dtype. Raises InputError for shapes and dtypes that
        do not fit.
        """
        self._check(x_BTSD, rows_BTE, window, live, starts)
        spec, wide = self.spec, torch.promote_types(x_BTSD.dtype, torch.float32)
        rows_BTE = rows_BTE.to(self.value.weight.dtype)
        h_BTSD = x_BTSD.to(wide)
        key_BTSD = self.key(rows_BTE).unflatten(-1, (spec.streams, spec.hidden_size)).to(wide)
        value_BTD = self.value(rows_BTE).to(wide)

        # The norms scale whole vectors, so their factors are taken out of the dot product: fewer
        # passes over [B,T,S,D].
        scale_SD = self._scale(self.query_norm, wide) * self._scale(self.key_norm, wide)
        dot_BTS = (h_BTSD * scale_SD * key_BTSD).sum(-1)
        u_BTS = (
            dot_BTS
            * _rstd(h_BTSD, spec.eps)
            * _rstd(key_BTSD, spec.eps)
            / math.sqrt(spec.hidden_size)
        )
        gate_BTS = torch.sigmoid(u_BTS.sign() * u_BTS.abs().clamp_min(_GATE_FLOOR).sqrt())
        if live is not None:
            gate_BTS = torch.where(live[:, :, None], gate_BTS, 0.0)
        update_BTSD = gate_BTS[..., None] * value_BTD[:, :, None]
        if self.conv is None or self.conv_norm is None:
            return update_BTSD.to(x_BTSD.dtype), gate_BTS, None

        inputs_BTSD = (
            update_BTSD
            * _rstd(update_BTSD, spec.conv_eps)[..., None]
            * self._scale(self.conv_norm, wide)
        )
        mixed_BTSD, window = self._convolve(inputs_BTSD, window, starts)
        update_BTSD = update_BTSD + F.silu(mixed_BTSD)
        if live is not None:
            update_BTSD = torch.where(live[:, :, None, None], update_BTSD, 0.0)
        return update_BTSD.to(x_BTSD.dtype), gate_BTS, inputs_BTSD if conv_inputs else window

    def decode(
        self,
        x_B1SD: Tensor,
        rows_B1E: Tensor,
        live: Tensor | None,
        columns: Columns,
        gate_B1S: Tensor | None = None,
    ) -> Tensor | None:
        """x + update as of `forward`, for one token of each of a few sequences, by one native call.
        x_B1SD: [B, 1, D] will do for one stream. columns: where the conv's inputs lie, from the
        sequences' state. gate_B1S: is filled.

        None where that is not possible and `forward` has to do it: the kernel takes x and weights
        of one dtype (float32, float64, bfloat16), on the CPU, without gradients and hooks.
        """
        spec, batch, at = self.spec, len(rows_B1E), Tensor.data_ptr
        if (
            _native.core is None
            or torch.is_grad_enabled()
            or not 0 < batch <= _FEW
            or torch.compiler.is_compiling()
            or x_B1SD.shape[:: x_B1SD.ndim - 1] != (batch, spec.hidden_size)
            or x_B1SD.numel() != batch * spec.streams * spec.hidden_size
            or type(x_B1SD) is not Tensor
            or not (x_B1SD.is_cpu and x_B1SD.is_contiguous())
        ):
            return None
        fixed = self._fixed(x_B1SD.dtype)
        if fixed is None:
            return None
        if rows_B1E.dtype is not x_B1SD.dtype:
            rows_B1E = rows_B1E.to(x_B1SD.dtype)
        rows_B1E, live = rows_B1E.contiguous(), None if live is None else live.contiguous()
        out_B1SD = torch.empty_like(x_B1SD)
        _native.core.fuse_token(
            *fixed,
            batch,
            at(x_B1SD),
            at(rows_B1E),
            *columns,
            0 if live is None else at(live),
            at(out_B1SD),
            0 if gate_B1S is None else at(gate_B1S),
        )
        return out_B1SD

    def _fixed(self, dtype: torch.dtype) -> tuple[Any, ...] | None:
        """What of the kernel's arguments is the same for each token: sizes, and the weights'
        addresses, 0 for those that are not there. None unless all weights are of `dtype` and as the
        kernel takes them."""
        key, value = self.key, self.value
        for part in (self, key, value):
            if (
                type(part) not in (EngramLayer, Projection)
                or part._forward_hooks
                or part._forward_pre_hooks
            ):
                return None
        own, keys, values = self._parameters, key._parameters, value._parameters
        weights = (
            keys["weight"],
            keys.get("bias"),
            values["weight"],
            values.get("bias"),
            own["query_norm"],
            own["key_norm"],
            own.get("conv_norm"),
            own.get("conv"),
        )
        known = [
            None if weight is None else (weight.data_ptr(), weight.dtype) for weight in weights
        ]
        if self._known == (known, dtype):  # they have been looked at
            return self._arguments
        if dtype not in _NATIVE or not all(
            type(weight) is nn.Parameter
            and weight.dtype is dtype
            and weight.is_cpu
            and weight.is_contiguous()
            for weight in weights
            if weight is not None
        ):
            return None
        spec = self.spec
        eps = (
            torch.finfo(torch.promote_types(dtype, torch.float32)).eps
            if spec.eps is None
            else spec.eps
        )
        self._known = known, dtype
        self._arguments = (
            _NATIVE.index(dtype),
            spec.streams,
            spec.hidden_size,
            spec.width,
            spec.kernel,
            spec.order,
            eps,
            spec.conv_eps,
            spec.unit_offset,
            *[0 if each is None else each[0] for each in known],
        )
        return self._arguments

    def _convolve(
        self, inputs_BTSD: Tensor, window: Tensor | None, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert self.conv is not None
        before, tokens = self.spec.window, inputs_BTSD.shape[1]
        if window is None:
            padded = F.pad(inputs_BTSD, (0, 0, 0, 0, before, 0))
        else:
            padded = torch.cat([window.to(inputs_BTSD.dtype), inputs_BTSD], dim=1)
        taps_KSD = self.conv.to(inputs_BTSD.dtype).permute(2, 0, 1)
        last = padded[:, tokens:]
        if tokens == 1 and starts is None:  # decoding: one product for all taps
            parts = (padded[:, :: self.spec.order] * taps_KSD).split(1, dim=1)
            return functools.reduce(torch.add, parts), last
        # A sum of shifted products: on a CPU a third of the time of a grouped conv1d, forward and
        # backward.
        shifted = [
            padded.narrow(1, tap * self.spec.order, tokens) for tap in range(self.spec.kernel)
        ]
        if starts is not None:
            document = F.pad(starts.cumsum(1), (before, 0))  # [B, W+T], counted within the chunk
            now, final = document[:, before:], document[:, -1:]
            for tap in range(self.spec.kernel - 1):
                same = document.narrow(1, tap * self.spec.order, tokens) == now
                shifted[tap] = torch.where(same[:, :, None, None], shifted[tap], 0.0)
            last = torch.where((document[:, tokens:] == final)[:, :, None, None], last, 0.0)
        parts = (part * weight for part, weight in zip(shifted, taps_KSD.contiguous(), strict=True))
        return functools.reduce(torch.add, parts), last

    def _scale(self, norm: Tensor, dtype: torch.dtype) -> Tensor:
        return norm.to(dtype) + 1.0 if self.spec.unit_offset else norm.to(dtype)

    def _check(
        self,
        x: Tensor,
        rows: Tensor,
        window: Tensor | None,
        live: Tensor | None,
        starts: Tensor | None,
    ) -> None:
        spec = self.spec
        if x.ndim != 4 or x.shape[2:] != (spec.streams, spec.hidden_size) or x.dtype not in _FLOATS:
            raise InputError(
                f"x: expected floats [B, T, {spec.streams}, {spec.hidden_size}], "
                f"found {x.dtype} {list(x.shape)}"
            )
        batch, tokens = x.shape[:2]
        _expect("rows", rows, (batch, tokens, spec.width), _FLOATS)
        if window is not None:
            if not spec.kernel:
                raise InputError(
                    f"window: expected None for a layer without a conv, found {list(window.shape)}"
                )
            _expect("window", window, (batch, spec.window, spec.streams, spec.hidden_size), _FLOATS)
        for name, flags in (("live", live), ("starts", starts)):
            if flags is not None:
                _expect(name, flags, (batch, tokens), (torch.bool,))

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], preset: str, **sizes: Any) -> EngramLayer:
        """A layer from released tensors, under their names within the layer, in the dtype that
        holds them all.

        "demo": key_projs.{s}.weight/.bias, value_proj.weight/.bias, norm1.{s}.weight (key),
        norm2.{s}.weight (query), short_conv.conv.weight [S*D, 1, kernel],
        short_conv.norms.{s}.weight. "qwen4": key_proj.weight, value_proj.weight, norm_key.weight,
        norm_query.weight, norm_conv.weight [S*D], conv1d.weight [S*D, 1, kernel]. "deepseek_v41":
        wkv.weight [(S+1)*D, E], the S keys and then the value; q_weight, k_weight [S, D]. An fp8
        wkv.weight comes with wkv.scale, one factor for each block of 32 x 32. sizes: what the
        tensors do not tell, as the preset's LayerSpec constructor takes it (order; eps where a
        model has its own). Raises ConfigError naming the tensor that is missing, unknown or has
        another shape or dtype.
        """
        _preset(preset)
        tensors = _dequantised(tensors) if preset == "deepseek_v41" else dict(tensors)
        layer = cls(_read_spec(tensors, preset, sizes))
        slots = layer._released(preset)
        if set(slots) != set(tensors):
            raise ConfigError(
                f"preset {preset}: missing tensors {sorted(set(slots) - set(tensors))}, "
                f"unknown tensors {sorted(set(tensors) - set(slots))}"
            )
        for name, parts in slots.items():
            expected = [sum(len(part) for part in parts), *parts[0].shape[1:]]
            if list(tensors[name].shape) != expected or tensors[name].dtype not in _FLOATS:
                raise ConfigError(
                    f"{name}: expected floats {expected}, "
                    f"found {tensors[name].dtype} {list(tensors[name].shape)}"
                )
        layer.to(
            functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
        )
        with torch.no_grad():
            for name, parts in layer._released(preset).items():
                for part, values in zip(
                    parts, tensors[name].split([len(part) for part in parts]), strict=True
                ):
                    part.copy_(values)
        return layer

    def to_state(self, preset: str) -> dict[str, Tensor]:
        """Copies of the parameters under the released names; inverse of `from_state`, save that
        nothing is quantised.

        Raises ConfigError where the preset cannot express this layer.
        """
        parts = self._released(preset)
        return {name: torch.cat([part.detach() for part in views]) for name, views in parts.items()}

    def _released(self, preset: str) -> dict[str, list[Tensor]]:
        """Released name -> views of the parameters that lie in that tensor, one after the other
        along its rows."""
        spec, form = self.spec, _preset(preset).form
        found = (spec.bias, spec.unit_offset, spec.kernel > 0)
        if found != form:
            raise ConfigError(
                f"preset {preset}: expected (bias, unit_offset, conv) = {form}, this layer has {found}"
            )
        key, value = self.key.weight, self.value.weight
        if preset == "deepseek_v41":
            return {
                "wkv.weight": [key, value],
                "q_weight": [self.query_norm],
                "k_weight": [self.key_norm],
            }
        assert self.conv is not None and self.conv_norm is not None
        conv = self.conv.view(-1, 1, spec.kernel)
        if preset == "qwen4":
            return {
                "key_proj.weight": [key],
                "value_proj.weight": [value],
                "norm_key.weight": [self.key_norm.view(-1)],
                "norm_query.weight": [self.query_norm.view(-1)],
                "norm_conv.weight": [self.conv_norm.view(-1)],
                "conv1d.weight": [conv],
            }
        names = {
            "value_proj.weight": [value],
            "value_proj.bias": [self.value.bias],
            "short_conv.conv.weight": [conv],
        }
        keys_SDE, biases_SD = (p.unflatten(0, (spec.streams, -1)) for p in (key, self.key.bias))
        for s in range(spec.streams):
            names |= {
                f"key_projs.{s}.weight": [keys_SDE[s]],
                f"key_projs.{s}.bias": [biases_SD[s]],
                f"norm1.{s}.weight": [self.key_norm[s]],
                f"norm2.{s}.weight": [self.query_norm[s]],
                f"short_conv.norms.{s}.weight": [self.conv_norm[s]],
            }
        return names


class _Preset(NamedTuple):
    make: Callable[..., LayerSpec]
    form: tuple[bool, bool, bool]  # bias, unit_offset, conv


_PRESETS = {
    "demo": _Preset(LayerSpec.demo, (True, False, True)),
    "qwen4": _Preset(LayerSpec.qwen4, (False, True, True)),
    "deepseek_v41": _Preset(LayerSpec.deepseek_v41, (False, False, False)),
}


def _preset(name: str) -> _Preset:
    if name not in _PRESETS:
        raise ConfigError(f"preset: expected one of {sorted(_PRESETS)}, found {name!r}")
    return _PRESETS[name]


def _read_spec(tensors: Mapping[str, Tensor], preset: str, sizes: Mapping[str, Any]) -> LayerSpec:
    """The spec that the tensors' shapes and `sizes` give together; `sizes` win, and the shapes are
    checked later."""

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        if name not in tensors or tensors[name].ndim != ndim:
            found = list(tensors[name].shape) if name in tensors else f"only {sorted(tensors)}"
            raise ConfigError(
                f"preset {preset}: expected a tensor {name} with {ndim} dimensions, found {found}"
            )
        return tuple(tensors[name].shape)

    kernel = 0
    if preset == "deepseek_v41":
        (streams, hidden), (_, width) = shape("q_weight", 2), shape("wkv.weight", 2)
    else:
        hidden, width = shape("value_proj.weight", 2)
        kernel = shape("short_conv.conv.weight" if preset == "demo" else "conv1d.weight", 3)[2]
        if preset == "demo":
            streams = sum(
                name.startswith("key_projs.") and name.endswith(".weight") for name in tensors
            )
        else:
            streams = shape("key_proj.weight", 2)[0] // max(hidden, 1)
    given = {"hidden_size": hidden, "width": width, "streams": streams, "kernel": kernel, **sizes}
    kernel = given.pop("kernel")
    try:
        spec = _preset(preset).make(**given)
    except TypeError as error:
        raise ConfigError(f"preset {preset}: sizes {sorted(sizes)}: {error}") from None
    return dataclasses.replace(spec, kernel=kernel)


def _dequantised(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DeepSeek-V4.1's tensors with wkv.weight in f32 where it comes as fp8 with a scale for each 32
    x 32 block."""
    tensors = dict(tensors)
    scale = tensors.pop("wkv.scale", None)
    weight = tensors.get("wkv.weight")
    if scale is not None and weight is not None:
        expected = [-(-side // _FP8_BLOCK) for side in weight.shape]
        if list(scale.shape) != expected:
            raise ConfigError(
                f"wkv.scale: expected {expected} for wkv.weight {list(weight.shape)}, "
                f"found {list(scale.shape)}"
            )
        factors = scale.float()
        for dim, side in enumerate(weight.shape):
            factors = factors.repeat_interleave(_FP8_BLOCK, dim).narrow(dim, 0, side)
        tensors["wkv.weight"] = weight.float() * factors
    return tensors


def _rstd(x: Tensor, eps: float | None) -> Tensor:
    """1 / sqrt(mean(x**2) + eps) over the last dimension. eps None: the epsilon of x's dtype, as
    torch's RMSNorm."""
    return torch.rsqrt(x.square().mean(-1) + (torch.finfo(x.dtype).eps if eps is None else eps))


def _expect(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if tensor.shape != shape or tensor.dtype not in dtypes:
        kind = "bool" if dtypes == (torch.bool,) else "floats"
        raise InputError(
            f"{name}: expected {kind} {list(shape)}, found {tensor.dtype} {list(tensor.shape)}"
        )
