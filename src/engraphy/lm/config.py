"""Sizes of the reference model, and the checks that they fit each other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True)
class MLAConfig:
    """Sizes of multi-head latent attention (mla.py). The names in brackets are those of published
    configs.

    Attributes:
        kv_rank: Width of the latent that keys and values are made of (kv_lora_rank).
        plain: Width of a head's query and key that does not turn (qk_nope_head_dim).
        turned: Width that turns with the position (qk_rope_head_dim).
        value: Width of a head's value (v_head_dim).
        query_rank: Width of the latent that queries are made of (q_lora_rank); None = they are
            made of the hidden state.

    Raises:
        ConfigError: A width is below 1, or `turned` is odd.
    """

    kv_rank: int
    plain: int
    turned: int
    value: int
    query_rank: int | None = None

    def __post_init__(self) -> None:
        for name, width in dataclasses.asdict(self).items():
            if name != "query_rank" or width is not None:
                _at_least(1, f"mla, {name}", width)
        if self.turned % 2:
            raise ConfigError(f"mla, turned: expected an even width, found {self.turned}")


@dataclass(frozen=True)
class YarnConfig:
    """How rotary positions are stretched (yarn.py). Defaults are the paper's and DeepSeek-V3's.

    Attributes:
        factor: Times the trained length.
        trained_tokens: Length that the model was trained on.
        fast_turns: Pairs that turn at least as often within it keep their rate (beta_fast).
        slow_turns: Pairs that turn at most as often are slowed by the factor (beta_slow).
        mscale: Of the temperature of attention.

    Raises:
        ConfigError: A number is out of range.
    """

    factor: float
    trained_tokens: int = 4096
    fast_turns: float = 32.0
    slow_turns: float = 1.0
    mscale: float = 1.0

    def __post_init__(self) -> None:
        _at_least(1, "yarn, trained_tokens", self.trained_tokens)
        if not 1 <= self.factor < math.inf:
            raise ConfigError(f"yarn, factor: expected at least 1, found {self.factor}")
        if not 0 < self.slow_turns < self.fast_turns:
            raise ConfigError(
                "yarn: expected slow_turns above 0 and below fast_turns, "
                f"found {self.slow_turns} and {self.fast_turns}"
            )
        if self.mscale < 0:
            raise ConfigError(f"yarn, mscale: expected 0 or more, found {self.mscale}")


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
        mla: Sizes of latent attention; None = plain attention with heads of hidden_size / heads.
        yarn: Stretches the rotary positions; None = they are as trained.
        streams: M residual streams, joined by hyper-connections (hyper.py); 1 = a plain residual.

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
    mla: MLAConfig | None = None
    yarn: YarnConfig | None = None
    streams: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "moe_layers", tuple(self.moe_layers))
        for name in (
            "vocab_size",
            "hidden_size",
            "layers",
            "heads",
            "ffn",
            "max_tokens",
            "streams",
        ):
            _at_least(1, name, getattr(self, name))
        if self.mla is None and self.hidden_size % (2 * self.heads):
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

    @property
    def rotary_pairs(self) -> int:
        """Pairs of a head that turn with the position."""
        width = self.hidden_size // self.heads if self.mla is None else self.mla.turned
        return width // 2

    def to_json(self) -> dict[str, Any]:
        """JSON values, one a field. What later versions added is left out unless it is used."""
        fields = {**dataclasses.asdict(self), "moe_layers": list(self.moe_layers)}
        added = {"mla": None, "yarn": None, "streams": 1}
        return {name: value for name, value in fields.items() if value != added.get(name, ...)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LMConfig:
        """Inverse of `to_json`. Raises ConfigError for unknown or missing fields."""
        try:
            fields = dict(data)
            for name, part in (("mla", MLAConfig), ("yarn", YarnConfig)):
                if fields.get(name) is not None:
                    fields[name] = part(**fields[name])
            return cls(**fields)
        except TypeError as error:
            raise ConfigError(
                f"LMConfig: expected the fields of to_json, found {data!r} ({error})"
            ) from None


def _at_least(least: int, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}: expected an integer of at least {least}, found {value!r}")
