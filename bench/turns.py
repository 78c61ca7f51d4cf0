"""Variants that take turns, and tables of what each reached beside a limit; for the other
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
    """One way to read `rows` rows. run: is given what `prepare` returned, which is not timed; may
    return seconds of its own."""

    rows: int
    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


def rows_a_second(variants: Mapping[str, Variant], rounds: int, seed: int) -> dict[str, float]:
    """Of each variant, the median over the rounds. Each round runs every variant once, in an order
    of its own; one round before them is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order, shuffle = list(variants), random.Random(seed).shuffle
    for _ in range(rounds + 1):
        shuffle(order)
        for name in order:
            given = variants[name].prepare()
            begun = time.perf_counter()
            answer = variants[name].run(given)
            taken = time.perf_counter() - begun
            seconds[name].append(answer if isinstance(answer, float) else taken)
            del given, answer
    return {
        name: variants[name].rows / statistics.median(values[1:])
        for name, values in seconds.items()
    }


@dataclass(frozen=True)
class Result:
    """Rows a second of paths, in the order in which they are shown. limit: which of them is the
    limit. asked: of a path, at least so many times another one."""

    title: str
    row_bytes: int
    speeds: Mapping[str, float]
    limit: str
    asked: Mapping[str, Sequence[tuple[float, str]]] = field(default_factory=dict)

    def missed(self) -> list[str]:
        """What was asked for and not reached, in words."""
        return [
            f"{self.title}: {path} is {self.speeds[path] / self.speeds[other]:.2f} times {other}, asked: {least:g}"
            for path, asked in self.asked.items()
            for least, other in asked
            if other in self.speeds and self.speeds[path] < least * self.speeds[other]
        ]

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
        return {
            "title": self.title,
            "row_bytes": self.row_bytes,
            "limit": self.limit,
            "rows_a_second": {name: round(speed, 1) for name, speed in self.speeds.items()},
            "asked": {name: [list(each) for each in asked] for name, asked in self.asked.items()},
        }


def best(speeds: Mapping[str, float], prefix: str) -> str:
    """The fastest of the variants whose names begin so."""
    return max((name for name in speeds if name.startswith(prefix)), key=lambda name: speeds[name])


def best_first(speeds: Mapping[str, float], prefix: str) -> dict[str, float]:
    """The fastest of these under the name `prefix`, then the others."""
    others = {name: speed for name, speed in speeds.items() if not name.startswith(prefix)}
    return {prefix: speeds[best(speeds, prefix)], **others}


def threads_in_words(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"
