"""MemoryAdamW: dense parameters and the rows of a memory as one torch optimiser."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import ConfigError
from ..memory.memory import EngramMemory
from ..train.optimizer import RowOptimizer
from ..train.pair import clip_together, weight_decay_groups
from ..train.replicated import drain_mean
from .backbone import unwrapped
from .checkpoints import move_in, place_beside


class MemoryAdamW(torch.optim.AdamW):
    """AdamW for the parameters of a model, and a row optimiser for its memory's table, as one torch
    optimiser.

    The last parameter group is empty: its learning rate is the rows', so a scheduler drives both.
    Matrices decay; norms, convs, biases and rows do not.

    Args:
        model: The model that is trained.
        memory: The memory attached to it.
        rows: The row optimiser. None leaves the table as it is.
        clip: The largest norm of dense and row gradients together. None does not clip.
        replicas: The processes that train copies of the table, as in OptimizerPair.
        weight_decay: Weight decay of the matrices.
        adamw: lr, betas, eps, fused.

    Raises:
        ConfigError: `memory` is not attached to `model`.
    """

    def __init__(
        self,
        model: nn.Module,
        memory: EngramMemory,
        rows: RowOptimizer | None,
        clip: float | None,
        replicas: dist.ProcessGroup | None,
        weight_decay: float,
        **adamw: Any,
    ) -> None:
        attached = getattr(unwrapped(model), "engraphy", None)
        if attached is not memory:
            found = "no memory" if attached is None else f"another {type(attached).__name__}"
            raise ConfigError(
                f"{type(model).__name__}: expected the memory attached to it, found {found} "
                "(a memory is not one of PEFT's modules_to_save)"
            )
        self.memory = memory
        self.rows = rows
        self.clip = clip
        self.replicas = replicas
        self.folder = ""  # where the run keeps its checkpoints; only a hint to find them again
        # state_id and folder of a state that was loaded, until the next step
        self.loaded: dict[str, str] | None = None
        self.beside: Path | None = None  # the checkpoint whose part of the memory waits beside it
        self._state_id: str | None = None
        groups = weight_decay_groups(model, weight_decay)
        if rows is not None:
            groups.append({"params": [], "lr": rows.lr, "weight_decay": 0.0})
        super().__init__(groups, **adamw)

    @property
    def state_id(self) -> str:
        """Name of the rows and moments as they are: random, a new one after each change."""
        if self._state_id is None:
            self._state_id = secrets.token_hex(16)
        return self._state_id

    def set_state_id(self, state_id: str | None) -> None:
        """The rows have changed: to those of a checkpoint with this id, or to new ones (None)."""
        self._state_id = state_id

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: None = None
    ) -> None:
        """Update parameters and rows once from the gradients since the last step.

        Row gradients are gone afterwards.

        Args:
            closure: Not supported.

        Raises:
            ConfigError: A closure was passed; or a state was loaded, and its rows were not.
            InputError: A gradient is not finite. Nothing is updated then.
        """
        if closure is not None:
            raise ConfigError("MemoryAdamW.step: expected no closure")
        if self.loaded is not None and self.loaded["state_id"] != self.state_id:
            raise ConfigError(
                f"the optimiser's state was loaded, the rows that belong to it (state "
                f"{self.loaded['state_id']}) were not: give the Trainer all of trainer_kwargs"
            )
        parameters = [p for group in self.param_groups for p in group["params"]]
        summed = {} if self.rows is None else drain_mean(self.memory, self.replicas)
        _, summed = clip_together(parameters, summed, self.clip)
        super().step()
        if self.rows is not None:
            self.rows.lr = self.param_groups[-1]["lr"]
            self.rows.step(summed)
        self.loaded = None
        self.set_state_id(None)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of parameters and rows."""
        super().zero_grad(set_to_none)
        self.memory.drain_row_grads()

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state, and the state id of rows and moments, which lie in the checkpoint folder.

        Trainer calls it after it has made the folder, and may upload the folder next. So a part of
        the memory that waits moves in now.
        """
        self.put_in_place()
        return {
            **super().state_dict(),
            "engraphy": {"state_id": self.state_id, "folder": self.folder},
        }

    def put_in_place(self) -> None:
        """Move the memory's part that waits into its checkpoint, if the folder is there.

        Raises WriteFailed.
        """
        if self.beside is not None and self.beside.is_dir():
            move_in(place_beside(self.beside))
            self.beside = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`, except for rows and moments, which MemoryCallback reads.

        Raises:
            ConfigError: The state is that of another optimiser.
        """
        if "engraphy" not in state_dict:
            raise ConfigError(
                "expected an optimiser state of a run with this memory, found one without"
            )
        super().load_state_dict(state_dict)
        self.loaded = dict(state_dict["engraphy"])
