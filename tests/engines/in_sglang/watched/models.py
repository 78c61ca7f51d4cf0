"""Our classes for SGLang, and a note of each forward in the file of the variable WATCHED_FILE.

WATCHED_FORGETS=1 makes the memory forget what came before the chunk of each forward: the control,
which has to come out differently.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

import numpy as np

from engraphy.engines.chunks import Chunks
from engraphy.engines.served import ServedMemory, Step
from engraphy.engines.sglang.models import EntryClass

__all__ = ["EntryClass"]

_begin = ServedMemory.begin


def _noted_begin(self: ServedMemory, chunks: Chunks, history_RP: Any = None) -> Step:
    lengths = np.diff(chunks.bounds).tolist()
    known = (chunks.past_RP >= 0).sum(1).tolist()
    with open(os.environ["WATCHED_FILE"], "a") as file:
        file.write(json.dumps({"lengths": lengths, "known": known}) + "\n")
    if os.environ.get("WATCHED_FORGETS"):
        return _begin(self, replace(chunks, past_RP=np.full_like(chunks.past_RP, -1)))
    return _begin(self, chunks, history_RP)


ServedMemory.begin = _noted_begin
