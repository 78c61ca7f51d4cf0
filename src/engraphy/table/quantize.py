"""Tables of the same addresses in other row formats: made (`quantize`), and compared row by row
(`compare`).

What a format costs a model is its loss on text, which needs the model; what it costs the rows is
measured here, while they are written.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import ConfigError, InputError, TableError
from ..rows.format import RowFormat
from ..system.files import check_folder
from .chunks import Progress, row_chunks
from .manifest import Manifest
from .table import Table


@dataclass(frozen=True)
class Difference:
    """How rows differ from the reference they were made from.

    different: rows of which any value differs. not_finite: rows with NaN or infinities on either
    side (or a difference beyond float32), which are left out of what follows. max_abs, mean_abs: of
    the differences of values. relative_rms: root of the sum of their squares over that of the
    reference's values. mean_cosine, min_cosine: of each row with its reference, over rows whose
    reference is not zero. The last three are None where the reference is zero everywhere.
    """

    rows: int
    different: int
    not_finite: int
    max_abs: float
    mean_abs: float
    relative_rms: float | None
    mean_cosine: float | None
    min_cosine: float | None


@dataclass(frozen=True)
class Quantized:
    """A table in another row format. difference: of its rows to the parent's, by layer."""

    path: str
    table_id: str
    parent: str
    kind: str
    bytes: int
    parent_bytes: int
    difference: dict[int, Difference]


@dataclass(frozen=True)
class Comparison:
    """Two tables. difference: of the second's rows to the first's, by layer; None where addresses
    differ, since then rows of one id mean different n-grams."""

    table_ids: tuple[str, str]
    parents: tuple[str | None, str | None]
    address_digests: tuple[str, str]
    kinds: tuple[str, str]
    difference: dict[int, Difference] | None

    @property
    def equal(self) -> bool:
        """Whether both have the same rows at the same addresses, as numbers."""
        return self.difference is not None and not any(
            layer.different for layer in self.difference.values()
        )


def quantize(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    kind: str,
    *,
    progress: Progress | None = None,
) -> Quantized:
    """Write the rows of a sealed table to a new one of rows of `kind`, with the old one as
    `parent`.

    Memory stays at some MB. An unfinished table is removed on an error, and after a kill says
    "open": it never reads as sealed. Raises ConfigError for a kind that the rows cannot have
    (fp8_scaled has a scale that only a release knows), InputError naming the rows where a value
    does not fit, TableError where `out` is taken or cannot be written.
    """
    source, out = Table.open(path), Path(os.path.abspath(out))
    fmt = RowFormat(kind, source.fmt.d)
    if fmt == source.fmt:
        raise ConfigError(f"{source.path}: expected another row format than its own, found {kind}")
    try:
        check_folder(out, source.config.row_count() * fmt.row_bytes, taken=TableError)
        table = Table.create(out, source.config, fmt, _Vocab.of(source), parent=source.table_id)
        try:
            total, before, differences = source.config.row_count(), 0, {}
            for layer in source.layers:
                counter = _Counter()
                for first, raw_nR in row_chunks(source, layer):
                    values_nd = source.fmt.decode(raw_nR)
                    written_nR = _encode(fmt, values_nd, layer, first)
                    table.write_rows(layer, first, written_nR)
                    counter.add(values_nd, fmt.decode(written_nR))
                    if progress:
                        progress(
                            "quantising",
                            (before + first + len(raw_nR)) * fmt.row_bytes,
                            total * fmt.row_bytes,
                        )
                differences[layer], before = counter.result(), before + source.rows(layer)
            if progress:
                progress("sealing", 0, 0)
            table.seal()
        except BaseException:
            table.close()
            shutil.rmtree(out, ignore_errors=True)
            raise
    except OSError as error:
        raise TableError(f"{out}: the table cannot be written ({error})") from error
    return Quantized(
        str(out),
        table.table_id,
        source.table_id,
        kind,
        total * fmt.row_bytes,
        total * source.row_bytes,
        differences,
    )


