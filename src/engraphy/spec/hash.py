"""HashSpec: which n-grams are hashed, and how, as one frozen value.

It knows no tokenizer, no store and no tensor. The differences between published memories are in
dialects/.

Sources: "Conditional Memory via Scalable Lookup" (arXiv 2601.07372, section 2) and its public demo;
the DeepSeek-V4.1-Flash release; `qwen4_exp` in transformers 5.23.
"""

# pyright: reportUnnecessaryIsInstance=false
# Callers need not be typed, so arguments are checked at run time too.

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from ..errors import ConfigError
from ..system.checks import as_int, as_ints, fields_of, known_fields
from . import dialects
from .dialects import Dialect
from .model_config import MOST_IDS, config_fields

_MOST_COLUMNS = 4096  # each one takes a search for a prime


@dataclass(frozen=True)
class HashSpec:
    """How token ids become row ids, for all layers of one memory.

    Frozen and hashable. `from_json` is the inverse of `to_json`. Any sequence is accepted for a
    tuple, and one int for rows_per_head.

    Attributes:
        dialect: A key of `dialects.DIALECTS`.
        layer_ids: The model's layers, counted from 0, in the order in which the dialect counts
            them.
        orders: n-gram orders, ascending.
        heads: Rows read per order.
        rows_per_head: Least number of rows of a head, per order.
        vocab_size: Number of ids that are hashed (compressed ids if a map is used). The multipliers
            depend on it.
        filler_id: The raw id used at positions that look-back may not reach: pad in demo and
            DeepSeek-V4.1, EOS in Qwen4-Exp.
        seed: Seed of the multipliers.
        pad_to: The row count of a layer is a multiple of it.

    Raises:
        ConfigError: A field is invalid; its name is in the message.
    """

    dialect: str
    layer_ids: tuple[int, ...]
    orders: tuple[int, ...]
    heads: int
    rows_per_head: tuple[int, ...]
    vocab_size: int
    filler_id: int
    seed: int = 0
    pad_to: int = 1

    def __post_init__(self) -> None:
        for name in ("layer_ids", "orders"):
            object.__setattr__(self, name, as_ints(name, getattr(self, name)))
        rows = self.rows_per_head
        if isinstance(rows, (int, np.integer)):
            rows = (rows,) * len(self.orders)
        object.__setattr__(self, "rows_per_head", as_ints("rows_per_head", rows))
        for name in ("heads", "vocab_size", "filler_id", "seed", "pad_to"):
            object.__setattr__(self, name, as_int(name, getattr(self, name)))
        _check_hash_spec(self)

    @classmethod
    def demo(
        cls,
        layer_ids: Sequence[int],
        orders: Sequence[int],
        heads: int,
        rows_per_head: int | Sequence[int],
        vocab_size: int,
        pad_id: int,
        seed: int = 0,
    ) -> HashSpec:
        """The paper's dialect as its public demo computes it.

        Args:
            layer_ids, orders, heads, vocab_size, seed: As the attributes.
            rows_per_head: One int, or one per order.
            pad_id: The filler_id.
        """
        return cls._made("demo", layer_ids, orders, heads, rows_per_head, vocab_size, pad_id, seed)

    @classmethod
    def deepseek_v41(
        cls,
        layer_ids: Sequence[int] = (1, 14),
        orders: Sequence[int] = (2, 3, 4),
        heads: int = 8,
        rows_per_head: int = 16_000_000,
        vocab_size: int = 99_092,
        pad_id: int = 2,
    ) -> HashSpec:
        """DeepSeek-V4.1-Flash as released; the defaults are its sizes.

        Look-back stops at dead tokens, and all orders share one rows_per_head.

        Args:
            layer_ids, orders, heads, rows_per_head, vocab_size: As the attributes.
            pad_id: The filler_id.
        """
        return cls._made(
            "deepseek_v41", layer_ids, orders, heads, rows_per_head, vocab_size, pad_id
        )

    @classmethod
    def qwen4(
        cls,
        layer_ids: Sequence[int],
        orders: Sequence[int],
        heads: int,
        rows_per_head: int,
        vocab_size: int,
        eos_id: int,
        seed: int = 1234,
        pad_to: int = 128,
    ) -> HashSpec:
        """Qwen4-Exp's per-layer embedding (PLE).

        Raw ids are hashed, look-back stops at EOS, and a layer's rows are padded to `pad_to`.

        Args:
            layer_ids, orders, heads, rows_per_head, vocab_size, seed, pad_to: As the attributes.
            eos_id: The filler_id.
        """
        return cls._made(
            "qwen4", layer_ids, orders, heads, rows_per_head, vocab_size, eos_id, seed, pad_to
        )

    @classmethod
    def _made(
        cls,
        dialect: str,
        layer_ids: Sequence[int],
        orders: Sequence[int],
        heads: int,
        rows_per_head: int | Sequence[int],
        vocab_size: int,
        filler_id: int,
        seed: int = 0,
        pad_to: int = 1,
    ) -> HashSpec:
        """Calls the constructor with any sequences, of which `__post_init__` makes tuples."""
        return cls(
            dialect,
            cast("tuple[int, ...]", layer_ids),
            cast("tuple[int, ...]", orders),
            heads,
            cast("tuple[int, ...]", rows_per_head),
            vocab_size,
            filler_id,
            seed,
            pad_to,
        )

    @classmethod
    def from_hf(cls, config: Any) -> HashSpec:
        """The spec that a released checkpoint's config describes.

        It reads Qwen's `ple_*` and `ngram_*` fields, and DeepSeek-V4.1's `engram_*` fields under
        the names of its config.json and of its inference/config.json.

        Args:
            config: The model's config, an object or a dict, or one with a `text_config`.

        Returns:
            The spec.

        Raises:
            ConfigError: A field, named in the message, is missing or contradicts others: layers
                beyond the model's, or row counts (`engram_num_embeddings`) other than those
                computed here.
        """
        fields = config_fields(config)
        dialect = dialects.described_by(fields)
        spec = cls(dialect=dialect.name, **dialect.released.hash_arguments(fields))
        if dialect.released.row_counts is not None:
            _check_row_counts(spec, dialect.released.row_counts, fields)
        return spec

    @property
    def rules(self) -> Dialect:
        """The record of the dialect: how multipliers and primes are drawn, what ends look-back."""
        return dialects.named(self.dialect)

    @property
    def order(self) -> int:
        """N: the largest n-gram order; N-1 earlier ids are needed to address a token."""
        return self.orders[-1]

    @property
    def columns(self) -> int:
        """C: rows read per token and layer, order-major."""
        return len(self.orders) * self.heads

    def multipliers(self, layer: int) -> tuple[int, ...]:
        """N odd int64 multipliers of a layer; no product with an id below vocab_size overflows."""
        return dialects.multipliers(self, self.layer_index(layer))

    def primes(self, layer: int) -> tuple[int, ...]:
        """C moduli of a layer, in column order."""
        return dialects.all_primes(self)[self.layer_index(layer)]

    def offsets(self, layer: int) -> tuple[int, ...]:
        """C first rows of a layer's heads: the running sum of its primes."""
        sums = np.cumsum((0,) + self.primes(layer)[:-1], dtype=np.int64)
        return tuple(int(value) for value in sums)

    def row_count(self, layer: int) -> int:
        """Rows of a layer's table, padding included."""
        return -(-sum(self.primes(layer)) // self.pad_to) * self.pad_to

    def digest(self) -> str:
        """SHA-256 of the canonical JSON, as hex."""
        return sha256_of(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, one per field."""
        fields = fields_of(self)
        for name in ("layer_ids", "orders", "rows_per_head"):
            fields[name] = list(fields[name])
        return fields

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HashSpec:
        """Inverse of `to_json`. Raises ConfigError if fields are unknown or missing."""
        return cls(**known_fields(cls, data))

    def layer_index(self, layer: int) -> int:
        """Position of a layer in `layer_ids`. Raises ConfigError if the layer has no memory."""
        if as_int("layer", layer) not in self.layer_ids:
            raise ConfigError(
                f"layer {layer!r} has no memory; expected one of {list(self.layer_ids)}"
            )
        return self.layer_ids.index(layer)


def _check_hash_spec(spec: HashSpec) -> None:
    rules = dialects.named(spec.dialect)
    layers = spec.layer_ids
    if not layers or len(set(layers)) != len(layers) or min(layers) < 0:
        raise ConfigError(
            f"layer_ids: expected distinct layers counted from 0, found {list(layers)}"
        )
    orders = spec.orders
    ascending = list(orders) == sorted(set(orders))
    # 32 is the limit of the native kernel.
    if not orders or not ascending or orders[0] < 1 or orders[-1] > 32:
        raise ConfigError(
            f"orders: expected ascending n-gram orders from 1 to 32, found {list(spec.orders)}"
        )
    if len(spec.rows_per_head) != len(spec.orders) or min(spec.rows_per_head) < 1:
        raise ConfigError(
            f"rows_per_head: expected one positive int, or one per order ({len(spec.orders)}), "
            f"found {list(spec.rows_per_head)}"
        )
    if rules.one_size and len(set(spec.rows_per_head)) != 1:
        raise ConfigError(
            f"rows_per_head: expected one size for all orders (dialect {spec.dialect}), "
            f"found {list(spec.rows_per_head)}"
        )
    as_int("heads", spec.heads, 1)
    as_int("vocab_size", spec.vocab_size, 1)
    as_int("filler_id", spec.filler_id, 0)
    as_int("seed", spec.seed, 0)
    as_int("pad_to", spec.pad_to, 1)
    if spec.columns > _MOST_COLUMNS or spec.vocab_size > MOST_IDS:
        raise ConfigError(
            f"heads, vocab_size: expected at most {_MOST_COLUMNS} heads of all orders together and "
            f"{MOST_IDS} ids, found {spec.columns}, {spec.vocab_size}"
        )
    if max(spec.rows_per_head) * spec.columns >= 2**62:
        raise ConfigError(
            "rows_per_head: expected sizes that fit int64 row ids, "
            f"found {max(spec.rows_per_head)} rows per head"
        )


def _check_row_counts(spec: HashSpec, name: str, fields: Mapping[str, Any]) -> None:
    """Raises ConfigError if the field `name` has other row counts. It may be missing."""
    if fields.get(name) is None:
        return
    stated = fields[name]
    computed = tuple(spec.row_count(layer) for layer in spec.layer_ids)
    if as_ints(name, stated) != computed:
        raise ConfigError(
            f"{name}: expected {list(computed)}, which follow from the config's other fields, "
            f"found {list(stated)}"
        )


def sha256_of(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value, as hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
