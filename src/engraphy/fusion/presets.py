"""Released parameters of a fusion layer: their names, and how they become an EngramLayer.

A preset has the name of its dialect. S streams, D hidden, E width:

    demo            key_projs.{s}.weight, .bias     value_proj.weight, .bias
                    norm1.{s}.weight (key)          norm2.{s}.weight (query)
                    short_conv.norms.{s}.weight     short_conv.conv.weight [S*D, 1, kernel]
    qwen4           key_proj.weight                 value_proj.weight
                    norm_key.weight [S*D]           norm_query.weight [S*D]
                    norm_conv.weight [S*D]          conv1d.weight [S*D, 1, kernel]
    deepseek_v41    wkv.weight [(S+1)*D, E]: the S keys, then the value
                    q_weight [S, D]                 k_weight [S, D]
                    wkv.scale, if wkv.weight is fp8: one factor for each block of 32 x 32
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..spec.dialects.deepseek_v41 import DEEPSEEK_V41
from ..spec.dialects.demo import DEMO
from ..spec.dialects.qwen4 import QWEN4
from ..spec.dialects.record import Dialect
from .checks import FLOATS

if TYPE_CHECKING:
    from .layer import EngramLayer

_FP8_BLOCK = 32  # side of the square blocks that share a scale in DeepSeek-V4.1's fp8 weights

Tensors = Mapping[str, Tensor]
Shape = Callable[[str, int], tuple[int, ...]]


@dataclass(frozen=True)
class Preset:
    """The parameters of one released layer.

    Attributes:
        dialect: Its `layer` constructs the LayerSpec.
        form: (bias, unit_offset, conv) of the layers that the preset can express.
        read_sizes: (tensors, shape) -> the sizes that follow from the tensors' shapes: the
            arguments of `dialect.layer`, and `kernel`. `shape(name, ndim)` returns the shape of a
            tensor; it raises ConfigError if the tensor is missing or has another number of
            dimensions.
        parameters: A layer of this form -> {released name: views of parameters}. The released
            tensor is these views, concatenated along the first dimension.
        dequantised: Released tensors -> the same tensors in plain floats.
    """

    dialect: Dialect
    form: tuple[bool, bool, bool]
    read_sizes: Callable[[Tensors, Shape], dict[str, int]]
    parameters: Callable[[EngramLayer], dict[str, list[Tensor]]]
    dequantised: Callable[[Tensors], dict[str, Tensor]] = dict


def load(
    make: type[EngramLayer], tensors: Tensors, name: str, sizes: Mapping[str, Any]
) -> EngramLayer:
    """`EngramLayer.from_state`: a new layer, `make(spec)`, with the values of the tensors."""
    preset = _named(name)
    tensors = preset.dequantised(tensors)
    layer = make(_read_spec(tensors, name, sizes))
    _check_tensors(tensors, _parameters(layer, name), name)
    dtypes = (tensor.dtype for tensor in tensors.values())
    layer.to(functools.reduce(torch.promote_types, dtypes))
    with torch.no_grad():
        for released, parts in _parameters(layer, name).items():
            values = tensors[released].split([len(part) for part in parts])
            for part, part_values in zip(parts, values, strict=True):
                part.copy_(part_values)
    return layer


def export(layer: EngramLayer, name: str) -> dict[str, Tensor]:
    """`EngramLayer.to_state`: copies of the parameters under the released names."""
    state: dict[str, Tensor] = {}
    for released, parts in _parameters(layer, name).items():
        state[released] = torch.cat([part.detach() for part in parts])
    return state


def _named(name: str) -> Preset:
    if name not in PRESETS:
        raise ConfigError(f"preset: expected one of {sorted(PRESETS)}, found {name!r}")
    return PRESETS[name]


def _parameters(layer: EngramLayer, name: str) -> dict[str, list[Tensor]]:
    """Released name -> views of parameters. Raises ConfigError if the layer has another form."""
    preset = _named(name)
    spec = layer.spec
    form = (spec.bias, spec.unit_offset, spec.kernel > 0)
    if form != preset.form:
        raise ConfigError(
            f"preset {name}: expected (bias, unit_offset, conv) = {preset.form}, "
            f"found {form} in this layer"
        )
    return preset.parameters(layer)


def _check_tensors(tensors: Tensors, slots: Mapping[str, list[Tensor]], name: str) -> None:
    if set(slots) != set(tensors):
        missing = sorted(set(slots) - set(tensors))
        unknown = sorted(set(tensors) - set(slots))
        raise ConfigError(f"preset {name}: missing tensors {missing}, unknown tensors {unknown}")
    for released, parts in slots.items():
        tensor = tensors[released]
        expected = [sum(len(part) for part in parts), *parts[0].shape[1:]]
        if list(tensor.shape) != expected or tensor.dtype not in FLOATS:
            raise ConfigError(
                f"{released}: expected floats {expected}, found {tensor.dtype} {list(tensor.shape)}"
            )


def _read_spec(tensors: Tensors, name: str, sizes: Mapping[str, Any]) -> Any:
    """The spec from the tensors' shapes and `sizes`. `sizes` win.

    `_check_tensors` compares the shapes with the spec later.
    """

    def shape(released: str, ndim: int) -> tuple[int, ...]:
        tensor = tensors.get(released)
        if tensor is None or tensor.ndim != ndim:
            found = f"only {sorted(tensors)}" if tensor is None else list(tensor.shape)
            raise ConfigError(
                f"preset {name}: expected a tensor {released} with {ndim} dimensions, found {found}"
            )
        return tuple(tensor.shape)

    preset = _named(name)
    arguments = {**preset.read_sizes(tensors, shape), **sizes}
    kernel = arguments.pop("kernel")
    try:
        spec = preset.dialect.layer(**arguments)
    except TypeError as error:
        raise ConfigError(f"preset {name}: sizes {sorted(sizes)}: {error}") from None
    return dataclasses.replace(spec, kernel=kernel)


def _conv_of(layer: EngramLayer) -> tuple[Tensor, Tensor]:
    """conv as [S*D, 1, kernel], and conv_norm [S, D], of a layer whose form has a conv."""
    assert layer.conv is not None and layer.conv_norm is not None
    return layer.conv.view(-1, 1, layer.spec.kernel), layer.conv_norm


def _demo_sizes(tensors: Tensors, shape: Shape) -> dict[str, int]:
    hidden, width = shape("value_proj.weight", 2)
    kernel = shape("short_conv.conv.weight", 3)[2]
    keys = [name for name in tensors if name.startswith("key_projs.") and name.endswith(".weight")]
    return {"hidden_size": hidden, "width": width, "streams": len(keys), "kernel": kernel}


def _demo_parameters(layer: EngramLayer) -> dict[str, list[Tensor]]:
    conv, conv_norm_SD = _conv_of(layer)
    streams = layer.spec.streams
    keys_SDE = layer.key.weight.unflatten(0, (streams, -1))
    biases_SD = layer.key.bias.unflatten(0, (streams, -1))
    names = {
        "value_proj.weight": [layer.value.weight],
        "value_proj.bias": [layer.value.bias],
        "short_conv.conv.weight": [conv],
    }
    for s in range(streams):
        names |= {
            f"key_projs.{s}.weight": [keys_SDE[s]],
            f"key_projs.{s}.bias": [biases_SD[s]],
            f"norm1.{s}.weight": [layer.key_norm[s]],
            f"norm2.{s}.weight": [layer.query_norm[s]],
            f"short_conv.norms.{s}.weight": [conv_norm_SD[s]],
        }
    return names


def _qwen4_sizes(tensors: Tensors, shape: Shape) -> dict[str, int]:
    hidden, width = shape("value_proj.weight", 2)
    kernel = shape("conv1d.weight", 3)[2]
    streams = shape("key_proj.weight", 2)[0] // max(hidden, 1)
    return {"hidden_size": hidden, "width": width, "streams": streams, "kernel": kernel}


def _qwen4_parameters(layer: EngramLayer) -> dict[str, list[Tensor]]:
    conv, conv_norm_SD = _conv_of(layer)
    return {
        "key_proj.weight": [layer.key.weight],
        "value_proj.weight": [layer.value.weight],
        "norm_key.weight": [layer.key_norm.view(-1)],
        "norm_query.weight": [layer.query_norm.view(-1)],
        "norm_conv.weight": [conv_norm_SD.view(-1)],
        "conv1d.weight": [conv],
    }


def _deepseek_sizes(tensors: Tensors, shape: Shape) -> dict[str, int]:
    streams, hidden = shape("q_weight", 2)
    _, width = shape("wkv.weight", 2)
    return {"hidden_size": hidden, "width": width, "streams": streams, "kernel": 0}


def _deepseek_parameters(layer: EngramLayer) -> dict[str, list[Tensor]]:
    return {
        "wkv.weight": [layer.key.weight, layer.value.weight],
        "q_weight": [layer.query_norm],
        "k_weight": [layer.key_norm],
    }


def _deepseek_dequantised(tensors: Tensors) -> dict[str, Tensor]:
    """The tensors, with wkv.weight in f32 if it is fp8 with a scale for each block of 32 x 32."""
    plain = dict(tensors)
    scale = plain.pop("wkv.scale", None)
    weight = plain.get("wkv.weight")
    if scale is None or weight is None:
        return plain
    expected = [-(-side // _FP8_BLOCK) for side in weight.shape]
    if list(scale.shape) != expected:
        raise ConfigError(
            f"wkv.scale: expected {expected} for wkv.weight {list(weight.shape)}, "
            f"found {list(scale.shape)}"
        )
    factors = scale.float()
    for dim, side in enumerate(weight.shape):
        factors = factors.repeat_interleave(_FP8_BLOCK, dim).narrow(dim, 0, side)
    plain["wkv.weight"] = weight.float() * factors
    return plain


PRESETS: dict[str, Preset] = {
    "demo": Preset(DEMO, (True, False, True), _demo_sizes, _demo_parameters),
    "qwen4": Preset(QWEN4, (False, True, True), _qwen4_sizes, _qwen4_parameters),
    "deepseek_v41": Preset(
        DEEPSEEK_V41,
        (False, False, False),
        _deepseek_sizes,
        _deepseek_parameters,
        _deepseek_dequantised,
    ),
}
