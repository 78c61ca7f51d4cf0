"""Lookup: the rows of one chunk, on their way from `EngramMemory.lookup` to the blocks; and Trace, what was let in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .state import SequenceState


@dataclass
class Trace:
    """What a forward did, for looking inside: filled by `lookup` and `apply` when handed to `lookup`.

    row_ids: layer -> int64 [B, T, C]. gates: layer -> f32 [B, T, S], 0 at dead positions.
    """

    row_ids: dict[int, np.ndarray] = field(default_factory=dict)
    gates: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Lookup:
    """Rows of one chunk for every memory layer. rows: layer -> [B, T, E], leaves that require grad while training; a
    layer that is still being read is waited for when it is first asked for."""

    rows: Mapping[int, Tensor]
    live: Tensor | None
    starts: Tensor | None
    state: SequenceState | None
    trace: Trace | None


class Rows(Mapping[int, Tensor]):
    """Rows by layer, each of them waited for once."""

    def __init__(self, asked: dict[int, Callable[[], Tensor]]) -> None:
        self._asked = asked
        self._here: dict[int, Tensor] = {}

    @torch.compiler.disable
    def __getitem__(self, layer: int) -> Tensor:
        if layer not in self._here:
            self._here[layer] = self._asked[layer]()
        return self._here[layer]

    def __contains__(self, layer: object) -> bool:
        return layer in self._asked

    def __iter__(self) -> Iterator[int]:
        return iter(self._asked)

    def __len__(self) -> int:
        return len(self._asked)
