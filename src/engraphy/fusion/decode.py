"""One decoded token: where the inputs of the conv of each sequence lie."""

from __future__ import annotations

from typing import NamedTuple


class Columns(NamedTuple):
    """Addresses of two columns of a buffer, those of the first sequence: the oldest that is looked
    at now, and the next one to be written; `stride` values further lie those of the second
    sequence."""

    oldest: int
    next: int
    stride: int


NO_COLUMNS = Columns(0, 0, 0)  # of a layer without a conv
