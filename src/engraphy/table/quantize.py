"""Tables of the same addresses in other row formats: made by `quantize`, compared by `compare`.

The cost of a format for a model is a higher loss on text, and measuring that needs the model. This
module measures the differences of the rows, while they are written.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import ConfigError, TableError
from ..rows.format import RowFormat
from ..system.files import check_folder
from .chunks import Progress, RowSource, encode_rows, row_chunks
from .manifest import Manifest
from .table import Table


@dataclass(frozen=True)
class Difference:
    """How rows differ from the reference they were made from.

    Attributes:
        rows: Number of rows.
        different: Rows with at least one different value.
        not_finite: Rows with NaN or infinities on either side, or a difference beyond float32. The
            statistics below leave them out.
        max_abs: The largest difference of two values.
        mean_abs: The mean difference of two values.
        relative_rms: The square root of the sum of squared differences, divided by the square root
            of the sum of the reference's squared values.
        mean_cosine: Mean cosine of a row and its reference, over rows whose reference is not zero.
        min_cosine: The smallest such cosine.

    The last three are None if the reference is zero everywhere.
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
    """A table in another row format.

    Attributes:
        path: The new table's directory.
        table_id: The new table's id.
        parent: The id of the table that it was made from.
        kind: The kind of its rows.
        bytes: Bytes of its rows.
        parent_bytes: Bytes of the parent's rows.
        difference: Difference of its rows from the parent's, by layer.
    """

    path: str
    table_id: str
    parent: str
    kind: str
    bytes: int
    parent_bytes: int
    difference: dict[int, Difference]


@dataclass(frozen=True)
class Comparison:
    """The result of comparing two tables. The first one is the reference.

    Attributes:
        table_ids: Their ids.
        parents: The ids of the tables that they were made from.
        address_digests: Identities of their addresses.
        kinds: Kinds of their rows.
        difference: Difference of the second table's rows from the first's, by layer. None if the
            addresses differ: rows with the same id then belong to different n-grams.
    """

    table_ids: tuple[str, str]
    parents: tuple[str | None, str | None]
    address_digests: tuple[str, str]
    kinds: tuple[str, str]
    difference: dict[int, Difference] | None

    @property
    def equal(self) -> bool:
        """Whether both have the same rows at the same addresses, as numbers."""
        if self.difference is None:
            return False
        return not any(layer.different for layer in self.difference.values())


def quantize(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    kind: str,
    *,
    progress: Progress | None = None,
) -> Quantized:
    """Writes the rows of a sealed table to a new table, in another row format.

    The old table is the `parent` of the new one. Memory stays at some MB. After an error the
    unfinished table is removed; after a kill it is "open", and never reads as sealed.

    Args:
        path: The sealed table's directory.
        out: A new or empty directory.
        kind: Kind of the new rows; not fp8_scaled, whose scale only a release knows, and no kind
            that is only read from GGUF files.
        progress: Called as rows are written.

    Raises:
        ConfigError: The rows cannot have this kind, or have it already.
        InputError: A value does not fit the kind; names the rows.
        TableError: `out` is taken or cannot be written, for example on a full disk; or as
            `Table.open` raises it.
    """
    source = Table.open(path)
    out = Path(os.path.abspath(out))
    fmt = RowFormat(kind, source.fmt.d)
    fmt.check_encodes()
    if fmt == source.fmt:
        raise ConfigError(f"{source.path}: expected another row format than its own, found {kind}")
    total = source.config.row_count()
    try:
        check_folder(out, total * fmt.row_bytes, taken=TableError)
        table = Table.create(
            out, source.config, fmt, _Vocab.of(source), parent=source.table_id, hot=source.hot
        )
        try:
            differences = _write_rows(source, table, progress)
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
        path=str(out),
        table_id=table.table_id,
        parent=source.table_id,
        kind=kind,
        bytes=total * fmt.row_bytes,
        parent_bytes=total * source.row_bytes,
        difference=differences,
    )


def _write_rows(source: Table, table: Table, progress: Progress | None) -> dict[int, Difference]:
    """Writes all rows of one table to another, in its format; returns how they differ, by layer."""
    width = table.row_bytes
    total = source.config.row_count()
    before = 0
    differences: dict[int, Difference] = {}
    for layer in source.layers:
        counter = _Counter()
        for first, raw_nR in row_chunks(source, layer):
            values_nd = source.fmt.decode(raw_nR)
            written_nR = encode_rows(table.fmt, values_nd, layer, first)
            table.write_rows(layer, first, written_nR)
            counter.add(values_nd, table.fmt.decode(written_nR))
            if progress:
                progress("quantising", (before + first + len(raw_nR)) * width, total * width)
        differences[layer] = counter.result()
        before += source.rows(layer)
    return differences


