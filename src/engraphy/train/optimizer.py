"""Row optimisers: they update the rows that a step has read, and no others.

The cost of a step depends on the rows of the batch, not on the table. Moments are in stores of
their own, one per layer, with as many rows as the layer. A step sorts gradients by row id, sums
duplicates in a fixed order, and makes one update per row.
"""

# _native is private to engraphy.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from .. import _native
from ..errors import ConfigError, DigestMismatch, InputError
from ..memory.grads import coalesce
from ..memory.memory import EngramMemory
from ..memory.summed import SummedGrad
from ..rows.format import RowFormat
from ..spec.config import EngramConfig
from ..store.group import StoreGroup
from ..system.files import publish_folder
from ..system.lfs import refuse_pointer
from ..table.table import Table
from .fused import Rows, Rule, update
from .rounding import FIRST_MOMENT, ROW, Rounding

_TRAINABLE = ("f32", "bf16")
# What states mean that were saved before these were settings.
_BEFORE_SETTINGS = {"moments": "f32", "rounding": {"mode": "nearest", "seed": 0}}


class RowOptimizer:
    """Base of the row optimisers: drains `memory.row_grads`, and updates rows and moments.

    A subclass defines `name`, `moment_width`, `update` and `hyper`; `engraphy.train.testing` has
    the tests that it should pass. Rows are f32 or bf16, and so are moments. bf16 is rounded as
    rounding.py says: stochastically, or to nearest, which loses small steps.

    Attributes:
        name: the kind of optimiser, which `save` writes.
        memory: the memory whose rows learn.
        lr: learning rate of the next step.
        steps: steps made.
        moments: the stores of the moments, by layer.
        moment_format: how the moments of a row are stored.
        rounding: how rows and moments are rounded to bf16.
    """

    name: str

    def __init__(
        self,
        memory: EngramMemory,
        lr: float,
        moments: str | os.PathLike[str] = "ram:",
        *,
        moment_dtype: str = "f32",
        rounding: str = "stochastic",
        seed: int = 0,
    ):
        """Starts with moments of zero.

        Args:
            memory: the memory whose rows learn.
            lr: learning rate.
            moments: "ram:" to keep the moments in memory. "file:DIR", or a folder as a Path, to
                make a new table there, for moments that do not fit in memory.
            moment_dtype: "f32" or "bf16".
            rounding: "stochastic" or "nearest", of rows and moments that are bf16.
            seed: of stochastic rounding, from 0 to 2**64 - 1.

        Raises:
            ConfigError: the row format cannot be trained, the rows cannot be written, or an
                argument is none of these.
        """
        if moment_dtype not in _TRAINABLE:
            raise ConfigError(f"moment_dtype: expected one of {_TRAINABLE}, found {moment_dtype!r}")
        self.rounding = Rounding(rounding, seed)
        if memory.format.kind not in _TRAINABLE:
            raise ConfigError(
                f"row format: expected one of {_TRAINABLE} to train, found {memory.format.kind!r}"
            )
        memory.stores.check_writable()
        self.memory = memory
        self.lr = lr
        self.steps = 0
        self.moment_format = RowFormat(moment_dtype, self.moment_width(memory.config.dim))
        self.moments = self._new_moments(moments)

    def _new_moments(self, target: str | os.PathLike[str]) -> StoreGroup:
        """Moments of all rows, all zero."""
        if isinstance(target, str) and target.startswith("ram:"):
            return StoreGroup.zeros(self._moment_config(), self.moment_format, target)
        if isinstance(target, str) and not target.startswith("file:"):
            raise ConfigError(f"moments: expected ram:, file:DIR or a Path, found {target!r}")
        folder = target.removeprefix("file:") if isinstance(target, str) else target
        table = self._new_table(Path(folder))
        return StoreGroup.of_table(table, self.memory.layers, close_table=True)

    def moment_width(self, dim: int) -> int:
        """m: the number of moments for a row of `dim` values."""
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
        rule = self._native_rule()
        for layer, grad in summed.items():
            if rule is None:
                self._step_plain(layer, *grad)
            else:
                rows = Rows(self.memory.stores[layer], self.memory.format)
                moments = Rows(self.moments[layer], self.moment_format)
                key = self.rounding.key(self.steps, layer)
                update(rule, grad, rows, moments, self.rounding.mode == "stochastic", key)

    def _native_rule(self) -> Rule | None:
        """The native twin of `update` for this step; None if there is none.

        A class that overrides `update` alone has none, whatever it inherits.
        """
        if _native.core is None:
            return None
        for kind in type(self).__mro__:
            if "_rule" in vars(kind):
                return self._rule()
            if "update" in vars(kind):
                return None
        return None

    def _rule(self) -> Rule:
        """The native twin of `update`."""
        raise NotImplementedError

    def _step_plain(self, layer: int, ids_U: np.ndarray, grad_Ud: np.ndarray) -> None:
        """Updates rows and moments of a layer by `update`."""
        store = self.memory.stores[layer]
        moments = self.moments[layer]
        row_format = self.memory.format
        rows_Ud = row_format.decode(store.gather(ids_U))
        moments_Um = self.moment_format.decode(moments.gather(ids_U))
        self.update(rows_Ud, grad_Ud, moments_Um)
        key = self.rounding.key(self.steps, layer)
        rows_Ud = self._stored(row_format, rows_Ud, ids_U, key, ROW)
        moments_Um = self._stored(self.moment_format, moments_Um, ids_U, key, FIRST_MOMENT)
        store.scatter(ids_U, rows_Ud)
        moments.scatter(ids_U, moments_Um)

    def _stored(
        self, fmt: RowFormat, values_Nm: np.ndarray, ids_N: np.ndarray, key: int, part: int
    ) -> np.ndarray:
        """Records of values: uint8 [N, row_bytes]. Each d columns have their own random bits."""
        if fmt.kind == "f32":
            return values_Nm.view(np.uint8)
        dim = self.memory.config.dim
        raw_Nm = np.empty(values_Nm.shape, np.uint16)
        for number, first in enumerate(range(0, fmt.d, dim)):
            columns = slice(first, first + dim)
            raw_Nm[:, columns] = self.rounding.to_bf16(
                values_Nm[:, columns], ids_N, key, part + number
            )
        return raw_Nm.view(np.uint8)

    def state_dict(self) -> dict[str, Any]:
        """Steps, learning rate and settings; the moments are tables (`save`)."""
        return {"steps": self.steps, "lr": self.lr, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            ConfigError: it is the state of another optimiser or of other settings.
        """
        expected = self._identity()
        found = {key: state.get(key, _BEFORE_SETTINGS.get(key)) for key in expected}
        if found != expected:
            hint = ""
            if found.get("rounding") != expected.get("rounding"):
                hint = ": rounding= and seed= choose how bf16 is rounded"
            raise ConfigError(f"row optimiser: expected {expected}, found {found}{hint}")
        self.steps = int(state["steps"])
        self.lr = float(state["lr"])

    def _identity(self) -> dict[str, Any]:
        """What has to be the same when a run is resumed. Rounding counts if something is bf16."""
        identity = {"name": self.name, "hyper": self.hyper(), "moments": self.moment_format.kind}
        if "bf16" in (self.memory.format.kind, self.moment_format.kind):
            identity["rounding"] = self.rounding.to_json()
        return identity

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
        memory = self.memory
        return Table.create(path, config, self.moment_format, memory.vocab, hot=memory.hot)

    def _moment_config(self) -> EngramConfig:
        """The memory's config with rows as wide as the moments."""
        config = self.memory.config
        width = self.moment_format.d
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
    for layer, grad in summed.items():
        row = grad.bad_row()
        if row is not None:
            raise InputError(f"layer {layer}, row {row}: the gradient is not finite")
