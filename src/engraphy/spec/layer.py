"""Sizes and variants of one Engram layer, as a frozen value."""

# pyright: reportUnnecessaryIsInstance=false
# Callers need not be typed, so arguments are checked at run time too.

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import ConfigError
from ..system.checks import as_int


@dataclass(frozen=True)
class LayerSpec:
    """Sizes and variants of one Engram layer (paper, section 2.3).

    Attributes:
        hidden_size: D.
        width: E = columns * row width.
        streams: S residual streams.
        order: N, the dilation of the conv.
        kernel: Taps of the short conv; 0 = no conv.
        bias: The key and value projections have one.
        eps: Epsilon of the query and key norms; None = machine epsilon of the dtype (as in torch).
        conv_eps: Epsilon of the conv's norm.
        unit_offset: Norms scale by (1 + weight), and weights start at zero. If False, norms scale
            by weights that start at one.

    Raises:
        ConfigError: A field is invalid; its name is in the message.
    """

    hidden_size: int
    width: int
    streams: int = 1
    order: int = 3
    kernel: int = 4
    bias: bool = False
    eps: float | None = 1e-6
    conv_eps: float = 1e-5
    unit_offset: bool = False

    def __post_init__(self) -> None:
        least = {"hidden_size": 1, "width": 1, "streams": 1, "order": 1, "kernel": 0}
        for name, smallest in least.items():
            object.__setattr__(self, name, as_int(name, getattr(self, name), smallest))
        for name in ("bias", "unit_offset"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: expected a bool, found {getattr(self, name)!r}")
        if self.eps is not None:
            _check_eps("eps", self.eps)
        _check_eps("conv_eps", self.conv_eps)

    @property
    def window(self) -> int:
        """Earlier positions that the conv looks at: (kernel - 1) * order, 0 without a conv."""
        return max(self.kernel - 1, 0) * self.order

    @classmethod
    def demo(cls, hidden_size: int, width: int, streams: int = 1, order: int = 3) -> LayerSpec:
        """The paper's demo: biased projections, torch's default eps for query and key, conv."""
        return cls(hidden_size, width, streams, order, bias=True, eps=None, conv_eps=1e-5)

    @classmethod
    def deepseek_v41(
        cls, hidden_size: int, width: int, streams: int = 4, order: int = 4, eps: float = 1e-20
    ) -> LayerSpec:
        """DeepSeek-V4.1: no bias, no conv, the model's eps.

        The release has rms_norm_eps 1e-20.
        """
        return cls(hidden_size, width, streams, order, kernel=0, eps=eps, conv_eps=eps)

    @classmethod
    def qwen4(
        cls,
        hidden_size: int,
        width: int,
        streams: int = 4,
        order: int = 3,
        eps: float = 1e-6,
        kernel: int = 4,
    ) -> LayerSpec:
        """Qwen4-Exp: no bias, (1 + weight) norms, conv, the model's eps."""
        return cls(
            hidden_size, width, streams, order, kernel, eps=eps, conv_eps=eps, unit_offset=True
        )


def _check_eps(name: str, eps: float) -> None:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < math.inf:
        raise ConfigError(f"{name}: expected a positive number, found {eps!r}")
