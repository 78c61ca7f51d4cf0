"""Counters of stores in Prometheus' text format 0.0.4."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .base import RowStore, StoreStats
from .group import kind_of, wrapped
from .latency import Latency

# Seconds, 1 us to 17 s. Latency's own buckets have these limits, too.
_LIMITS = [2.0**power * 1e-9 for power in range(10, 35, 2)]
_STORE_COUNTERS = {
    "gathers": "Calls that read rows.",
    "rows": "Rows read.",
    "bytes": "Bytes of the rows read.",
    "reads": "Read calls to the system.",
    "read_bytes": "Bytes of these read calls.",
    "hits": "Rows found in the cache.",
    "misses": "Rows that the cache read from the store behind it.",
}
Labels = Mapping[str, str]


def store_metrics(stores: Mapping[int, RowStore]) -> list[str]:
    """The counters of stores, and of the stores behind them, as lines."""
    counted: list[tuple[Labels, StoreStats]] = []
    for layer, store in stores.items():
        for kind, stats in chain(store):
            labels = {"layer": str(layer), "store": kind}
            counted.append((labels, stats))
    served = [(_identity(layer, store), 1) for layer, store in stores.items()]
    text = "The table and format of the rows, as labels; always 1."
    lines = metric("engraphy_store_info", "gauge", text, served)
    for name, text in _STORE_COUNTERS.items():
        values = [(labels, getattr(stats, name)) for labels, stats in counted]
        values = [(labels, value) for labels, value in values if value is not None]
        if values:
            lines += metric(f"engraphy_store_{name}_total", "counter", text, values)
    under_way = [(labels, stats.under_way) for labels, stats in counted]
    lines += metric("engraphy_store_under_way", "gauge", "Calls that have not returned.", under_way)
    latencies = [(labels, stats.latency) for labels, stats in counted]
    return lines + histogram("engraphy_store_gather_seconds", "How long calls took.", latencies)


def chain(store: RowStore) -> Iterator[tuple[str, StoreStats]]:
    """Kind and counters of a store and of each store behind it."""
    for part in wrapped(store):
        yield kind_of(part), part.stats


def _identity(layer: int, store: RowStore) -> Labels:
    info = store.info
    return {
        "layer": str(layer),
        "kind": info.kind,
        "table_id": str(info.table_id),
        "path": str(info.path),
        "address_digest": str(info.address_digest),
        "format": info.format.kind if info.format else "None",
    }


def metric(name: str, kind: str, text: str, values: Sequence[tuple[Labels, float]]) -> list[str]:
    """One metric as lines: what it is, and a value for each set of labels."""
    return [
        f"# HELP {name} {text}",
        f"# TYPE {name} {kind}",
        *(f"{name}{_labels_text(labels)} {value}" for labels, value in values),
    ]


def histogram(name: str, text: str, values: Sequence[tuple[Labels, Latency]]) -> list[str]:
    """Durations as lines of a histogram."""
    lines = [f"# HELP {name} {text}", f"# TYPE {name} histogram"]
    for labels, latency in values:
        buckets = [(f"{limit:.9g}", latency.within(limit)) for limit in _LIMITS]
        buckets.append(("+Inf", latency.calls))
        for limit, calls in buckets:
            lines.append(f"{name}_bucket{_labels_text({**labels, 'le': limit})} {calls}")
        lines.append(f"{name}_sum{_labels_text(labels)} {latency.seconds:.9g}")
        lines.append(f"{name}_count{_labels_text(labels)} {latency.calls}")
    return lines


def _labels_text(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    escape = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    pairs = [f'{name}="{value.translate(escape)}"' for name, value in labels.items()]
    return "{" + ",".join(pairs) + "}"
