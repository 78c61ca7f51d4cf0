"""EngramConfig: a whole memory as one frozen value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..system.checks import as_int, as_ints, fields_of, known_fields
from .hash import HashSpec, sha256_of
from .hot import HotSpec
from .layer import LayerSpec
from .model_config import config_fields, first, need


@dataclass(frozen=True)
class EngramConfig:
    """A whole memory: its addresses, its fusion layer, and its row width.

    Attributes:
        hash: How token ids become row ids.
        layer: The layer that fuses rows.
        dim: d, values of a row.
        hot: The index of n-grams that have rows of their own; None = all are hashed.

    Raises:
        ConfigError: The three do not fit: layer.width must be hash.columns * dim, and layer.order
            the largest n-gram order.
    """

    hash: HashSpec
    layer: LayerSpec
    dim: int
    hot: HotSpec | None = None

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
        """Sound defaults for a transformers model: the demo dialect, no bias, a short conv.

        Args:
            model_config: The model's config, an object or a dict.
            layers: By default the second block and the middle one (1 and 14 of 30; the paper counts
                them 2 and 15).
            orders: n-gram orders.
            heads: Rows per order.
            rows_per_head: By default five times the model's vocabulary, the public demo's ratio.
            dim: d. By default such that E is about D/2 (the paper has 1280 and 2560).
            vocab_size: len(vocab) if a VocabMap is used; by default the model's.
            pad_id: Raw id of the filler. By default the model's pad token, else its EOS.
            streams: Residual streams. By default hc_mult of the config (hyper-connections), else 1.
            kernel: Taps of the conv.
            seed: Seed of the multipliers.

        Returns:
            The config.

        Raises:
            ConfigError: The model does not have such a layer, its config lacks a field, or a size
                is invalid.
        """
        fields = config_fields(model_config)
        depth = as_int("num_hidden_layers", need(fields, "num_hidden_layers"), 1)
        hidden = as_int("hidden_size", need(fields, "hidden_size"), 1)
        model_vocab = as_int("vocab_size", need(fields, "vocab_size"), 1)
        if layers is None:
            layers = sorted({min(1, depth - 1), (depth - 1) // 2})
        layers = as_ints("layers", layers)
        for layer in layers:
            if not 0 <= layer < depth:
                raise ConfigError(f"layers: expected 0 to {depth - 1}, found {layer}")
        if rows_per_head is None:
            rows_per_head = 5 * model_vocab
        if pad_id is None:
            pad_id = _filler_of(fields)
        vocab_size = model_vocab if vocab_size is None else vocab_size
        spec = HashSpec.demo(layers, orders, heads, rows_per_head, vocab_size, pad_id, seed)
        if dim is None:
            dim = max(8, hidden // 2 // spec.columns // 8 * 8)
        dim = as_int("dim", dim, 1)
        if streams is None:
            streams = as_int("streams", fields.get("hc_mult") or 1)
        layer_spec = LayerSpec(hidden, spec.columns * dim, streams, spec.order, kernel)
        return cls(spec, layer_spec, dim)

    @classmethod
    def from_hf(cls, config: Any) -> EngramConfig:
        """The memory that a released checkpoint's config describes.

        In DeepSeek-V4.1, d is `engram_head_dim`. In Qwen4-Exp, it is `ple_embed_dim` (by default
        hidden_size) divided by the number of columns.

        Args:
            config: As in `HashSpec.from_hf`.

        Returns:
            The config.

        Raises:
            ConfigError: As in `HashSpec.from_hf`, and if the layer's sizes are missing or invalid.
        """
        spec = HashSpec.from_hf(config)
        fields = config_fields(config)
        dim, sizes = spec.rules.released.layer_arguments(fields, spec.columns)
        layer = spec.rules.layer(width=spec.columns * dim, order=spec.order, **sizes)
        return cls(spec, layer, dim)

    @property
    def hot_rows(self) -> int:
        """Rows of hot n-grams in each layer: the last ones."""
        return 0 if self.hot is None else self.hot.slots * self.hash.heads

    def row_count(self, layer: int | None = None) -> int:
        """Rows of a layer, of hot n-grams too; None = of all layers together."""
        if layer is not None:
            return self.hash.row_count(layer) + self.hot_rows
        return sum(self.row_count(layer) for layer in self.hash.layer_ids)

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
        norms = 2 * wide
        conv = 0
        if layer.kernel:
            conv = wide + wide * layer.kernel  # its norm, and its taps
        return len(self.hash.layer_ids) * (projections + norms + conv)

    def address_digest(self, vocab_digest: str) -> str:
        """Identity of the addresses: hash spec, vocabulary map, row width, and the hot index.

        Rows of two memories mean the same if, and only if, their digests are equal.
        """
        parts = {"hash": self.hash.to_json(), "vocab": vocab_digest, "dim": self.dim}
        # Without an index, the digest is what it was before there were any.
        hot = {} if self.hot is None else {"hot": self.hot.digest}
        return sha256_of(parts | hot)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values. Without a hot index there is no field "hot"."""
        fields = {"hash": self.hash.to_json(), "layer": fields_of(self.layer), "dim": self.dim}
        return fields if self.hot is None else fields | {"hot": fields_of(self.hot)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngramConfig:
        """Inverse of `to_json`. Raises ConfigError if fields are unknown or missing."""
        fields = data
        if isinstance(data, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            fields = {"hot": None, **data}
        known = known_fields(cls, fields)
        layer = LayerSpec(**known_fields(LayerSpec, known["layer"]))
        hot = None
        if known["hot"] is not None:
            hot = HotSpec(**known_fields(HotSpec, known["hot"]))
        return cls(HashSpec.from_json(known["hash"]), layer, known["dim"], hot)


def _filler_of(fields: Mapping[str, Any]) -> int:
    """The model's pad token, else its EOS."""
    for name in ("pad_token_id", "eos_token_id"):
        value = first(fields.get(name))
        if isinstance(value, int) and value >= 0:
            return value
    raise ConfigError(
        "the model's config has neither a pad_token_id nor an eos_token_id; give pad_id="
    )
