"""Counters of stores and of the prefetcher: as a table to read, and in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from ..store.base import RowStore, StoreStats
from ..store.group import describe, kind_of, wrapped
from ..store.latency import Latency
from ..store.prometheus import chain, histogram, metric, store_metrics
from .prefetch import PrefetchStats

__all__ = ["describe", "prometheus", "table", "tiers"]

_PREFETCH_COUNTERS = {
    "tickets": "Tickets submitted.",
    "inline": "Tickets that were read at once.",
    "cancelled": "Tickets given up.",
    "rows": "Rows requested.",
}
_PREFETCH_GAUGES = {
    "waiting": "Tickets that are not read yet.",
    "bytes_in_flight": "Bytes of rows not read yet.",
}
_MEBIBYTE = 2**20


def table(stores: Mapping[int, RowStore], prefetch: PrefetchStats | None = None) -> Table:
    """The counters as a `rich` table. Below a wrapper's row is the row of the store behind it.

    Args:
        stores: layer -> store, such as `memory.stores`.
        prefetch: counters such as `memory.prefetcher.stats`, shown below the table; None = none.
    """
    caption = None if prefetch is None else _in_words(prefetch)
    shown = Table("layer", "store", caption=caption)
    for name in ("calls", "now", "rows", "MiB", "hit rate", "read/used", "p50", "p99"):
        shown.add_column(name, justify="right")
    for layer, store in stores.items():
        for kind, stats in chain(store):
            shown.add_row(str(layer), kind, *_cells(stats))
    return shown


def tiers(stores: Mapping[int, RowStore], prefetch: PrefetchStats | None = None) -> Table:
    """The counters by tier, all layers together: staging buffers, caches, and where the rows lie.

    Of the staging buffers calls are tickets, and times are waits of the model for rows that were
    read ahead. Of the others times are those of a call.

    Args:
        stores: layer -> store, such as `memory.stores`.
        prefetch: counters such as `memory.prefetcher.stats`; None = without the staging buffers.
    """
    shown = Table("tier")
    for name in ("calls", "rows", "answered", "MiB", "p50", "p99"):
        shown.add_column(name, justify="right")
    if prefetch is not None:
        calls, waits = f"{prefetch.tickets:,}", prefetch.waited
        shown.add_row("staging", calls, f"{prefetch.rows:,}", "", "", *_quantiles(waits))
    for name, parts in _by_tier(stores).items():
        rows = sum(part.rows for part in parts)
        hits = [part.hits for part in parts if part.hits is not None]
        share = f"{sum(hits) / rows:.1%}" if hits and rows else ""
        size = sum(part.bytes for part in parts) / _MEBIBYTE
        calls = sum(part.gathers for part in parts)
        latency = _together([part.latency for part in parts])
        times = _quantiles(latency)
        shown.add_row(name, f"{calls:,}", f"{rows:,}", share, f"{size:,.1f}", *times)
    return shown


def _by_tier(stores: Mapping[int, RowStore]) -> dict[str, list[StoreStats]]:
    """Name of a tier -> the counters of its stores, outermost tier first."""
    found: dict[str, list[StoreStats]] = {}
    for store in stores.values():
        for part in wrapped(store):
            name = part.info.kind if part.inner is None else kind_of(part)
            found.setdefault(name, []).append(part.stats)
    return found


def _together(latencies: Sequence[Latency]) -> Latency:
    """The durations of all calls."""
    counts = zip(*(latency.counts for latency in latencies), strict=True)
    return Latency(tuple(map(sum, counts)), sum(latency.seconds for latency in latencies))


def _quantiles(latency: Latency) -> tuple[str, str]:
    return _duration(latency.quantile(0.5)), _duration(latency.quantile(0.99))


def _cells(stats: StoreStats) -> list[str]:
    return [
        f"{stats.gathers:,}",
        str(stats.under_way),
        f"{stats.rows:,}",
        f"{stats.bytes / _MEBIBYTE:,.1f}",
        "" if stats.hit_rate is None else f"{stats.hit_rate:.1%}",
        "" if stats.amplification is None else f"{stats.amplification:.1f}",
        *_quantiles(stats.latency),
    ]


def prometheus(stores: Mapping[int, RowStore], prefetch: PrefetchStats | None = None) -> str:
    """The counters in Prometheus' text format 0.0.4, with a line feed at the end.

    Args:
        stores: layer -> store, such as `memory.stores`.
        prefetch: counters such as `memory.prefetcher.stats`; None = none.

    Returns:
        Metrics whose names begin with engraphy_, with the layer and the kind of the store as
        labels.
    """
    lines = store_metrics(stores)
    if prefetch is not None:
        lines += _prefetch_metrics(prefetch)
    return "\n".join(lines) + "\n"


def _prefetch_metrics(prefetch: PrefetchStats) -> list[str]:
    lines = []
    for name, text in _PREFETCH_COUNTERS.items():
        values = [({}, getattr(prefetch, name))]
        lines += metric(f"engraphy_prefetch_{name}_total", "counter", text, values)
    for name, text in _PREFETCH_GAUGES.items():
        values = [({}, getattr(prefetch, name))]
        lines += metric(f"engraphy_prefetch_{name}", "gauge", text, values)
    return lines + histogram(
        "engraphy_prefetch_wait_seconds",
        "How long the model waited for rows.",
        [({}, prefetch.waited)],
    )


def _in_words(prefetch: PrefetchStats) -> str:
    p50 = _duration(prefetch.waited.quantile(0.5)) or "-"
    p99 = _duration(prefetch.waited.quantile(0.99)) or "-"
    return (
        f"prefetch: {prefetch.tickets:,} tickets, {prefetch.inline:,} read at once, "
        f"{prefetch.cancelled:,} given up; waiting {prefetch.waiting}, "
        f"{prefetch.bytes_in_flight / _MEBIBYTE:,.1f} MiB; waits p50 {p50}, p99 {p99}"
    )


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    if seconds >= 1e-3:
        return f"{seconds / 1e-3:.3g} ms"
    return f"{seconds / 1e-6:.3g} us"
