"""A whole memory as one frozen value: its addresses, its layer, and the width of its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..system.checks import as_int, as_ints, fields_of, known_fields
from .hash import HashSpec, sha256_of
from .layer import LayerSpec
from .model_config import config_fields, first, need


@dataclass(frozen=True)
class EngramConfig:
    """A whole memory: addresses, the layer that fuses rows, and the row width d.

    Raises ConfigError where the three do not fit each other (layer.width must be hash.columns *
    dim).
    """

    hash: HashSpec
    layer: LayerSpec
    dim: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "dim", as_int("dim", self.dim, 1))
        if self.layer.width != self.hash.columns * self.dim:
            raise ConfigError(
                f"layer.width: expected columns * dim = {self.hash.columns} * {self.dim} = "
                f"{self.hash.columns * self.dim}, found {self.layer.width}"
            )
        if self.layer.order != self.hash.order:
            raise ConfigError(
                f"layer.order: expected the largest n-gram order {self.hash.order}, "
                f"found {self.layer.order}"
            )

    @classmethod
    def for_model(
        cls,
        model_config: Any,
        layers: Sequence[int] | None = None,
        orders: Sequence[int] = (2, 3),
        heads: int = 8,
        rows_per_head: int | Sequence[int] | None = None,
        dim: int | None = None,
        *,
        vocab_size: int | None = None,
        pad_id: int | None = None,
        streams: int | None = None,
        kernel: int = 4,
        seed: int = 0,
    ) -> EngramConfig:
        """Sound defaults for a transformers model config: the demo dialect, unbiased projections, a
        short conv.

        layers default to the second block and the middle one (1 and 14 of 30; the paper counts them
        2 and 15); rows_per_head to five times the vocabulary (the public demo's ratio); dim so that
        E is about D/2 (the paper's 1280 of 2560). vocab_size: len(vocab) where a VocabMap is used,
        else the model's. pad_id: raw id of the filler, by default the model's pad token, else its
        EOS. streams: residual streams, by default the config's hc_mult (hyper-connections), else 1.
        Raises ConfigError for a layer that the model does not have.
        """
        fields = config_fields(model_config)
        depth, hidden, model_vocab = (
            as_int(name, need(fields, name), 1)
            for name in ("num_hidden_layers", "hidden_size", "vocab_size")
        )
        defaults = sorted({min(1, depth - 1), (depth - 1) // 2})
        layers = as_ints("layers", defaults if layers is None else layers)
        for layer in layers:
            if not 0 <= layer < depth:
                raise ConfigError(f"layers: expected 0 to {depth - 1}, found {layer}")
        rows_per_head = 5 * model_vocab if rows_per_head is None else rows_per_head
        if pad_id is None:
            found = [first(fields.get(name)) for name in ("pad_token_id", "eos_token_id")]
            pad_id = next((value for value in found if isinstance(value, int) and value >= 0), None)
        if pad_id is None:
            raise ConfigError(
                "the model's config has neither a pad_token_id nor an eos_token_id; give pad_id="
            )
        vocab_size = model_vocab if vocab_size is None else vocab_size
        spec = HashSpec.demo(layers, orders, heads, rows_per_head, vocab_size, pad_id, seed)
        dim = max(8, hidden // 2 // spec.columns // 8 * 8) if dim is None else as_int("dim", dim, 1)
        count = (fields.get("hc_mult") or 1) if streams is None else streams
        layer = LayerSpec(hidden, spec.columns * dim, count, spec.order, kernel)
        return cls(spec, layer, dim)

    @classmethod
    def from_hf(cls, config: Any) -> EngramConfig:
        """The memory that a released checkpoint's config describes: `HashSpec.from_hf`, the layer's
        sizes, and d.

        d is `engram_head_dim` of DeepSeek-V4.1, `ple_embed_dim` (by default hidden_size) over the
        columns of Qwen. Raises ConfigError like `HashSpec.from_hf`.
        """
        spec = HashSpec.from_hf(config)
        fields = config_fields(config)
        dim, sizes = spec.rules.released.layer_arguments(fields, spec.columns)
        layer = spec.rules.layer(width=spec.columns * dim, order=spec.order, **sizes)
        return cls(spec, layer, dim)

    def row_count(self) -> int:
        """Rows of all layers together."""
        return sum(self.hash.row_count(layer) for layer in self.hash.layer_ids)

    def table_parameters(self) -> int:
        """Values in the table: rows of all layers times d."""
        return self.row_count() * self.dim

    def table_bytes(self, row_bytes: int) -> int:
        """Bytes of the table at `row_bytes` a row."""
        return self.row_count() * row_bytes

    def dense_parameters(self) -> int:
        """Trainable parameters of the fusion layers of all memory layers (the table aside)."""
        layer = self.layer
        wide = layer.hidden_size * layer.streams
        projections = (wide + layer.hidden_size) * (layer.width + layer.bias)
        norms = 2 * wide + (wide + wide * layer.kernel if layer.kernel else 0)
        return len(self.hash.layer_ids) * (projections + norms)

    def address_digest(self, vocab_digest: str) -> str:
        """Identity of the addresses: hash spec, vocabulary map and row width. Equal digests: rows
        mean the same."""
        return sha256_of({"hash": self.hash.to_json(), "vocab": vocab_digest, "dim": self.dim})

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"hash": self.hash.to_json(), "layer": fields_of(self.layer), "dim": self.dim}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngramConfig:
        """Inverse of `to_json`. Raises ConfigError on unknown or missing fields."""
        known = known_fields(cls, data)
        layer = LayerSpec(**known_fields(LayerSpec, known["layer"]))
        return cls(HashSpec.from_json(known["hash"]), layer, known["dim"])
