"""The memory that the metadata of a GGUF file describe, as the fields of a config.json.

Forks of llama.cpp write different keys, and none of them writes all that a hash depends on. What is
missing follows from the constants and the tensors that are there, and is listed as assumed.
`spec/dialects` has the keys.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError, DigestMismatch, TableError
from ..spec.config import EngramConfig
from ..spec.dialects import DIALECTS, Dialect, GgufNames, is_prime
from ..spec.model_config import config_fields
from ..table.gguf import Gguf, Strings

_LARGEST_CONSTANT = 1 << 28  # numbers; a token map is the longest array


class Metadata:
    """The metadata of a GGUF file, and its small tensors of constants, by what forks call them."""

    def __init__(self, gguf: Gguf) -> None:
        self.gguf = gguf
        self._keys: dict[str, str] = {}
        for key in gguf.metadata:
            owner, _, name = key.partition(".")
            if name and owner not in ("general", "tokenizer", "split", "quantize"):
                self._keys.setdefault(name.replace(".", "_"), key)
        self._tensors = {
            name.removesuffix(".weight").replace(".", "_"): name for name in gguf.tensors
        }

    def value(self, *names: str) -> Any:
        """The value of the first key that is there; None if there is none."""
        for name in names:
            if name in self._keys:
                return self.gguf.metadata[self._keys[name]]
        return None

    def place(self, *names: str) -> str | None:
        """The key or tensor that has one of these names, as the file spells it."""
        for name in names:
            if name in self._keys:
                return self._keys[name]
            if name in self._tensors:
                return self._tensors[name]
        return None

    def constants(self, *names: str) -> list[int] | None:
        """The numbers of an array or a tensor of integers; None if there is none.

        Raises:
            TableError: It holds something else.
        """
        place = self.place(*names)
        if place is None:
            return None
        value = self.gguf.metadata.get(place)
        if value is None:
            tensor = self.gguf.tensors[place]
            if math.prod(tensor.shape) > _LARGEST_CONSTANT:
                raise TableError(
                    f"{tensor.path}: {place}: expected constants, found {tensor.shape}"
                )
            value = tensor.values()
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
            raise TableError(f"{self.gguf.path}: {place}: expected an array of integers")
        return value.tolist()

    def tokens(self) -> int | None:
        """Number of tokens of the tokenizer; None if the file has none."""
        tokens = self.gguf.metadata.get("tokenizer.ggml.tokens")
        return tokens.count if isinstance(tokens, Strings) else None


def find_dialect(gguf: Gguf, metadata: Metadata) -> Dialect:
    """The dialect of the tables in a GGUF file, by its keys or by the name of a tensor.

    Raises:
        ConfigError: No dialect knows them.
    """
    known: list[str] = []
    for dialect in reversed(DIALECTS.values()):
        names = dialect.release and dialect.release.gguf
        if not dialect.release or not names:
            continue
        marker = dialect.release.marker
        prefix, _, suffix = names.table.partition("{layer}")
        has_table = any(
            name.startswith(prefix) and name.endswith(suffix or prefix) for name in gguf.tensors
        )
        if has_table or metadata.place(marker, *names.fields[marker]):
            return dialect
        known.append(f"{names.table} ({dialect.release.title})")
    raise ConfigError(
        f"{gguf.path}: expected a tensor {' or '.join(known)}, or the metadata of such a model; "
        f"found neither among {len(gguf.tensors)} tensors"
    )


def describe(gguf: Gguf, metadata: Metadata, dialect: Dialect) -> tuple[dict[str, Any], list[str]]:
    """The fields of a config.json that the file gives, and what was assumed.

    Raises:
        ConfigError: The file does not describe a memory.
        TableError: A constant is no array of integers.
    """
    reader = _Fields(gguf, metadata, dialect)
    try:
        return reader.read(), reader.assumed
    except ConfigError as error:
        raise ConfigError(
            f"{gguf.path}: {error}; put the release's config.json beside the file"
        ) from None


class _Fields:
    """Reads the fields one after the other: later ones follow from earlier ones."""

    def __init__(self, gguf: Gguf, metadata: Metadata, dialect: Dialect) -> None:
        names = dialect.released.gguf
        if names is None:
            raise ConfigError(f"dialect {dialect.name}: expected one with names of GGUF files")
        self.gguf = gguf
        self.metadata = metadata
        self.dialect = dialect
        self.names: GgufNames = names
        self.fields: dict[str, Any] = {}
        self.assumed: list[str] = []

    def read(self) -> dict[str, Any]:
        self._take_whole_config()
        for name, keys in self.names.fields.items():
            value = self.metadata.value(*keys)
            if value is not None:
                self.fields[name] = self._plain(name, value)
            elif self.metadata.value(name) is not None:  # as config.json has it
                self.fields[name] = _plain(self.metadata.value(name))
        self._take_orders_and_heads()
        self._take_width()
        self._take_vocabulary()
        self._take_filler()
        self._take_rows()
        return self.fields

    def _take_whole_config(self) -> None:
        """Some files hold config.json as one text."""
        text = self.metadata.value("config")
        if isinstance(text, str):
            try:
                self.fields |= config_fields(json.loads(text))
            except (ValueError, RecursionError) as error:
                place = self.metadata.place("config")
                raise ConfigError(
                    f"{place}: expected JSON, found something else ({error})"
                ) from None

    def _plain(self, name: str, value: Any) -> Any:
        value = _plain(value)
        if name in self.names.zero_based and isinstance(value, list):
            return [layer + 1 for layer in value]
        return value

    @property
    def _layers(self) -> Sequence[int]:
        marker = self.dialect.released.marker
        layers = self.fields.get(marker)
        if layers is None:
            layers = list(self._layers_of_tensors())
            self._set(marker, layers, "layers", f"they are those of the tensors {self.names.table}")
        return layers

    def _layers_of_tensors(self) -> Iterator[int]:
        prefix, _, suffix = self.names.table.partition("{layer}")
        for name in self.gguf.tensors:
            middle = name.removeprefix(prefix).removesuffix(suffix)
            if suffix and middle.isdigit() and name == prefix + middle + suffix:
                yield int(middle)

    def _take_orders_and_heads(self) -> None:
        titles = self.dialect.released.field_names
        layers = len(self._layers)
        order_field = titles["orders"]
        if order_field not in self.fields:
            multipliers = self._constants("multipliers")
            if multipliers:
                order = len(multipliers) // max(1, layers)
                self._set(order_field, order, "orders", "there is a multiplier for each")
        heads_field = titles["heads"]
        if heads_field not in self.fields:
            primes = self._constants("primes")
            orders = self.fields.get(order_field, 0) - 1
            if primes and orders > 0:
                heads = len(primes) // max(1, layers) // orders
                self._set(heads_field, heads, "heads of an order", "there is a prime for each")

    def _take_width(self) -> None:
        name = self.names.width_field
        if name not in self.fields:
            widths = {
                self.gguf.tensors[table].width
                for table in (self.names.table.format(layer=layer) for layer in self._layers)
                if table in self.gguf.tensors
            }
            if len(widths) == 1:
                self._set(name, widths.pop(), "row width", "the tensors are as wide")
        elif not self.metadata.place(*self.names.fields[name]):
            return  # config.json's own meaning
        if self.names.width_of_all and name in self.fields:
            self.fields[name] *= self._columns()

    def _columns(self) -> int:
        titles = self.dialect.released.field_names
        orders = self.fields.get(titles["orders"], 0) - 1
        return orders * self.fields.get(titles["heads"], 0)

    def _take_vocabulary(self) -> None:
        token_map = self._constants("token_map")
        if "vocab_size" not in self.fields:
            size = self.metadata.tokens()
            if size is None and token_map:
                size = len(token_map)
            if size is not None:
                self._set("vocab_size", size, "vocabulary", "there are as many tokens")
        name = self.dialect.released.field_names["vocab_size"]
        if name not in self.fields and token_map:
            self._set(name, max(token_map) + 1, "compressed ids", "the token map has as many")

    def _take_filler(self) -> None:
        name = self.dialect.released.field_names["filler_id"]
        if name in self.fields:
            return
        compressed = self.metadata.value(*self.names.compressed_filler)
        token_map = self._constants("token_map") or []
        if not isinstance(compressed, int):
            return
        tokenizers = self.gguf.metadata.get("tokenizer.ggml.padding_token_id")
        first = token_map.index(compressed) if compressed in token_map else compressed
        for raw in (compressed, tokenizers):
            if isinstance(raw, int) and raw < len(token_map) and token_map[raw] == compressed:
                first = raw
                break
        place = self.metadata.place(*self.names.compressed_filler)
        self._set(name, first, "filler", f"its compressed id is {place} = {compressed}")

    def _take_rows(self) -> None:
        """The least number of rows of a head, which the search for primes begins with."""
        name = self.names.rows_field
        if name in self.fields:
            return
        primes = self._constants("primes")
        if primes:
            rows = roundest(primes[0], self.names.rows_per_head)
            self._set(name, rows, "rows of a head", f"the first prime is {primes[0]}")
            return
        rows = self._rows_of_tensors()
        if rows is not None:
            self._set(name, rows, "rows of a head", "the row counts of tensors follow from it")

    def _rows_of_tensors(self) -> int | None:
        """The first likely size from which a row count in the file follows."""
        columns = self._columns()
        counts = {tensor.rows for tensor in self.gguf.tensors.values() if len(tensor.shape) == 2}
        likely = [self.names.rows_per_head]
        for count in sorted(counts, reverse=True):
            mean = count // max(1, columns)  # the first prime is at most as large
            for step in (10**zeros for zeros in range(8, -1, -1)):
                likely += [mean // step * step, mean // step * step - step]
        for rows in dict.fromkeys(likely):
            wanted = self._row_counts(rows) if rows > 0 else []
            if wanted and counts.issuperset(wanted):
                return rows
        return None

    def _row_counts(self, rows: int) -> list[int]:
        """Rows of each tensor if heads have at least `rows`; empty if the fields do not do."""
        try:
            config = EngramConfig.from_hf(self.fields | {self.names.rows_field: rows})
        except ConfigError:
            return []
        counts = [config.hash.row_count(layer) for layer in config.hash.layer_ids]
        return counts if "{layer}" in self.names.table else [sum(counts)]

    def _constants(self, name: str) -> list[int] | None:
        return self.metadata.constants(*self.names.constants.get(name, ()))

    def _set(self, name: str, value: Any, title: str, reason: str) -> None:
        self.fields[name] = value
        self.assumed.append(f"{title}: {name} = {value}, since {reason}")


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, float):  # written as float32: the shortest decimal that it can be
        return float(str(np.float32(value)))
    return value


def roundest(prime: int, published: int) -> int:
    """The roundest number from which on `prime` is the first prime; `published` if it is one."""
    before = prime - 1
    while before > 1 and not is_prime(before):
        before -= 1
    if before < published <= prime:
        return published
    for zeros in range(len(str(prime)), 0, -1):
        rounded = prime // 10**zeros * 10**zeros
        if rounded > before:
            return rounded
    return prime


def check_fields(metadata: Metadata, config: EngramConfig) -> None:
    """Compares the keys of a file with a config that comes from elsewhere.

    Raises:
        DigestMismatch: A key that the hash depends on differs; names the key.
    """
    spec = config.hash
    release = spec.rules.released
    names = release.gguf
    if names is None:
        return
    titles = release.field_names
    expected = {
        release.marker: list(spec.layer_ids),
        titles["orders"]: spec.order,
        titles["heads"]: spec.heads,
        titles["vocab_size"]: spec.vocab_size,
        names.rows_field: spec.rows_per_head[0],
        names.width_field: config.dim,
    }
    for field, value in expected.items():
        keys = names.fields.get(field, (field,))
        found = _plain(metadata.value(*keys))
        if found is not None and found != value:
            raise DigestMismatch(
                f"{metadata.gguf.path}: {metadata.place(*keys)}: expected {value}, as config.json "
                f"beside it says, found {found}"
            )
