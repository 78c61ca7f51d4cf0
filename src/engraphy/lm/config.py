"""Sizes of the reference model, and the checks that they fit each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True)
class LMConfig:
    """Sizes of a reference model.

    Attributes:
        vocab_size: Number of token ids.
        hidden_size: D.
        layers: Number of blocks.
        heads: Heads of attention.
        ffn: Width of the SwiGLU in blocks without experts.
        moe_layers: Blocks (0-based) that have a mixture of experts in place of the SwiGLU.
        experts: Routed experts of such a block.
        top_k: Routed experts of a token.
        expert_ffn: Width of a routed expert.
        shared_ffn: Width of the shared expert; 0 = none.
        tie_embeddings: The head is the token embedding.
        rope_theta: Base of the rotary positions.
        eps: Epsilon of the norms.
        max_tokens: Longest row.

    Raises:
        ConfigError: Sizes are invalid, or do not fit each other.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    ffn: int
    moe_layers: tuple[int, ...] = ()
    experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    tie_embeddings: bool = False
    rope_theta: float = 10_000.0
    eps: float = 1e-6
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        object.__setattr__(self, "moe_layers", tuple(self.moe_layers))
        for name in ("vocab_size", "hidden_size", "layers", "heads", "ffn", "max_tokens"):
            _at_least(1, name, getattr(self, name))
        if self.hidden_size % (2 * self.heads):
            raise ConfigError(
                "hidden_size: expected heads of even width, "
                f"found {self.hidden_size} / {self.heads}"
            )
        if self.rope_theta <= 0 or self.eps <= 0:
            raise ConfigError(
                f"expected rope_theta and eps above 0, found {self.rope_theta} and {self.eps}"
            )
        _at_least(0, "shared_ffn", self.shared_ffn)
        if self.moe_layers:
            self._check_experts()
        elif any((self.experts, self.top_k, self.expert_ffn, self.shared_ffn)):
            raise ConfigError(
                "moe_layers: none given, so expected experts, top_k, expert_ffn and shared_ffn of 0"
            )

    def _check_experts(self) -> None:
        distinct = set(self.moe_layers)
        if len(distinct) != len(self.moe_layers) or not distinct <= set(range(self.layers)):
            raise ConfigError(
                f"moe_layers: expected distinct layers of 0 to {self.layers - 1}, "
                f"found {list(self.moe_layers)}"
            )
        for name in ("experts", "top_k", "expert_ffn"):
            _at_least(1, name, getattr(self, name))
        if self.top_k > self.experts:
            raise ConfigError(f"top_k: expected at most {self.experts} experts, found {self.top_k}")

    def to_json(self) -> dict[str, Any]:
        """JSON values, one a field."""
        return {**dataclasses.asdict(self), "moe_layers": list(self.moe_layers)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LMConfig:
        """Inverse of `to_json`. Raises ConfigError for unknown or missing fields."""
        try:
            return cls(**data)
        except TypeError as error:
            raise ConfigError(
                f"LMConfig: expected the fields of to_json, found {data!r} ({error})"
            ) from None


def _at_least(least: int, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}: expected an integer of at least {least}, found {value!r}")
