"""What a memory is, as frozen values: which n-grams are hashed how, and the sizes of the layer that
reads their rows.

Knows no tokenizer, no store and no tensor. A new dialect is an entry in dialects.py, a constructor
here, and golden vectors in the tests.

Sources: "Conditional Memory via Scalable Lookup" (arXiv 2601.07372, section 2) and its public demo;
the DeepSeek-V4.1-Flash release; `qwen4_exp` in transformers 5.23.
"""

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

_MOST_COLUMNS = 4096  # each takes the search for a prime


@dataclass(frozen=True)
class HashSpec:
    """How token ids become row ids, for all layers of one memory.

    dialect: one of DIALECTS. layer_ids: the model's layers, 0-based, in the order the dialect
    counts them. orders: n-gram orders, ascending. heads: rows read per order. rows_per_head: least
    rows of a head, per order. vocab_size: number of ids that are hashed (compressed where a map is
    used); the multipliers depend on it. filler_id: raw id that stands where look-back finds nothing
    (pad for demo and V4.1, EOS for Qwen). seed: of the multipliers. pad_to: the layer's row count
    is a multiple of it. Raises ConfigError for anything that cannot be meant. Frozen, hashable;
    `to_json` / `from_json` round trip.
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
        rows = (rows,) * len(self.orders) if isinstance(rows, (int, np.integer)) else rows
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
        """The paper's dialect as its public demo computes it. rows_per_head: one int, or one per
        order."""
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
        """DeepSeek-V4.1-Flash as released: look-back stops at dead tokens; one rows_per_head for
        all orders."""
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
        """Qwen4-Exp's per-layer embedding (PLE): raw ids, look-back stops at EOS, rows padded to
        `pad_to`."""
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
        """`__post_init__` makes tuples of the sequences."""
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
        """The spec that a released checkpoint's config (object or dict, or one with a
        `text_config`) describes.

        Reads Qwen's `ple_*` / `ngram_*` fields and DeepSeek-V4.1's `engram_*` fields, as its
        config.json or its inference/config.json names them. Raises ConfigError naming the field
        that is missing or contradicts others: layers beyond the model's, row counts
        (`engram_num_embeddings`) that are not those computed here.
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
        """Inverse of `to_json`. Raises ConfigError on unknown or missing fields."""
        return cls(**known_fields(cls, data))

    def layer_index(self, layer: int) -> int:
        """Position of a layer in `layer_ids`. Raises ConfigError for a layer without memory."""
        if as_int("layer", layer) not in self.layer_ids:
            raise ConfigError(
                f"layer {layer!r} has no memory; expected one of {list(self.layer_ids)}"
            )
        return self.layer_ids.index(layer)


def _check_hash_spec(spec: HashSpec) -> None:
    rules = dialects.named(spec.dialect)
    if (
        not spec.layer_ids
        or len(set(spec.layer_ids)) != len(spec.layer_ids)
        or min(spec.layer_ids) < 0
    ):
        raise ConfigError(
            f"layer_ids: expected distinct layers counted from 0, found {list(spec.layer_ids)}"
        )
    # 32 is what the native kernel has room for.
    if (
        not spec.orders
        or spec.orders[0] < 1
        or spec.orders[-1] > 32
        or list(spec.orders) != sorted(set(spec.orders))
    ):
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
            f"rows_per_head: dialect {spec.dialect} has one size for all orders, "
            f"found {list(spec.rows_per_head)}"
        )
    for name, least in (
        ("heads", 1),
        ("vocab_size", 1),
        ("filler_id", 0),
        ("seed", 0),
        ("pad_to", 1),
    ):
        as_int(name, getattr(spec, name), least)
    if spec.columns > _MOST_COLUMNS or spec.vocab_size > MOST_IDS:
        raise ConfigError(
            f"heads, vocab_size: expected at most {_MOST_COLUMNS} heads of all orders together and "
            f"{MOST_IDS} ids, found {spec.columns}, {spec.vocab_size}"
        )
    if max(spec.rows_per_head) * spec.columns >= 2**62:
        raise ConfigError(
            f"rows_per_head: {max(spec.rows_per_head)} rows a head do not fit int64 row ids"
        )


def _check_row_counts(spec: HashSpec, name: str, fields: Mapping[str, Any]) -> None:
    """Raise ConfigError if the field `name`, which may be missing, has other row counts."""
    if fields.get(name) is None:
        return
    stated = fields[name]
    computed = tuple(spec.row_count(layer) for layer in spec.layer_ids)
    if as_ints(name, stated) != computed:
        raise ConfigError(
            f"{name}: the config says {list(stated)}, its other fields give {list(computed)}"
        )


def sha256_of(value: Any) -> str:
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()
