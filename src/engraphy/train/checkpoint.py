"""Checkpoints of a training: folders `checkpoint-NNNNNNNN`, each complete once it has that name.

`write_state` writes what any training needs to go on: the dense weights and their optimiser, the
table and the moments of its rows. A training adds a file run.json of its own.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError
from ..system.files import publish_folder
from ..system.lfs import refuse_pointer
from .pair import OptimizerPair

_OPTIMIZER, _DENSE = "optimizer.pt", "dense.safetensors"
_TABLE, _MOMENTS = "table", "moments"
_DAMAGES = (OSError, ValueError, KeyError, SafetensorError, RuntimeError, pickle.UnpicklingError)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints below `folder`, oldest first."""
    return sorted(folder.glob("checkpoint-????????"))


def save_checkpoint(folder: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Writes a checkpoint below `folder`, which appears whole, then removes the older ones.

    Args:
        folder: Of the training.
        step: Steps that are done. A checkpoint of this step that is there is left as it is.
        write: Fills an empty folder, run.json included.

    Returns:
        The checkpoint.

    Raises:
        WriteFailed: The system refuses. The older ones are still there.
    """
    final = folder / f"checkpoint-{step:08d}"
    if final.exists():
        return final
    older = checkpoints(folder)
    with publish_folder(final, last="run.json") as partial:
        write(partial)
    for path in older:
        shutil.rmtree(path)
    return final


class State(NamedTuple):
    """What `write_state` has written, but for the rows.

    Attributes:
        tensors: The dense weights by name.
        optimizer: State of the dense optimiser.
        table_id: Of the table that the weights belong to; "" = there are no rows that learn.
    """

    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]
    table_id: str


def write_state(
    folder: Path, tensors: Callable[[], Mapping[str, Tensor]], pair: OptimizerPair
) -> str:
    """Writes weights, optimisers and rows into a folder.

    Args:
        folder: Exists, and holds none of these files.
        tensors: Returns the dense weights by name, as `state_dict` does. It is called once the
            table is written, since a memory's state names the rows that it belongs to.
        pair: The optimisers. Its rows are those of the memory that learns; without rows there is no
            table.

    Returns:
        The table_id; "" without rows.

    Raises:
        WriteFailed: The system refuses.
    """
    table_id = ""
    if pair.rows is not None:
        table_id = pair.rows.memory.write_table(folder / _TABLE)
        pair.rows.save(folder / _MOMENTS, table_id)
    whole = {name: value.contiguous() for name, value in tensors().items()}
    save_file(whole, folder / _DENSE, metadata={"table_id": table_id})
    # An open file: given a path, torch would not say what went wrong.
    with open(folder / _OPTIMIZER, "wb") as file:
        torch.save(pair.dense.state_dict(), file)
    return table_id


def read_state(folder: Path) -> State:
    """Reads what `write_state` has written. Raises ConfigError if it is damaged."""
    try:
        optimizer = torch.load(folder / _OPTIMIZER, weights_only=True)
        with safe_open(folder / _DENSE, framework="pt") as file:
            table_id = (file.metadata() or {})["table_id"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except _DAMAGES as error:
        for name in (_OPTIMIZER, _DENSE):
            refuse_pointer(folder / name, ConfigError)
        found = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{folder}: expected a checkpoint, found {found}") from None
    return State(tensors, optimizer, table_id)


def load_optimizers(folder: Path, state: State, pair: OptimizerPair) -> None:
    """Puts back the rows and the optimisers. The weights are for the caller to load, afterwards: a
    memory refuses weights that belong to other rows.

    Raises:
        ConfigError: They are damaged, or of other sizes.
        DigestMismatch: The table is another one's.
    """
    if pair.rows is not None:
        pair.rows.memory.read_table(folder / _TABLE, state.table_id)
        pair.rows.load(folder / _MOMENTS, state.table_id)
    pair.dense.load_state_dict(state.optimizer)
