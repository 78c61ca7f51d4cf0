"""What stores and the prefetcher have counted, for people (a table) and for Prometheus (its text
format)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.table import Table

from ..store.base import RowStore, StoreStats
from ..store.group import describe, kind_of, wrapped
from ..store.latency import Latency
from .prefetch import PrefetchStats

__all__ = ["describe", "prometheus", "table"]

_LIMITS = [
    2.0**power * 1e-9 for power in range(10, 35, 2)
]  # 1 us to 17 s: limits of Latency's own buckets
_STORE_COUNTERS = {
    "gathers": "Calls that read rows.",
    "rows": "Rows read.",
    "bytes": "Bytes of the rows read.",
    "reads": "Reads that the system was asked for.",
    "read_bytes": "Bytes that the system was asked for.",
    "hits": "Rows that the cache had.",
    "misses": "Rows that the cache read from the store behind it.",
}
_PREFETCH_COUNTERS = {
    "tickets": "Tickets submitted.",
    "inline": "Tickets that were read at once.",
    "cancelled": "Tickets given up.",
    "rows": "Rows asked for.",
}
_PREFETCH_GAUGES = {
    "waiting": "Tickets that are not read yet.",
    "bytes_in_flight": "Bytes of rows not read yet.",
}


def table(stores: Mapping[int, RowStore], prefetch: PrefetchStats | None = None) -> Table:
    """The counters of {layer: store}, a wrapper's followed by those of the store behind it."""
    found = Table("layer", "store", caption=None if prefetch is None else _in_words(prefetch))
    for name in ("calls", "now", "rows", "MiB", "hit rate", "read/used", "p50", "p99"):
        found.add_column(name, justify="right")
    for layer, store in stores.items():
        for name, stats in _chain(store):
            found.add_row(
                str(layer),
                name,
                f"{stats.gathers:,}",
                str(stats.under_way),
                f"{stats.rows:,}",
                f"{stats.bytes / 2**20:,.1f}",
                "" if stats.hit_rate is None else f"{stats.hit_rate:.1%}",
                "" if stats.amplification is None else f"{stats.amplification:.1f}",
                *(_duration(stats.latency.quantile(q)) for q in (0.5, 0.99)),
            )
    return found


def prometheus(stores: Mapping[int, RowStore], prefetch: PrefetchStats | None = None) -> str:
    """The same in Prometheus' text format 0.0.4, ended by a line feed: names begin with engraphy_."""
    chains = [
        ({"layer": str(layer), "store": name}, stats)
        for layer, store in stores.items()
        for name, stats in _chain(store)
    ]
    lines = _metric(
        "engraphy_store_info",
        "gauge",
        "What is served; always 1.",
        [(_identity(layer, store), 1) for layer, store in stores.items()],
    )
    for name, text in _STORE_COUNTERS.items():
        values = [
            (labels, getattr(stats, name))
            for labels, stats in chains
            if getattr(stats, name) is not None
        ]
        lines += _metric(f"engraphy_store_{name}_total", "counter", text, values) if values else []
    lines += _metric(
        "engraphy_store_under_way",
        "gauge",
        "Calls that have not returned.",
        [(labels, stats.under_way) for labels, stats in chains],
    )
    lines += _histogram(
        "engraphy_store_gather_seconds",
        "How long calls took.",
        [(labels, stats.latency) for labels, stats in chains],
    )
    if prefetch is not None:
        for name, text in _PREFETCH_COUNTERS.items():
            lines += _metric(
                f"engraphy_prefetch_{name}_total", "counter", text, [({}, getattr(prefetch, name))]
            )
        for name, text in _PREFETCH_GAUGES.items():
            lines += _metric(
                f"engraphy_prefetch_{name}", "gauge", text, [({}, getattr(prefetch, name))]
            )
        lines += _histogram(
            "engraphy_prefetch_wait_seconds",
            "How long the model waited for rows.",
            [({}, prefetch.waited)],
        )
    return "\n".join(lines) + "\n"


def _chain(store: RowStore) -> Iterator[tuple[str, StoreStats]]:
    """What a store and each store behind it is called, and has counted."""
    for part in wrapped(store):
        yield kind_of(part), part.stats


def _identity(layer: int, store: RowStore) -> dict[str, str]:
    info = store.info
    return {
        "layer": str(layer),
        "kind": info.kind,
        "table_id": str(info.table_id),
        "path": str(info.path),
        "address_digest": str(info.address_digest),
        "format": info.format.kind if info.format else "None",
    }


def _metric(
    name: str, kind: str, text: str, values: list[tuple[dict[str, str], float]]
) -> list[str]:
    return [
        f"# HELP {name} {text}",
        f"# TYPE {name} {kind}",
        *(f"{name}{_labels(labels)} {value}" for labels, value in values),
    ]


def _histogram(name: str, text: str, values: list[tuple[dict[str, str], Latency]]) -> list[str]:
    lines = [f"# HELP {name} {text}", f"# TYPE {name} histogram"]
    for labels, latency in values:
        buckets = [(f"{limit:.9g}", latency.within(limit)) for limit in _LIMITS] + [
            ("+Inf", latency.calls)
        ]
        lines += [
            f"{name}_bucket{_labels(labels | {'le': limit})} {calls}" for limit, calls in buckets
        ]
        lines.append(f"{name}_sum{_labels(labels)} {latency.seconds:.9g}")
        lines.append(f"{name}_count{_labels(labels)} {latency.calls}")
    return lines


def _labels(labels: Mapping[str, str]) -> str:
    escape = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    return (
        "{"
        + ",".join(f'{name}="{value.translate(escape)}"' for name, value in labels.items())
        + "}"
        if labels
        else ""
    )


def _in_words(prefetch: PrefetchStats) -> str:
    p50, p99 = (_duration(prefetch.waited.quantile(q)) or "-" for q in (0.5, 0.99))
    return (
        f"prefetch: {prefetch.tickets:,} tickets, {prefetch.inline:,} read at once, {prefetch.cancelled:,} given "
        f"up; waiting {prefetch.waiting}, {prefetch.bytes_in_flight / 2**20:,.1f} MiB; waits p50 {p50}, p99 {p99}"
    )


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    unit, size = next(
        ((unit, size) for unit, size in (("s", 1.0), ("ms", 1e-3)) if seconds >= size), ("us", 1e-6)
    )
    return f"{seconds / size:.3g} {unit}"
