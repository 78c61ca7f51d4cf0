"""Studies: many training runs, compared. STUDIES lists them; `study` is their engine."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .study import Study


@dataclass(frozen=True)
class StudyEntry:
    """A study by name. It can be listed without importing the code that it runs.

    Attributes:
        name: Name of the study.
        sentence: What it compares.
        module: Module of this package that has the record.
        record: Name of the `Study` there.
        options: Fields of its config that a user sets, with a sentence about each. Those without a
            default are required.
    """

    name: str
    sentence: str
    module: str
    record: str
    options: Mapping[str, str]

    def load(self) -> Study:
        """Returns the study itself. Imports torch, and what else the study needs."""
        return getattr(importlib.import_module(f"{__name__}.{self.module}"), self.record)


def _comparisons(**sentences: str) -> Iterator[StudyEntry]:
    """Entries of comparisons, whose modules and records have their names."""
    options = {
        "seeds": _SEEDS,
        "tokens": _TOKENS,
        "data": _DATA,
        "backbone": "Name of the model that the arms change.",
        "rates": "Learning rates that each arm tries; one is not searched.",
        "rho": "Share of the experts that a memory leaves, unless an arm says otherwise.",
    }
    for name, sentence in sentences.items():
        yield StudyEntry(name, sentence, name, name.upper(), options)


_SEEDS = "Seeds, all different. The first one chooses the learning rates."
_TOKENS = "Training tokens of each run."
_DATA = "wiki, mix, mix+books:FOLDER, books:FOLDER, hf:NAME, or a text file or folder."
STUDIES: Mapping[str, StudyEntry] = {
    entry.name: entry
    for entry in (
        StudyEntry(
            "demo",
            "The demo's arms and a one-row control over seeds and learning rates.",
            "demo_study",
            "DEMO",
            {
                "seeds": _SEEDS,
                "tokens": _TOKENS,
                "data": _DATA,
            },
        ),
        StudyEntry(
            "adapt",
            "A memory, its controls and LoRA adapt a frozen model to medical text.",
            "adapt",
            "ADAPT",
            {
                "model": "Folder of a transformers model.",
                "general": "Text that the model and the domain do not hold: a file or a folder.",
                "seeds": _SEEDS,
                "tokens": _TOKENS,
                "rows_per_head": "Rows of each head of the memory.",
                "rates": "Arms that run, each at its learning rate; by default all arms run and "
                "search theirs.",
            },
        ),
        *_comparisons(
            baseline="Dense, experts, and experts with a memory, under AdamW and Muon.",
            allocation="How much of the sparse parameters a memory should take from experts.",
            controls="A memory beside memories that lack one thing, and a dense adapter.",
            ablation="Layers, orders, gate, heads, optimiser and size of a memory, one at a time.",
            where="Where a memory gains: by source, count and token, switched off, with less text.",
            depth="Whether a memory makes a model deeper: LogitLens and CKA of pairs.",
            needles="Whether a memory finds needles, or its conv; also in texts 4 times as long.",
            hot="Frequent n-grams with rows of their own, beside hashing: by route, over training.",
        ),
    )
}
"""The studies, by name."""
COMPARISONS = tuple(name for name, entry in STUDIES.items() if "backbone" in entry.options)
"""Names of the studies whose arms change a backbone."""