def compare(
    first: str | os.PathLike[str] | RowSource,
    second: str | os.PathLike[str] | RowSource,
    *,
    progress: Progress | None = None,
) -> Comparison:
    """Compares two tables: their identities, and their rows if their addresses are the same.

    Args:
        first: The one that is the reference: the directory of a sealed table, or an open table, or
            the tables of a release (`engraphy.released.open_rows`).
        second: The other one.
        progress: Called as rows are read.

    Raises:
        TableError: What `Table.open` raises.
    """
    a = Table.open(first) if isinstance(first, (str, os.PathLike)) else first
    b = Table.open(second) if isinstance(second, (str, os.PathLike)) else second
    differences = None
    if a.address_digest == b.address_digest:
        differences = _compare_rows(a, b, progress)
    return Comparison(
        table_ids=(a.table_id, b.table_id),
        parents=(a.parent, b.parent),
        address_digests=(a.address_digest, b.address_digest),
        kinds=(a.fmt.kind, b.fmt.kind),
        difference=differences,
    )


def _compare_rows(a: RowSource, b: RowSource, progress: Progress | None) -> dict[int, Difference]:
    width = a.fmt.row_bytes
    total = a.config.row_count() * width
    before = 0
    differences: dict[int, Difference] = {}
    for layer in a.layers:
        counter = _Counter()
        chunks = zip(row_chunks(a, layer), row_chunks(b, layer), strict=True)
        for (row, raw_nR), (_, other_nR) in chunks:
            counter.add(a.fmt.decode(raw_nR), b.fmt.decode(other_nR))
            if progress:
                progress("comparing", before + (row + len(raw_nR)) * width, total)
        differences[layer] = counter.result()
        before += a.rows(layer) * width
    return differences


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


class _Counter:
    """Adds up a Difference over chunks of rows: differences in float32, sums in float64."""

    def __init__(self) -> None:
        self.rows = 0
        self.different = 0
        self.not_finite = 0
        self.values = 0
        self.cosines = 0  # number of rows that have one
        self.max_abs = 0.0
        self.sum_abs = 0.0
        self.sum_squares = 0.0  # of differences
        self.sum_reference = 0.0  # of squares of the reference
        self.sum_cosines = 0.0
        self.min_cosine = math.inf

    def add(self, old_nd: np.ndarray, new_nd: np.ndarray) -> None:
        """Adds reference and rows, float32 [n, d]."""
        self.rows += len(old_nd)
        with np.errstate(over="ignore", invalid="ignore"):
            error_nd = np.abs(new_nd - old_nd)
        largest_n = error_nd.max(axis=1)
        finite_n = np.isfinite(largest_n)  # NaN and infinities of either side are still there
        if not finite_n.all():
            self._add_not_finite(old_nd[~finite_n], new_nd[~finite_n])
            old_nd = old_nd[finite_n]
            new_nd = new_nd[finite_n]
            error_nd = error_nd[finite_n]
            largest_n = largest_n[finite_n]
        self.different += int((largest_n > 0).sum())
        self.values += error_nd.size
        self.max_abs = max(self.max_abs, float(largest_n.max(initial=0.0)))
        self.sum_abs += float(error_nd.sum(dtype=np.float64))
        self.sum_squares += float(_dot(error_nd, error_nd).sum())
        self._add_cosines(old_nd, new_nd)

    def _add_not_finite(self, old_md: np.ndarray, new_md: np.ndarray) -> None:
        same_md = (old_md == new_md) | (np.isnan(old_md) & np.isnan(new_md))
        self.different += int((~same_md.all(axis=1)).sum())
        self.not_finite += len(old_md)

    def _add_cosines(self, old_nd: np.ndarray, new_nd: np.ndarray) -> None:
        dot_n = _dot(old_nd, new_nd)
        old_n = _dot(old_nd, old_nd)
        new_n = _dot(new_nd, new_nd)
        self.sum_reference += float(old_n.sum())
        kept_n = old_n > 0
        size_n = np.sqrt(old_n[kept_n]) * np.sqrt(new_n[kept_n])
        cosine_n = np.divide(dot_n[kept_n], size_n, out=np.zeros_like(size_n), where=size_n > 0)
        self.cosines += len(cosine_n)
        self.sum_cosines += float(cosine_n.sum())
        self.min_cosine = min(self.min_cosine, float(cosine_n.min(initial=math.inf)))

    def result(self) -> Difference:
        """What has been added."""
        relative_rms = mean_cosine = min_cosine = None
        if self.sum_reference:
            relative_rms = math.sqrt(self.sum_squares / self.sum_reference)
        if self.cosines:
            mean_cosine = self.sum_cosines / self.cosines
            min_cosine = self.min_cosine
        return Difference(
            rows=self.rows,
            different=self.different,
            not_finite=self.not_finite,
            max_abs=self.max_abs,
            mean_abs=self.sum_abs / max(1, self.values),
            relative_rms=relative_rms,
            mean_cosine=mean_cosine,
            min_cosine=min_cosine,
        )


def _dot(a_nd: np.ndarray, b_nd: np.ndarray) -> np.ndarray:
    """Products of rows, float64 [n]."""
    return np.einsum("nd,nd->n", a_nd, b_nd, dtype=np.float64)
