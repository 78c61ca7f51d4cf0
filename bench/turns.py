"""Variants that take turns, and tables that compare each with a limit; for the other
benchmarks."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One way to read rows.

    Attributes:
        rows: Rows that one run reads.
        prepare: Makes the input of `run`; not timed.
        run: Takes what `prepare` returned. May return the seconds that it clocked itself.
    """

    rows: int
    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


def seconds_by_round(
    variants: Mapping[str, Variant], rounds: int, seed: int
) -> dict[str, list[float]]:
    """Seconds of each variant in each round. Each round runs every variant once, in an order of its
    own. One round before them is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    shuffle = random.Random(seed).shuffle
    for _ in range(rounds + 1):
        shuffle(order)
        for name in order:
            prepared = variants[name].prepare()
            begun = time.perf_counter()
            answer = variants[name].run(prepared)
            taken = time.perf_counter() - begun
            seconds[name].append(answer if isinstance(answer, float) else taken)
            del prepared, answer
    return {name: values[1:] for name, values in seconds.items()}


def rows_a_second(variants: Mapping[str, Variant], rounds: int, seed: int) -> dict[str, float]:
    """Median speed of each variant over the rounds of `seconds_by_round`."""
    return {
        name: variants[name].rows / statistics.median(values)
        for name, values in seconds_by_round(variants, rounds, seed).items()
    }


@dataclass(frozen=True)
class Result:
    """Speeds of several paths.

    Attributes:
        title: What was measured.
        row_bytes: Size of a row.
        speeds: Rows a second by path, in the order in which they are shown.
        limit: The path that is the limit.
        asked: By path, pairs of (least ratio, other path): its speed should be at least that many
            times the other's.
    """

    title: str
    row_bytes: int
    speeds: Mapping[str, float]
    limit: str
    asked: Mapping[str, Sequence[tuple[float, str]]] = field(default_factory=dict)

    def missed(self) -> list[str]:
        """The ratios that were asked for and not reached, in words."""
        lines = []
        for path, asked in self.asked.items():
            for least, other in asked:
                if other not in self.speeds:
                    continue
                ratio = self.speeds[path] / self.speeds[other]
                if ratio < least:
                    lines.append(
                        f"{self.title}: {path} is {ratio:.2f} times {other}, asked: {least:g}"
                    )
        return lines

    def markdown(self) -> str:
        lines = [
            f"\n### {self.title}\n",
            "| path | M rows/s | GB/s | of the limit | asked, and found |",
            "|---|---|---|---|---|",
        ]
        for name, speed in self.speeds.items():
            asked = "; ".join(
                f"{least:g} x {other}: {speed / self.speeds[other]:.2f}"
                for least, other in self.asked.get(name, ())
                if other in self.speeds
            )
            lines.append(
                f"| {name} | {speed / 1e6:.3g} | {speed * self.row_bytes / 1e9:.3g} | "
                f"{speed / self.speeds[self.limit]:.2f} | {asked} |"
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        asked = {path: list(map(list, pairs)) for path, pairs in self.asked.items()}
        return {
            "title": self.title,
            "row_bytes": self.row_bytes,
            "limit": self.limit,
            "rows_a_second": {name: round(speed, 1) for name, speed in self.speeds.items()},
            "asked": asked,
        }


def best(speeds: Mapping[str, float], prefix: str) -> str:
    """The fastest of the variants whose names begin with `prefix`."""
    return max((name for name in speeds if name.startswith(prefix)), key=lambda name: speeds[name])


def best_first(speeds: Mapping[str, float], prefix: str) -> dict[str, float]:
    """The fastest variant whose name begins with `prefix`, under the name `prefix`, then all
    variants with other names."""
    others = {name: speed for name, speed in speeds.items() if not name.startswith(prefix)}
    return {prefix: speeds[best(speeds, prefix)], **others}


def threads_in_words(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"
