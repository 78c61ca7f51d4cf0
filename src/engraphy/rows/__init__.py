"""From row ids to numbers: how a row lies in bytes, and how rows are read."""

from ..system.moved import moved_names
from .format import RowFormat
from .read import read

__all__ = ["RowFormat", "read"]

__getattr__ = moved_names(
    __name__,
    {
        "Readable": "rows.read",
        "addresses": "rows.read",
        "by_shard": "rows.read",
        "check_array": "system.checks",
        "check_ids": "rows.read",
        "check_out": "system.checks",
        "gather_mapped": "rows.read",
        "take": "rows.read",
    },
)