def compare(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
) -> Comparison:
    """Identities of two sealed tables and, where their addresses are the same, how their rows
    differ as numbers.

    Raises what `Table.open` raises.
    """
    a, b = Table.open(first), Table.open(second)
    differences = None
    if a.address_digest == b.address_digest:
        differences, before, total = {}, 0, a.config.row_count() * a.row_bytes
        for layer in a.layers:
            counter = _Counter()
            for (row, raw_nR), (_, other_nR) in zip(
                row_chunks(a, layer), row_chunks(b, layer), strict=True
            ):
                counter.add(a.fmt.decode(raw_nR), b.fmt.decode(other_nR))
                if progress:
                    progress("comparing", before + (row + len(raw_nR)) * a.row_bytes, total)
            differences[layer], before = counter.result(), before + a.rows(layer) * a.row_bytes
    return Comparison(
        (a.table_id, b.table_id),
        (a.parent, b.parent),
        (a.address_digest, b.address_digest),
        (a.fmt.kind, b.fmt.kind),
        differences,
    )


@dataclass(frozen=True)
class _Vocab:
    """Stands for the vocabulary map of a table, which keeps only its identity."""

    digest: str
    size: int

    @classmethod
    def of(cls, table: Table) -> _Vocab:
        return cls(Manifest.read(table.path).vocab_digest, table.config.hash.vocab_size)

    def __len__(self) -> int:
        return self.size


def _encode(fmt: RowFormat, values_nd: np.ndarray, layer: int, first: int) -> np.ndarray:
    try:
        return fmt.encode(values_nd)
    except InputError as error:
        raise InputError(f"layer {layer}, rows from {first} on: {error}") from None


class _Counter:
    """Adds up a Difference over chunks of rows: differences in float32, sums in float64."""

    def __init__(self) -> None:
        self.rows = self.different = self.not_finite = self.values = self.directions = 0
        self.max_abs = self.sum_abs = self.squares = self.reference = self.cosines = 0.0
        self.min_cosine = math.inf

    def add(self, old_nd: np.ndarray, new_nd: np.ndarray) -> None:
        """Reference and rows, float32 [n, d]."""
        with np.errstate(over="ignore", invalid="ignore"):
            error_nd = np.abs(new_nd - old_nd)
        largest_n = error_nd.max(axis=1)
        finite_n = np.isfinite(
            largest_n
        )  # NaN and infinities on either side come through both steps
        self.rows += len(old_nd)
        if not finite_n.all():
            old_md, new_md = old_nd[~finite_n], new_nd[~finite_n]
            same_md = (old_md == new_md) | (np.isnan(old_md) & np.isnan(new_md))
            self.different += int((~same_md.all(axis=1)).sum())
            self.not_finite += len(old_md)
            old_nd, new_nd, error_nd, largest_n = (
                x[finite_n] for x in (old_nd, new_nd, error_nd, largest_n)
            )
        self.different += int((largest_n > 0).sum())
        self.values += error_nd.size
        self.max_abs = max(self.max_abs, float(largest_n.max(initial=0.0)))
        self.sum_abs += float(error_nd.sum(dtype=np.float64))
        pairs = ((error_nd, error_nd), (old_nd, new_nd), (old_nd, old_nd), (new_nd, new_nd))
        error_n, dot_n, old_n, new_n = (
            np.einsum("nd,nd->n", a, b, dtype=np.float64) for a, b in pairs
        )
        self.squares += float(error_n.sum())
        self.reference += float(old_n.sum())
        kept_n = old_n > 0
        size_n = np.sqrt(old_n[kept_n]) * np.sqrt(new_n[kept_n])
        cosine_n = np.divide(dot_n[kept_n], size_n, out=np.zeros_like(size_n), where=size_n > 0)
        self.directions += len(cosine_n)
        self.cosines += float(cosine_n.sum())
        self.min_cosine = min(self.min_cosine, float(cosine_n.min(initial=math.inf)))

    def result(self) -> Difference:
        """What has been added."""
        some = self.directions > 0
        return Difference(
            self.rows,
            self.different,
            self.not_finite,
            self.max_abs,
            self.sum_abs / max(1, self.values),
            math.sqrt(self.squares / self.reference) if self.reference else None,
            self.cosines / self.directions if some else None,
            self.min_cosine if some else None,
        )
