"""What is in a table: statistics of its rows, and whether it is what it says. Knows neither tokens
nor models.

Rows are looked at all, or a sample of each layer that depends on the seed alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError, TableError
from ..rows.read import take
from ..spec.dialects import is_prime
from .chunks import Progress, row_chunks
from .safetensors import read_header
from .table import Table

QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
_STEP = 65_536


@dataclass(frozen=True)
class LayerStatistics:
    """One layer. disk_bytes: what its shards take, which is less than `bytes` while rows were never
    written. scanned: rows looked at. zero: those of them whose bytes are all zero: never written,
    or trained to nothing. norms: quantile -> Euclidean norm of the other rows; empty where there
    are none."""

    layer: int
    rows: int
    bytes: int
    disk_bytes: int
    scanned: int
    zero: int
    norms: dict[float, float]


@dataclass(frozen=True)
class LayerChecked:
    """One layer that has been verified. primes: smallest and largest of `columns`. decoded: rows
    looked at. not_finite: those of them that hold NaN or infinities, the first ten."""

    layer: int
    rows: int
    columns: int
    primes: tuple[int, int]
    decoded: int
    not_finite: tuple[int, ...]


@dataclass(frozen=True)
class Verification:
    """What `verify` has looked at: shards hashed of how many, bytes hashed, layers."""

    table_id: str
    shards: int
    of: int
    bytes: int
    layers: tuple[LayerChecked, ...]

    @property
    def sound(self) -> bool:
        """Whether all decoded rows are numbers. Everything else that may be wrong is raised."""
        return not any(layer.not_finite for layer in self.layers)


def statistics(
    path: str | os.PathLike[str],
    sample: int | None = 100_000,
    seed: int = 0,
    *,
    progress: Progress | None = None,
) -> list[LayerStatistics]:
    """Look at `sample` rows of each layer of a sealed table, None = at all of them.

    Raises what `Table.open` raises, ConfigError for a sample below 1.
    """
    table = Table.open(path)
    found = []
    for layer in table.layers:
        rows, width = table.rows(layer), table.row_bytes
        scanned, zero, norms = 0, 0, []
        for _, raw_nR in _looked_at(table, layer, sample, seed):
            kept_nR = raw_nR[raw_nR.any(axis=1)]
            scanned, zero = scanned + len(raw_nR), zero + len(raw_nR) - len(kept_nR)
            values_nd = table.fmt.decode(kept_nR)
            norms.append(
                np.sqrt(np.einsum("nd,nd->n", values_nd, values_nd, dtype=np.float64)).astype(
                    np.float32
                )
            )
            if progress:
                progress(f"layer {layer}", scanned * width, min(rows, sample or rows) * width)
        norms_n = np.concatenate(norms)
        disk = sum(shard.path.stat().st_blocks * 512 for shard in table.shards(layer))
        found.append(
            LayerStatistics(
                layer,
                rows,
                rows * width,
                disk,
                scanned,
                zero,
                dict(zip(QUANTILES, np.quantile(norms_n, QUANTILES).tolist(), strict=True))
                if len(norms_n)
                else {},
            )
        )
    return found


def verify(
    path: str | os.PathLike[str], shards: int | None = None, decode: int = 65_536, seed: int = 0
) -> Verification:
    """Look whether a sealed table is what it says: shards and headers, counts from the primes,
    digests, numbers.

    shards: how many to hash, drawn at random; None = all. decode: rows of each layer to decode.
    engram.json is compared with what follows from its own config, shard headers with engram.json,
    and the rows that the headers tell of with the sum of primes, each of which is tried. Raises
    what `Table.open` and `Table.verify` raise, TableError for counts.
    """
    table = Table.open(path)
    checked = table.verify(shards)
    layers = []
    for layer in table.layers:
        primes = _check_counts(table, layer)
        bad, decoded = [], 0
        for ids_n, raw_nR in _looked_at(table, layer, decode, seed):
            finite_n = np.isfinite(table.fmt.decode(raw_nR)).all(axis=1)
            bad += ids_n[~finite_n].tolist()
            decoded += len(raw_nR)
        layers.append(
            LayerChecked(
                layer,
                table.rows(layer),
                len(primes),
                (min(primes), max(primes)),
                decoded,
                tuple(bad[:10]),
            )
        )
    return Verification(table.table_id, checked.shards, checked.of, checked.bytes, tuple(layers))


def _check_counts(table: Table, layer: int) -> tuple[int, ...]:
    spec = table.config.hash
    primes = spec.primes(layer)
    least = np.repeat(spec.rows_per_head, spec.heads).tolist()
    wrong = [
        prime
        for prime, low in zip(primes, least, strict=True)
        if prime < low or not is_prime(prime)
    ]
    expected = math.ceil(sum(primes) / spec.pad_to) * spec.pad_to
    found = sum(read_header(shard.path)["rows"].rows for shard in table.shards(layer))
    if wrong or len(set(primes)) != len(primes) or found != expected:
        raise TableError(
            f"{table.path}: layer {layer}: expected {expected} rows from {len(primes)} distinct primes, "
            f"found {found} rows, numbers that cannot be meant: {wrong}"
        )
    return primes


def _looked_at(
    table: Table, layer: int, sample: int | None, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Row ids int64 [n] and rows uint8 [n, row_bytes], a chunk at a time."""
    rows = table.rows(layer)
    if sample is not None and sample < 1:
        raise ConfigError(f"sample: expected at least 1 row, found {sample}")
    if sample is None or sample >= rows:
        for first, raw_nR in row_chunks(table, layer):
            yield np.arange(first, first + len(raw_nR)), raw_nR
        return
    bounds = (
        np.arange(sample + 1) * rows // sample
    )  # one row of each part: as many rows as asked for, in order
    ids_N = bounds[:-1] + (
        np.random.default_rng((seed, layer)).random(sample) * np.diff(bounds)
    ).astype(np.int64)
    shards = table.shard_arrays(layer)
    for first in range(0, sample, _STEP):
        ids_n = ids_N[first : first + _STEP]
        raw_nR = np.empty((len(ids_n), table.row_bytes), np.uint8)
        take(shards, ids_n, raw_nR)
        yield ids_n, raw_nR
