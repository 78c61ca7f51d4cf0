"""Statistics of a table's rows, and checks that the table is what its engram.json says.

Both read all rows, or a sample of each layer that depends on the seed alone. This module knows
neither tokens nor models.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..errors import TableError
from ..rows.format import RowFormat
from ..rows.read import take
from ..spec.dialects.primes import is_prime
from ..system.checks import as_int
from .chunks import Progress, row_chunks
from .safetensors import read_header
from .table import Table

QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
_STEP = 65_536
_MOST_NAMED = 10  # rows that are named one by one


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer.

    Attributes:
        layer: The model's layer.
        rows: Rows of the layer.
        bytes: Bytes of these rows.
        disk_bytes: Bytes that its shards take on disk: fewer while rows were never written.
        scanned: Rows that were read.
        zero: How many of these are all zero bytes: never written, or trained to zero.
        norms: Quantile -> Euclidean norm of the other rows; empty if there are none.
    """

    layer: int
    rows: int
    bytes: int
    disk_bytes: int
    scanned: int
    zero: int
    norms: dict[float, float]


@dataclass(frozen=True)
class LayerChecked:
    """One layer that has been verified.

    Attributes:
        layer: The model's layer.
        rows: Rows of the layer.
        columns: Number of its columns; each has one prime.
        primes: The smallest and the largest prime.
        decoded: Rows that were decoded.
        not_finite: Ids of the first ten decoded rows that hold NaN or infinities.
    """

    layer: int
    rows: int
    columns: int
    primes: tuple[int, int]
    decoded: int
    not_finite: tuple[int, ...]


@dataclass(frozen=True)
class Verification:
    """The result of `verify`.

    Attributes:
        table_id: The table's id.
        shards: Number of shards that were hashed.
        of: Number of shards that the table has.
        bytes: Bytes of rows that were hashed.
        layers: The result for each layer.
    """

    table_id: str
    shards: int
    of: int
    bytes: int
    layers: tuple[LayerChecked, ...]

    @property
    def sound(self) -> bool:
        """Whether all decoded rows are finite. `verify` raises an error for any other damage."""
        return not any(layer.not_finite for layer in self.layers)


def statistics(
    path: str | os.PathLike[str],
    sample: int | None = 100_000,
    seed: int = 0,
    *,
    progress: Progress | None = None,
) -> list[LayerStatistics]:
    """Statistics of the rows of each layer of a sealed table.

    Args:
        path: The table's directory.
        sample: Rows of each layer to read; None = all.
        seed: Seed of the choice of rows.
        progress: Called as rows are read.

    Raises:
        TableError: As `Table.open` raises it.
        ConfigError: `sample` is below 1.
    """
    table = Table.open(path)
    return [_layer_statistics(table, layer, sample, seed, progress) for layer in table.layers]


def _layer_statistics(
    table: Table, layer: int, sample: int | None, seed: int, progress: Progress | None
) -> LayerStatistics:
    rows = table.rows(layer)
    width = table.row_bytes
    total = min(rows, sample or rows) * width
    scanned = zero = 0
    norms: list[np.ndarray] = []
    for _, raw_nR in _chosen_rows(table, layer, sample, seed):
        kept_nR = raw_nR[raw_nR.any(axis=1)]
        scanned += len(raw_nR)
        zero += len(raw_nR) - len(kept_nR)
        norms.append(_norms(table.fmt, kept_nR))
        if progress:
            progress(f"layer {layer}", scanned * width, total)
    return LayerStatistics(
        layer=layer,
        rows=rows,
        bytes=rows * width,
        disk_bytes=sum(shard.path.stat().st_blocks * 512 for shard in table.shards(layer)),
        scanned=scanned,
        zero=zero,
        norms=_quantiles(np.concatenate(norms)),
    )


def _norms(fmt: RowFormat, raw_nR: np.ndarray) -> np.ndarray:
    """Euclidean norms of rows, float32 [n], summed in float64."""
    values_nd = fmt.decode(raw_nR)
    squares_n = np.einsum("nd,nd->n", values_nd, values_nd, dtype=np.float64)
    return np.sqrt(squares_n).astype(np.float32)


