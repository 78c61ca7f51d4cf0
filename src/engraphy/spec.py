"""What a memory is, as frozen values: which n-grams are hashed how, and the sizes of the layer that reads their rows.

Knows no tokenizer, no store and no tensor. A new dialect is an entry in dialects.py, a constructor here, and golden
vectors in the tests.

Sources: "Conditional Memory via Scalable Lookup" (arXiv 2601.07372, section 2) and its public demo; the
DeepSeek-V4.1-Flash release; `qwen4_exp` in transformers 5.23.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .dialects import DIALECTS, all_primes, multipliers
from .errors import ConfigError
from .fields import MOST_IDS, as_int, as_ints, config_fields, first, hash_arguments, layer_arguments, need

_MOST_COLUMNS = 4096  # each takes the search for a prime


@dataclass(frozen=True)
class HashSpec:
    """How token ids become row ids, for all layers of one memory.

    dialect: one of DIALECTS. layer_ids: the model's layers, 0-based, in the order the dialect counts them.
    orders: n-gram orders, ascending. heads: rows read per order. rows_per_head: least rows of a head, per order.
    vocab_size: number of ids that are hashed (compressed where a map is used); the multipliers depend on it.
    filler_id: raw id that stands where look-back finds nothing (pad for demo and V4.1, EOS for Qwen).
    seed: of the multipliers. pad_to: the layer's row count is a multiple of it.
    Raises ConfigError for anything that cannot be meant. Frozen, hashable; `to_json` / `from_json` round trip.
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
    def demo(cls, layer_ids: Sequence[int], orders: Sequence[int], heads: int, rows_per_head: int | Sequence[int],
             vocab_size: int, pad_id: int, seed: int = 0) -> HashSpec:
        """The paper's dialect as its public demo computes it. rows_per_head: one int, or one per order."""
        return cls("demo", layer_ids, orders, heads, rows_per_head, vocab_size, pad_id, seed)  # type: ignore[arg-type]

    @classmethod
    def deepseek_v41(cls, layer_ids: Sequence[int] = (1, 14), orders: Sequence[int] = (2, 3, 4), heads: int = 8,
                     rows_per_head: int = 16_000_000, vocab_size: int = 99_092, pad_id: int = 2) -> HashSpec:
        """DeepSeek-V4.1-Flash as released: look-back stops at dead tokens; one rows_per_head for all orders."""
        return cls("deepseek_v41", layer_ids, orders, heads, rows_per_head, vocab_size, pad_id)  # type: ignore[arg-type]

    @classmethod
    def qwen4(cls, layer_ids: Sequence[int], orders: Sequence[int], heads: int, rows_per_head: int,
              vocab_size: int, eos_id: int, seed: int = 1234, pad_to: int = 128) -> HashSpec:
        """Qwen4-Exp's per-layer embedding (PLE): raw ids, look-back stops at EOS, rows padded to `pad_to`."""
        return cls("qwen4", layer_ids, orders, heads, rows_per_head, vocab_size,  # type: ignore[arg-type]
                   eos_id, seed, pad_to)

    @classmethod
    def from_hf(cls, config: Any) -> HashSpec:
        """The spec that a released checkpoint's config (object or dict, or one with a `text_config`) describes.

        Reads Qwen's `ple_*` / `ngram_*` fields and DeepSeek-V4.1's `engram_*` fields, as its config.json or its
        inference/config.json names them. Raises ConfigError naming the field that is missing or contradicts others:
        layers beyond the model's, row counts (`engram_num_embeddings`) that are not those computed here.
        """
        fields = config_fields(config)
        spec = cls(**hash_arguments(fields))
        told = fields.get("engram_num_embeddings") if spec.dialect == "deepseek_v41" else None
        found = tuple(spec.row_count(layer) for layer in spec.layer_ids)
        if told is not None and as_ints("engram_num_embeddings", told) != found:
            raise ConfigError(f"engram_num_embeddings: the config says {list(told)}, its other fields give "
                              f"{list(found)}")
        return spec

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
        return multipliers(self, self.layer_index(layer))

    def primes(self, layer: int) -> tuple[int, ...]:
        """C moduli of a layer, in column order."""
        return all_primes(self)[self.layer_index(layer)]

    def offsets(self, layer: int) -> tuple[int, ...]:
        """C first rows of a layer's heads: the running sum of its primes."""
        sums = np.cumsum((0,) + self.primes(layer)[:-1], dtype=np.int64)
        return tuple(int(value) for value in sums)

    def row_count(self, layer: int) -> int:
        """Rows of a layer's table, padding included."""
        return -(-sum(self.primes(layer)) // self.pad_to) * self.pad_to

    def digest(self) -> str:
        """SHA-256 of the canonical JSON, as hex."""
        return _sha256(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, one per field."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in _fields(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HashSpec:
        """Inverse of `to_json`. Raises ConfigError on unknown or missing fields."""
        return cls(**_known_fields(cls, data))

    def layer_index(self, layer: int) -> int:
        """Position of a layer in `layer_ids`. Raises ConfigError for a layer without memory."""
        if as_int("layer", layer) not in self.layer_ids:
            raise ConfigError(f"layer {layer!r} has no memory; expected one of {list(self.layer_ids)}")
        return self.layer_ids.index(layer)


@dataclass(frozen=True)
class LayerSpec:
    """Sizes and variants of one Engram layer (paper section 2.3; the released variants differ in details).

    hidden_size: D. width: E = columns * row width. streams: S residual streams. order: N, which is the conv's dilation.
    kernel: taps of the short conv, 0 = no conv. bias: key and value projections have one.
    eps: of the query and key norms, None = the dtype's machine epsilon (torch's default). conv_eps: of the conv's norm.
    unit_offset: norms scale by (1 + weight) with weights that start at zero, instead of by weights that start at one.
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
        for name, least in (("hidden_size", 1), ("width", 1), ("streams", 1), ("order", 1), ("kernel", 0)):
            object.__setattr__(self, name, as_int(name, getattr(self, name), least))
        for name in ("bias", "unit_offset"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: expected a bool, found {getattr(self, name)!r}")
        for name, eps in (("eps", 1.0 if self.eps is None else self.eps), ("conv_eps", self.conv_eps)):
            if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < math.inf:
                raise ConfigError(f"{name}: expected a positive number, found {eps!r}")

    @property
    def window(self) -> int:
        """Earlier positions that the conv looks at: (kernel - 1) * order, 0 without a conv."""
        return max(self.kernel - 1, 0) * self.order

    @classmethod
    def demo(cls, hidden_size: int, width: int, streams: int = 1, order: int = 3) -> LayerSpec:
        """The paper's demo: biased projections, torch's default eps for query and key, conv."""
        return cls(hidden_size, width, streams, order, bias=True, eps=None, conv_eps=1e-5)

    @classmethod
    def deepseek_v41(cls, hidden_size: int, width: int, streams: int = 4, order: int = 4,
                     eps: float = 1e-20) -> LayerSpec:
        """DeepSeek-V4.1: no bias, no conv, the model's eps (rms_norm_eps of the release is 1e-20)."""
        return cls(hidden_size, width, streams, order, kernel=0, eps=eps, conv_eps=eps)

    @classmethod
    def qwen4(cls, hidden_size: int, width: int, streams: int = 4, order: int = 3, eps: float = 1e-6,
              kernel: int = 4) -> LayerSpec:
        """Qwen4-Exp: no bias, (1 + weight) norms, conv, the model's eps."""
        return cls(hidden_size, width, streams, order, kernel, eps=eps, conv_eps=eps, unit_offset=True)


@dataclass(frozen=True)
class EngramConfig:
    """A whole memory: addresses, the layer that fuses rows, and the row width d.

    Raises ConfigError where the three do not fit each other (layer.width must be hash.columns * dim).
    """

    hash: HashSpec
    layer: LayerSpec
    dim: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "dim", as_int("dim", self.dim, 1))
        if self.layer.width != self.hash.columns * self.dim:
            raise ConfigError(f"layer.width: expected columns * dim = {self.hash.columns} * {self.dim} = "
                              f"{self.hash.columns * self.dim}, found {self.layer.width}")
        if self.layer.order != self.hash.order:
            raise ConfigError(f"layer.order: expected the largest n-gram order {self.hash.order}, "
                              f"found {self.layer.order}")

    @classmethod
    def for_model(cls, model_config: Any, layers: Sequence[int] | None = None, orders: Sequence[int] = (2, 3),
                  heads: int = 8, rows_per_head: int | Sequence[int] | None = None, dim: int | None = None, *,
                  vocab_size: int | None = None, pad_id: int | None = None, streams: int | None = None,
                  kernel: int = 4, seed: int = 0) -> EngramConfig:
        """Sound defaults for a transformers model config: the demo dialect, unbiased projections, a short conv.

        layers default to the second block and the middle one (1 and 14 of 30; the paper counts them 2 and 15);
        rows_per_head to five times the vocabulary (the public demo's ratio); dim so that E is about D/2 (the paper's
        1280 of 2560). vocab_size: len(vocab) where a VocabMap is used, else the model's.
        pad_id: raw id of the filler, by default the model's pad token, else its EOS. streams: residual streams, by
        default the config's hc_mult (hyper-connections), else 1.
        Raises ConfigError for a layer that the model does not have.
        """
        fields = config_fields(model_config)
        depth, hidden, model_vocab = (as_int(name, need(fields, name), 1)
                                      for name in ("num_hidden_layers", "hidden_size", "vocab_size"))
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
            raise ConfigError("the model's config has neither a pad_token_id nor an eos_token_id; give pad_id=")
        vocab_size = model_vocab if vocab_size is None else vocab_size
        spec = HashSpec.demo(layers, orders, heads, rows_per_head, vocab_size, pad_id, seed)
        dim = max(8, hidden // 2 // spec.columns // 8 * 8) if dim is None else as_int("dim", dim, 1)
        count = (fields.get("hc_mult") or 1) if streams is None else streams
        layer = LayerSpec(hidden, spec.columns * dim, count, spec.order, kernel)
        return cls(spec, layer, dim)

    @classmethod
    def from_hf(cls, config: Any) -> EngramConfig:
        """The memory that a released checkpoint's config describes: `HashSpec.from_hf`, the layer's sizes, and d.

        d is `engram_head_dim` of DeepSeek-V4.1, `ple_embed_dim` (by default hidden_size) over the columns of Qwen.
        Raises ConfigError like `HashSpec.from_hf`.
        """
        spec, fields = HashSpec.from_hf(config), config_fields(config)
        dim, sizes = layer_arguments(fields, spec.columns)
        make = LayerSpec.deepseek_v41 if spec.dialect == "deepseek_v41" else LayerSpec.qwen4
        return cls(spec, make(width=spec.columns * dim, order=spec.order, **sizes), dim)

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
        """Identity of the addresses: hash spec, vocabulary map and row width. Equal digests: rows mean the same."""
        return _sha256({"hash": self.hash.to_json(), "vocab": vocab_digest, "dim": self.dim})

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"hash": self.hash.to_json(), "layer": _fields(self.layer), "dim": self.dim}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngramConfig:
        """Inverse of `to_json`. Raises ConfigError on unknown or missing fields."""
        known = _known_fields(cls, data)
        layer = LayerSpec(**_known_fields(LayerSpec, known["layer"]))
        return cls(HashSpec.from_json(known["hash"]), layer, known["dim"])


def _check_hash_spec(spec: HashSpec) -> None:
    if spec.dialect not in DIALECTS:
        raise ConfigError(f"dialect: expected one of {DIALECTS}, found {spec.dialect!r}")
    if not spec.layer_ids or len(set(spec.layer_ids)) != len(spec.layer_ids) or min(spec.layer_ids) < 0:
        raise ConfigError(f"layer_ids: expected distinct layers counted from 0, found {list(spec.layer_ids)}")
    # 32 is what the native kernel has room for.
    if not spec.orders or spec.orders[0] < 1 or spec.orders[-1] > 32 or list(spec.orders) != sorted(set(spec.orders)):
        raise ConfigError(f"orders: expected ascending n-gram orders from 1 to 32, found {list(spec.orders)}")
    if len(spec.rows_per_head) != len(spec.orders) or min(spec.rows_per_head) < 1:
        raise ConfigError(f"rows_per_head: expected one positive int, or one per order ({len(spec.orders)}), "
                          f"found {list(spec.rows_per_head)}")
    if spec.dialect != "demo" and len(set(spec.rows_per_head)) != 1:
        raise ConfigError(f"rows_per_head: dialect {spec.dialect} has one size for all orders, "
                          f"found {list(spec.rows_per_head)}")
    for name, least in (("heads", 1), ("vocab_size", 1), ("filler_id", 0), ("seed", 0), ("pad_to", 1)):
        as_int(name, getattr(spec, name), least)
    if spec.columns > _MOST_COLUMNS or spec.vocab_size > MOST_IDS:
        raise ConfigError(f"heads, vocab_size: expected at most {_MOST_COLUMNS} heads of all orders together and "
                          f"{MOST_IDS} ids, found {spec.columns}, {spec.vocab_size}")
    if max(spec.rows_per_head) * spec.columns >= 2**62:
        raise ConfigError(f"rows_per_head: {max(spec.rows_per_head)} rows a head do not fit int64 row ids")


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _known_fields(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(data, Mapping) or set(data) != known:
        found = sorted(data) if isinstance(data, Mapping) else data
        raise ConfigError(f"{cls.__name__}: expected the fields {sorted(known)}, found {found!r}")
    return dict(data)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
