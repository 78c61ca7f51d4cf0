"""What a memory costs: rows, parameters and bytes, known before anything is made."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from ..errors import ConfigError
from ..rows.format import RowFormat
from ..spec.config import EngramConfig
from ..system.machine import VARIABLE, free_memory

_log = logging.getLogger("engraphy")


@dataclass(frozen=True)
class Cost:
    """What a memory takes. Its `str` is one line for a log.

    Attributes:
        rows: Rows of all layers together.
        table_parameters: Values in the table.
        table_bytes: Bytes of the table in its row format.
        dense_parameters: Values in the dense layers.
        dense_bytes: Bytes of the dense layers in their dtype.
    """

    rows: int
    table_parameters: int
    table_bytes: int
    dense_parameters: int
    dense_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.rows:,} rows, table {self.table_parameters:,} parameters = "
            f"{self.table_bytes / 1e6:,.1f} MB, dense {self.dense_parameters:,} parameters = "
            f"{self.dense_bytes / 1e6:,.1f} MB"
        )


def cost(
    config: EngramConfig, row_format: RowFormat | str = "f32", dtype: torch.dtype = torch.float32
) -> Cost:
    """What attaching `config` will take. Allocates nothing.

    Args:
        config: The memory.
        row_format: Row format of the table: a RowFormat, or its kind ("f32", "bf16", ...).
        dtype: Dtype of the dense layers.
    """
    fmt = RowFormat(row_format, config.dim) if isinstance(row_format, str) else row_format
    dense_parameters = config.dense_parameters()
    return Cost(
        rows=config.row_count(),
        table_parameters=config.table_parameters(),
        table_bytes=config.table_bytes(fmt.row_bytes),
        dense_parameters=dense_parameters,
        dense_bytes=dense_parameters * dtype.itemsize,
    )


def check_cost(
    config: EngramConfig, row_format: RowFormat | str, dtype: torch.dtype, in_ram: bool
) -> None:
    """Log what a memory takes and how much RAM is free.

    Raises ConfigError if its table goes into RAM and does not fit.
    """
    takes = cost(config, row_format, dtype)
    free = free_memory()
    _log.info(
        "attaching a memory to layers %s: %s; %s MB of RAM are free",
        list(config.hash.layer_ids),
        takes,
        "?" if free is None else f"{free / 1e6:,.1f}",
    )
    if in_ram and free is not None and takes.table_bytes + takes.dense_bytes > free:
        raise ConfigError(
            f"the memory takes {takes}, {free / 1e6:,.1f} MB of RAM are free: give fewer "
            "rows_per_head, a smaller dim or row_format, or a table on disk as store; "
            f"{VARIABLE} says otherwise"
        )