def _quantiles(norms_n: np.ndarray) -> dict[float, float]:
    if not len(norms_n):
        return {}
    return dict(zip(QUANTILES, np.quantile(norms_n, QUANTILES).tolist(), strict=True))


def verify(
    path: str | os.PathLike[str], shards: int | None = None, decode: int = 65_536, seed: int = 0
) -> Verification:
    """Checks whether a sealed table is what its engram.json says.

    Compares engram.json with its own config, the shard headers with engram.json, and the number of
    rows in the headers with the sum of the primes. Tests each prime. Hashes rows, and decodes some.

    Args:
        path: The table's directory.
        shards: Number of shards to hash, drawn at random; None = all.
        decode: Rows of each layer to decode.
        seed: Seed of the choice of rows to decode.

    Raises:
        TableError: As `Table.open` and `Table.verify` raise it; also if the row counts are wrong.
        ConfigError: `shards` or `decode` is out of range.
    """
    table = Table.open(path)
    checked = table.verify(shards)
    layers = tuple(_check_layer(table, layer, decode, seed) for layer in table.layers)
    return Verification(table.table_id, checked.shards, checked.of, checked.bytes, layers)


def _check_layer(table: Table, layer: int, decode: int, seed: int) -> LayerChecked:
    primes = _check_counts(table, layer)
    not_finite: list[int] = []
    decoded = 0
    for ids_n, raw_nR in _chosen_rows(table, layer, decode, seed):
        finite_n = np.isfinite(table.fmt.decode(raw_nR)).all(axis=1)
        not_finite += ids_n[~finite_n].tolist()
        decoded += len(raw_nR)
    return LayerChecked(
        layer=layer,
        rows=table.rows(layer),
        columns=len(primes),
        primes=(min(primes), max(primes)),
        decoded=decoded,
        not_finite=tuple(not_finite[:_MOST_NAMED]),
    )


def _check_counts(table: Table, layer: int) -> tuple[int, ...]:
    """The primes of a layer's columns. Raises TableError if its shards have other row counts."""
    spec = table.config.hash
    primes = spec.primes(layer)
    lowest = np.repeat(spec.rows_per_head, spec.heads).tolist()
    pairs = zip(primes, lowest, strict=True)
    invalid = [prime for prime, low in pairs if prime < low or not is_prime(prime)]
    expected = math.ceil(sum(primes) / spec.pad_to) * spec.pad_to + table.config.hot_rows
    found = sum(read_header(shard.path)["rows"].rows for shard in table.shards(layer))
    if invalid or len(set(primes)) != len(primes) or found != expected:
        raise TableError(
            f"{table.path}: layer {layer}: expected {expected} rows from {len(primes)} distinct "
            f"primes, found {found} rows, invalid primes: {invalid}"
        )
    return primes


def _chosen_rows(
    table: Table, layer: int, sample: int | None, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All rows of a layer, or a sample, in order.

    Yields:
        Row ids, int64 [n], and rows, uint8 [n, row_bytes], a chunk at a time.
    """
    rows = table.rows(layer)
    if sample is not None:
        sample = as_int("sample", sample, 1)
    if sample is None or sample >= rows:
        for first, raw_nR in row_chunks(table, layer):
            yield np.arange(first, first + len(raw_nR)), raw_nR
        return
    ids_N = _sampled_ids(rows, sample, (seed, layer))
    shards = table.shard_arrays(layer)
    for first in range(0, sample, _STEP):
        ids_n = ids_N[first : first + _STEP]
        raw_nR = np.empty((len(ids_n), table.row_bytes), np.uint8)
        take(shards, ids_n, raw_nR)
        yield ids_n, raw_nR


def _sampled_ids(rows: int, sample: int, seed: tuple[int, int]) -> np.ndarray:
    """int64 [sample], ascending: one row of each of `sample` parts of about equal size."""
    bounds = np.arange(sample + 1) * rows // sample
    shares_N = np.random.default_rng(seed).random(sample)
    return bounds[:-1] + (shares_N * np.diff(bounds)).astype(np.int64)
