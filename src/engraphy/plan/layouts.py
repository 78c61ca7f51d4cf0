"""The memories of published models by name, and those that a config or a table describes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..rows.format import RowFormat
from ..spec import published
from ..spec.config import EngramConfig
from ..spec.dialects import DIALECTS
from ..spec.model_config import config_fields, need
from ..system.checks import as_int
from ..table.manifest import FILE_NAME
from ..table.table import Table

_PAPER = "arXiv 2601.07372: table of models; the row format is not printed, bf16 is assumed"


@dataclass(frozen=True)
class Layout:
    """What a plan has to know about a model and its memory.

    Attributes:
        name: How it is called.
        config: The memory.
        blocks: Blocks of the model.
        row_format: How a row is stored.
        source: Where the sizes come from.

    Raises:
        ConfigError: A memory layer is not one of the blocks, or rows have another width.
    """

    name: str
    config: EngramConfig
    blocks: int
    row_format: RowFormat
    source: str

    def __post_init__(self) -> None:
        as_int(f"{self.name}, blocks", self.blocks, 1)
        last = max(self.config.hash.layer_ids)
        if last >= self.blocks:
            raise ConfigError(
                f"{self.name}, blocks: expected more than {last}, the last layer with a memory, "
                f"found {self.blocks}"
            )
        if self.row_format.d != self.config.dim:
            raise ConfigError(
                f"{self.name}, row format: expected rows of {self.config.dim} values, "
                f"found {self.row_format.d}"
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers with a memory, 0-based, ascending."""
        return tuple(sorted(self.config.hash.layer_ids))

    @property
    def rows_per_token(self) -> int:
        """Rows that one token reads, in all layers together."""
        return len(self.layers) * self.config.hash.columns

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.row_format.row_bytes

    @property
    def table_bytes(self) -> int:
        """Bytes of the tables of all layers."""
        return self.config.table_bytes(self.row_bytes)


def _paper(name: str, config: EngramConfig) -> Layout:
    """Engram-27B and Engram-40B: 30 blocks."""
    return Layout(name, config, 30, RowFormat("bf16", config.dim), _PAPER)


def _v41() -> Layout:
    """DeepSeek-V4.1-Flash as released: 40 blocks, rows of fp8 with their scales."""
    config = published.deepseek_v41()
    source = "config.json and shard headers of DeepSeek-V4.1-Flash"
    return Layout("V4.1", config, 40, RowFormat("fp8", config.dim), source)


def _qwen38() -> Layout:
    """Qwen3.8-Flash-Next as released: 48 blocks, bf16 rows."""
    config = published.qwen38()
    source = (
        "Qwen4-Exp in transformers 5.23; 48 blocks: sgl-project/sglang-jax #1655; the table in the "
        "second block: SemiAnalysisAI/InferenceX-app #889"
    )
    return Layout("Qwen3.8", config, 48, RowFormat("bf16", config.dim), source)


_MAKERS: dict[str, Callable[[], Layout]] = {
    "27B": lambda: _paper("27B", published.engram_27b()),
    "40B": lambda: _paper("40B", published.engram_40b()),
    "V4.1": _v41,
    "Qwen3.8": _qwen38,
}
LAYOUTS = tuple(_MAKERS)
"""Names that `layout` knows."""


def layout(
    what: str | os.PathLike[str], *, blocks: int | None = None, row_kind: str | None = None
) -> Layout:
    """The layout of a published model, of a config file, or of a table.

    Args:
        what: One of `LAYOUTS`, in any case; or a path: a model's config.json, a folder with one, or
            the folder of a table. A config without a memory gets the defaults of
            `EngramConfig.for_model`.
        blocks: Blocks of the model; needed for a table, which does not know them.
        row_kind: Rows are stored as this kind of `RowFormat`; None = as they are: fp8 with scales
            in DeepSeek-V4.1, bf16 in Qwen4-Exp and the paper, its own format in a table.

    Returns:
        The layout.

    Raises:
        ConfigError: It is neither a name nor a path of that kind, or a size does not fit.
        TableError: The table cannot be used.
    """
    names = {name.lower(): make for name, make in _MAKERS.items()}
    make = names.get(os.fspath(what).lower())
    if make is not None:
        found = make()
    else:
        found = _read(Path(what), blocks)
    if blocks is None and row_kind is None:
        return found
    fmt = found.row_format if row_kind is None else _format(row_kind, found.config.dim)
    return Layout(found.name, found.config, blocks or found.blocks, fmt, found.source)


def layout_of_config(config: Any, name: str = "config") -> Layout:
    """The layout that a model's config describes.

    Args:
        config: A transformers config, or its fields. One without a memory gets the defaults of
            `EngramConfig.for_model`.
        name: How the layout is called.

    Returns:
        The layout, with rows as the release stores them, or bf16.

    Raises:
        ConfigError: A field is missing or invalid.
    """
    fields = config_fields(config)
    blocks = as_int("num_hidden_layers", need(fields, "num_hidden_layers", "n_layers"), 1)
    releases = [dialect.release for dialect in DIALECTS.values() if dialect.release is not None]
    if any(fields.get(release.marker) for release in releases):
        memory = EngramConfig.from_hf(config)
        kind = "fp8" if memory.hash.rules.released.block_scales else "bf16"
        source = f"{memory.hash.rules.released.title} config"
    else:
        memory = EngramConfig.for_model(config)
        kind = "bf16"
        source = "the config has no memory; these are the defaults of EngramConfig.for_model"
    return Layout(name, memory, blocks, RowFormat(kind, memory.dim), source)


def _read(path: Path, blocks: int | None) -> Layout:
    if (path / FILE_NAME).is_file():
        table = Table.open(path)
        table.close()
        if blocks is None:
            raise ConfigError(
                f"{path}: expected the number of the model's blocks with a table, found none; "
                "give blocks"
            )
        return Layout(str(path), table.config, blocks, table.fmt, "the table's engram.json")
    file = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"layout: expected one of {', '.join(LAYOUTS)}, a config.json, or the folder of a "
            f"model or a table, found {str(path)!r} ({error})"
        ) from None
    return layout_of_config(fields, str(path))


def _format(kind: str, dim: int) -> RowFormat:
    return RowFormat(kind, dim, 1.0 if kind == "fp8_scaled" else None)
