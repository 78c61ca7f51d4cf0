"""Row optimisers: they update the rows that a step has read, and no others.

The cost of a step depends on the rows of the batch, not on the table. Moments are in stores of
their own, one per layer, with as many rows as the layer. A step sorts gradients by row id, sums
duplicates in a fixed order, and makes one update per row.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, DigestMismatch, InputError
from ..memory.grads import SummedGrad, coalesce
from ..memory.memory import EngramMemory
from ..rows.format import RowFormat
from ..spec.config import EngramConfig
from ..store.group import StoreGroup
from ..system.files import publish_folder
from ..system.lfs import refuse_pointer
from ..table.table import Table

_TRAINABLE = ("f32", "bf16")


class RowOptimizer:
    """Base of the row optimisers: drains `memory.row_grads`, and updates rows and moments.

    A subclass defines `name`, `moment_width`, `update` and `hyper`; `engraphy.train.testing` has
    the tests that it should pass. Rows are f32 or bf16. bf16 rows are rounded to nearest after each
    step, so updates below half a unit in the last place are lost.

    Attributes:
        name: the kind of optimiser, which `save` writes.
        memory: the memory whose rows learn.
        lr: learning rate of the next step.
        steps: steps made.
        moments: the stores of the moments, by layer.
    """

    name: str

    def __init__(self, memory: EngramMemory, lr: float, moments: str | os.PathLike[str] = "ram:"):
        """Starts with moments of zero.

        Args:
            memory: the memory whose rows learn.
            lr: learning rate.
            moments: "ram:" to keep the moments in memory. "file:DIR", or a folder as a Path, to
                make a new table there, for moments that do not fit in memory.

        Raises:
            ConfigError: the row format cannot be trained, the rows cannot be written, or `moments`
                is none of these.
        """
        if memory.format.kind not in _TRAINABLE:
            raise ConfigError(
                f"row format: expected one of {_TRAINABLE} to train, found {memory.format.kind!r}"
            )
        memory.stores.check_writable()
        self.memory = memory
        self.lr = lr
        self.steps = 0
        self._moment_format = RowFormat("f32", self.moment_width(memory.config.dim))
        self.moments = self._new_moments(moments)

    def _new_moments(self, target: str | os.PathLike[str]) -> StoreGroup:
        """Moments of all rows, all zero."""
        if isinstance(target, str) and target.startswith("ram:"):
            return StoreGroup.zeros(self._moment_config(), self._moment_format, target)
        if isinstance(target, str) and not target.startswith("file:"):
            raise ConfigError(f"moments: expected ram:, file:DIR or a Path, found {target!r}")
        folder = target.removeprefix("file:") if isinstance(target, str) else target
        table = self._new_table(Path(folder))
        return StoreGroup.of_table(table, self.memory.layers, close_table=True)

    def moment_width(self, dim: int) -> int:
        """m: the number of f32 moments for a row of `dim` values."""
        raise NotImplementedError

    def update(self, rows_Ud: np.ndarray, grad_Ud: np.ndarray, moments_Um: np.ndarray) -> None:
        """Updates rows and moments in place.

        Args:
            rows_Ud: f32, distinct rows of one layer.
            grad_Ud: f32, their gradients, duplicates summed.
            moments_Um: f32, their moments.
        """
        raise NotImplementedError

    def hyper(self) -> dict[str, Any]:
        """Settings that must be the same when a run is resumed, as JSON values."""
        raise NotImplementedError

    def step(self, summed: dict[int, SummedGrad] | None = None) -> None:
        """Makes one update.

        Args:
            summed: gradients by layer from `coalesce`, which may have been scaled. None = the
                memory's pending gradients.

        Raises:
            InputError: pending gradients are not finite. They are dropped; nothing is updated.
        """
        if summed is None:
            summed = coalesce(self.memory.drain_row_grads())
            check_finite(summed)
        self.steps += 1
        row_format = self.memory.format
        moment_format = self._moment_format
        for layer, (ids_U, grad_Ud) in summed.items():
            store = self.memory.stores[layer]
            moments = self.moments[layer]
            rows_Ud = row_format.decode(store.gather(ids_U))
            moments_Um = moment_format.decode(moments.gather(ids_U))
            self.update(rows_Ud, grad_Ud, moments_Um)
            store.scatter(ids_U, row_format.encode(rows_Ud))
            moments.scatter(ids_U, moment_format.encode(moments_Um))

    def state_dict(self) -> dict[str, Any]:
        """Steps and learning rate; the moments are tables (`save`)."""
        return {"name": self.name, "steps": self.steps, "lr": self.lr, "hyper": self.hyper()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`. Raises ConfigError for another optimiser or other settings."""
        expected = {"name": self.name, "hyper": self.hyper()}
        found = {key: state.get(key) for key in expected}
        if found != expected:
            raise ConfigError(f"row optimiser: expected {expected}, found {found}")
        self.steps = int(state["steps"])
        self.lr = float(state["lr"])

    @property
    def moment_bytes(self) -> int:
        """Bytes of the moments of all rows."""
        return self.moments.bytes

    def save(self, path: str | Path, table_id: str) -> None:
        """Writes the moments as a sealed table, and the state beside it. The folder appears whole.

        Args:
            path: a new folder.
            table_id: the rows that the moments belong to.

        Raises:
            ConfigError: `path` is taken.
            WriteFailed: the system refuses.
        """
        with publish_folder(path, needed=self.moment_bytes, last="optimizer.json") as folder:
            table = self._new_table(folder)
            try:
                self.moments.copy_to(table)
                table.seal()
            finally:
                table.close()
            state = {**self.state_dict(), "rows": table_id}
            (folder / "optimizer.json").write_text(json.dumps(state))

    def _new_table(self, path: Path) -> Table:
        """A table of moments, open for writing."""
        config = self._moment_config()
        return Table.create(path, config, self._moment_format, self.memory.vocab)

    def _moment_config(self) -> EngramConfig:
        """The memory's config with rows as wide as the moments."""
        config = self.memory.config
        width = self._moment_format.d
        layer = dataclasses.replace(config.layer, width=config.hash.columns * width)
        return dataclasses.replace(config, layer=layer, dim=width)

    def close(self) -> None:
        """Closes the moments. May be called again; a step afterwards raises StoreError."""
        self.moments.close()

    def load(self, path: str | Path, table_id: str) -> None:
        """Reads what `save` wrote.

        Args:
            path: the folder.
            table_id: the rows that the moments must belong to.

        Raises:
            ConfigError: there are no moments, or those of another optimiser.
            DigestMismatch: the moments belong to another table.
        """
        try:
            state = json.loads((Path(path) / "optimizer.json").read_text())
        except (OSError, ValueError) as error:
            refuse_pointer(Path(path) / "optimizer.json", ConfigError)
            raise ConfigError(
                f"{path}: expected the moments of a row optimiser, "
                f"found {type(error).__name__}: {error}"
            ) from None
        saved_for = state.pop("rows", None)
        if saved_for != table_id:
            raise DigestMismatch(
                f"{path}: expected moments of table {table_id}, found {saved_for}: "
                "they belong to another table"
            )
        self.load_state_dict(state)
        table = Table.open(path)
        try:
            with StoreGroup.of_table(table, self.memory.layers) as saved:
                saved.copy_to(self.moments)
        finally:
            table.close()


def check_finite(summed: dict[int, SummedGrad]) -> None:
    """Raises InputError naming the layer and row of the first gradient that is not finite."""
    for layer, (ids_U, grad_Ud) in summed.items():
        finite = np.isfinite(grad_Ud).all(axis=1)
        if not finite.all():
            row = int(ids_U[~finite][0])
            raise InputError(f"layer {layer}, row {row}: the gradient is not finite")
