"""EngramLayer: computes from rows and a hidden state an update of the hidden state.

It knows no token, no address and no store. Sources: "Conditional Memory via Scalable Lookup" (arXiv
2601.07372, section 2.3) and its public demo, the DeepSeek-V4.1-Flash release, `qwen4_exp` in
transformers 5.23.

    u_s    = RMSNorm(h_s) . RMSNorm(W_K,s e) / sqrt(D)
    gate_s = sigmoid(sign(u_s) * sqrt(max(|u_s|, 1e-6)))
    v_s    = gate_s * W_V e
    out_s  = v_s + SiLU(conv(RMSNorm(v_s)))

for each residual stream s; all streams share the value. conv is depthwise and causal; its dilation
is the largest n-gram order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..spec.layer import LayerSpec
from . import chunk, plain, presets
from .checks import check_call, watched
from .decode import Columns, Parts, TokenFuser
from .op import fuse
from .plain import Formula, Norms, Past
from .projection import Projection

if TYPE_CHECKING:
    from .._native._core import Cursor


class EngramLayer(nn.Module):
    """The fusion layer of one memory layer.

    Attributes:
        spec: Sizes and variants.
        key, value: Projections with weights [S*D, E] and [D, E]; biases if `spec.bias`.
        matrices: Projections whose weight is several matrices side by side, and their number.
        query_norm, key_norm, conv_norm: [S, D]. conv_norm is None without a conv (kernel 0).
        conv: [S, D, kernel]; the last tap is for the present position. None without a conv.
    """

    conv: nn.Parameter | None
    conv_norm: nn.Parameter | None

    def __init__(self, spec: LayerSpec):
        super().__init__()
        self.spec = spec
        self._fuser: TokenFuser = TokenFuser(spec)
        streams, hidden = spec.streams, spec.hidden_size
        self.matrices = {"key": streams}
        self.key = Projection(spec.width, streams * hidden, bias=spec.bias)
        self.value = Projection(spec.width, hidden, bias=spec.bias)
        self.query_norm = nn.Parameter(torch.empty(streams, hidden))
        self.key_norm = nn.Parameter(torch.empty(streams, hidden))
        self.conv_norm = nn.Parameter(torch.empty(streams, hidden)) if spec.kernel else None
        self.conv = nn.Parameter(torch.empty(streams, hidden, spec.kernel)) if spec.kernel else None
        self.reset_parameters()

    @property
    def is_bare(self) -> bool:
        """Whether `forward` alone makes what a call returns: no subclass, no hook."""
        return _is_plain(self)

    def reset_parameters(self) -> None:
        """Initialises the parameters for training from scratch.

        Projections are N(0, 1/E), so that values have the scale of the rows. Biases and conv are
        zero; norms scale by one.
        """
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
        """Sets the value projection and its bias to zero: the layer then adds exactly nothing.

        It still learns from the first step, if the rows are not zero.
        """
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
        residual: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Computes the update of the hidden states; the caller adds it to them.

        Norms, gate and conv are computed in f32, or in f64 if x is f64.

        Args:
            x_BTSD: Hidden states.
            rows_BTE: Rows of any float dtype; they are converted to the projections' dtype.
            window: The W = spec.window normalised conv inputs before this chunk [B, W, S, D]; None
                = zeros.
            live: bool [B, T]. False: update, gate and conv input are 0. None = all are live.
            starts: bool [B, T]. True: a document begins here, and the conv does not look before it.
                None = no document begins.
            conv_inputs: True: return this chunk's conv inputs [B, T, S, D], unmasked, instead of
                the last W ones, for a caller that may take back tokens (SequenceState.push).
            residual: True: return x + update in place of the update.

        Returns:
            The update [B, T, S, D] in x's dtype, the gate [B, T, S], and the last W conv inputs,
            zero before the last start; None without a conv.

        Raises:
            InputError: Shapes or dtypes do not fit.
        """
        check_call(self.spec, x_BTSD, rows_BTE, window, live, starts)
        past = Past(window, live, starts)
        spec = self.spec
        eps = spec.eps
        if eps is None:
            eps = torch.finfo(torch.promote_types(x_BTSD.dtype, torch.float32)).eps
        formula = Formula(spec.order, eps, spec.conv_eps, spec.unit_offset, conv_inputs, residual)
        dtype = self._projected_dtype()
        is_released = type(self).gate is EngramLayer.gate
        if is_released and dtype is not None and chunk.runs(x_BTSD, dtype, self.spec.kernel):
            return self._fuse_natively(x_BTSD, rows_BTE, dtype, past, formula)
        rows_BTE = rows_BTE.to(self.value.weight.dtype)
        key_BTSD = self.key(rows_BTE).unflatten(-1, self.query_norm.shape)
        norms = Norms(self.query_norm, self.key_norm, self.conv_norm, self.conv)
        return plain.fuse(x_BTSD, key_BTSD, self.value(rows_BTE), norms, past, formula, self.gate)

    def gate(self, u_BTS: Tensor) -> Tensor:
        """How far the memory is let in: the gate [B, T, S] for the match u of query and key.

        A subclass may define another gate. Its layers run the plain formula.
        """
        return plain.signed_sqrt(u_BTS)

    def _fuse_natively(
        self, x_BTSD: Tensor, rows_BTE: Tensor, dtype: torch.dtype, past: Past, formula: Formula
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        window = past.window
        if window is not None and torch.is_grad_enabled():
            window = window.clone()  # its owner may write to it before the backward pass
        out_BTSD, gate_BTS, inputs, *_ = fuse(
            x_BTSD,
            rows_BTE,
            self.key.weight,
            self.key.bias,
            self.value.weight,
            self.value.bias,
            self.query_norm,
            self.key_norm,
            self.conv_norm,
            self.conv,
            window,
            past.live,
            past.starts,
            dtype,
            *formula,
        )
        return out_BTSD, gate_BTS, None if self.conv is None else inputs

    def _projected_dtype(self) -> torch.dtype | None:
        """The dtype in which torch would compute the projections; None if that is not two plain
        products on the CPU, or something wants to see each operation."""
        if not (_is_plain(self.key) and _is_plain(self.value)) or watched():
            return None
        tensors = (self.key.weight, self.value.weight, *self._parameters.values())
        dtype = self.key.weight.dtype
        if self.value.weight.dtype is not dtype or not all(map(_is_ordinary, tensors)):
            return None
        if torch.is_autocast_enabled("cpu") and dtype is not torch.float64:
            return torch.get_autocast_dtype("cpu")
        return dtype

    def decode(
        self,
        x_B1SD: Tensor,
        rows_B1E: Tensor,
        live: Tensor | None,
        columns: Columns,
        gate_B1S: Tensor | None = None,
    ) -> Tensor | None:
        """x + `forward`'s update for one token of each of a few sequences, in one native call.

        Args:
            x_B1SD: Hidden states; [B, 1, D] is accepted for one stream.
            rows_B1E: Rows, of any float dtype.
            live: bool [B, 1]; None = all are live.
            columns: Where the conv inputs lie, from the sequences' state.
            gate_B1S: Filled with the gates unless it is None.

        Returns:
            x + update. None if the caller has to use `forward`: the kernel needs x and weights of
            one dtype (float32, float64 or bfloat16), on the CPU, without gradients and hooks.
        """
        return self._fuser(self._parts, x_B1SD, rows_B1E, live, columns, gate_B1S)

    def decode_next(
        self, x_B1SD: Tensor, rows: bytearray, cursor: Cursor, index: int
    ) -> Tensor | None:
        """`decode` for the next token of a cursor's sequences; it takes and writes conv inputs
        where the cursor says.

        Args:
            x_B1SD: Hidden states; [B, 1, D] is accepted for one stream.
            rows: f32 [layers, B, E], rows of all layers of a memory.
            cursor: Of the sequences' state.
            index: This layer's place among the layers, in the cursor too.

        Returns:
            x + update. None, without any change, if the caller has to use `decode` or `forward`.
        """
        plan = self._fuser.plan
        if plan is not None:
            out = plan.fuse_token(index, x_B1SD, rows, cursor)
            if out is not None:
                return out
        renewed = self._fuser.renewed(self._parts)
        if renewed is None or renewed is plan:
            return None
        return renewed.fuse_token(index, x_B1SD, rows, cursor)

    def _parts(self) -> Parts | None:
        """What `forward` uses; None if something else computes it."""
        key: Any = self._modules["key"]
        value: Any = self._modules["value"]
        modules = (self, key, value)
        if not all(_is_plain(module) for module in modules):
            return None
        entries = [(self._modules, "key", key), (self._modules, "value", value)]
        for module, names in (
            (key, ("weight", "bias")),
            (value, ("weight", "bias")),
            (self, ("query_norm", "key_norm", "conv_norm", "conv")),
        ):
            own = module._parameters
            entries += [(own, name, own.get(name)) for name in names]
        weights = [entry for _, _, entry in entries[2:]]
        return Parts(weights, entries, [hooks for module in modules for hooks in _hooks(module)])

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], preset: str, **sizes: Any) -> EngramLayer:
        """A layer from released tensors, in the dtype that holds them all.

        Args:
            tensors: Released parameters by their names within the layer (listed in presets.py).
            preset: "demo", "deepseek_v41" or "qwen4".
            **sizes: Arguments of the preset's LayerSpec constructor that do not follow from the
                tensors: order; eps if the model has its own.

        Returns:
            A new layer.

        Raises:
            ConfigError: A tensor, named in the message, is missing, unknown, or has another shape
                or dtype; or no preset has this name.
        """
        return presets.load(cls, tensors, preset, sizes)

    def to_state(self, preset: str) -> dict[str, Tensor]:
        """Copies of the parameters under the released names. Inverse of `from_state`.

        Nothing is quantised. Raises ConfigError if the preset cannot express this layer.
        """
        return presets.export(self, preset)


def _is_plain(part: nn.Module) -> bool:
    """False if a subclass, another projection or a hook may change what `forward` computes."""
    if type(part) is not EngramLayer and type(part) is not Projection:
        return False
    return not any(_hooks(part))


def _hooks(part: nn.Module) -> tuple[dict[Any, Any], ...]:
    return (
        part._forward_hooks,
        part._forward_pre_hooks,
        part._backward_hooks,
        part._backward_pre_hooks,
    )


def _is_ordinary(tensor: Tensor | None) -> bool:
    """False for a tensor of a type of its own (sharded, quantised), or elsewhere than on the
    CPU."""
    return tensor is None or (type(tensor) in (nn.Parameter, Tensor) and tensor.is_cpu)
