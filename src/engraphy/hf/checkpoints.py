"""The memory's part of a Trainer's checkpoint: what it holds, where it waits, how it is found.

    checkpoint-N/memory/            what `memory.save` writes
    checkpoint-N/memory/moments/    of the row optimiser, unless only weights are saved
    checkpoint-N/memory/state.json  the state id, which optimizer.pt has too
    .memory-of-checkpoint-N/        all of `memory/`, until Trainer has made checkpoint-N

The part is written before Trainer makes the checkpoint, and waits beside it. Making checkpoint-N
itself would be wrong: Trainer takes any folder of that name for the last checkpoint, even after a
crash. A crash in between leaves the part where it waits, and it is found there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError
from ..memory import saved
from ..memory.memory import EngramMemory
from ..system.files import publish_folder, put_folder
from ..train.optimizer import RowOptimizer

# Not "engraphy": in that folder a model that was loaded with its memory saves the memory itself.
FOLDER = "memory"
_BESIDE = ".memory-of-"  # before the checkpoint's name
_STATE = "state.json"


def place_in(checkpoint: Path) -> Path:
    """The memory's part in a checkpoint folder."""
    return checkpoint / FOLDER


def place_beside(checkpoint: Path) -> Path:
    """Where the memory's part waits until Trainer has made the checkpoint folder."""
    return checkpoint.parent / f"{_BESIDE}{checkpoint.name}"


def is_beside(part: Path) -> bool:
    """Whether a part waits beside its checkpoint."""
    return part.name.startswith(_BESIDE)


def move_in(part: Path) -> None:
    """Move a part that waits into its checkpoint folder. Raises WriteFailed."""
    checkpoint = part.with_name(part.name.removeprefix(_BESIDE))
    put_folder(part, place_in(checkpoint))


def bytes_needed(memory: EngramMemory, rows: RowOptimizer | None) -> int:
    """Bytes that a part takes."""
    moments = 0 if rows is None else rows.moment_bytes
    return moments + saved.bytes_of(memory, _table_choice(memory, rows))


def write_part(
    part: Path, memory: EngramMemory, rows: RowOptimizer | None, state_id: str, with_moments: bool
) -> None:
    """Write memory and moments to `part`, which appears whole. Raises ConfigError, WriteFailed."""
    choice = _table_choice(memory, rows)
    saved.check_choice(memory, choice)
    with publish_folder(part, replace=True, last=_STATE) as folder:
        table_id = saved.write(memory, folder, choice)
        if rows is not None and with_moments:
            rows.save(folder / "moments", table_id)
        (folder / _STATE).write_text(json.dumps({"state_id": state_id}))


def read_part(part: Path, memory: EngramMemory, rows: RowOptimizer | None) -> None:
    """Read what `write_part` wrote. Raises ConfigError, DigestMismatch and TableError."""
    table_id = saved.restore(memory, part)
    if rows is not None:
        rows.load(part / "moments", table_id)


def state_id_of(part: Path) -> str | None:
    """The state id of a part; None if the part is not there, or not whole."""
    try:
        return json.loads((part / _STATE).read_text())["state_id"]
    except (OSError, ValueError, KeyError):
        return None


def find_part(state_id: str, step: int, checkpoints: Sequence[Path]) -> Path:
    """The part with this state id, in or beside one of `checkpoints`.

    Raises ConfigError if there is none.
    """
    for checkpoint in checkpoints:
        for part in (place_in(checkpoint), place_beside(checkpoint)):
            if state_id_of(part) == state_id:
                return part
    raise ConfigError(
        f"expected a checkpoint of step {step} whose rows have state {state_id}, found none in "
        f"{list(map(str, checkpoints))}: its {FOLDER}/ was not written to the end, its "
        "optimizer.pt is missing (save_only_model), or it has moved: then name it in "
        "TrainingArguments(resume_from_checkpoint=)"
    )


def tidy(output: Path) -> None:
    """Clear up what crashes have left beside checkpoints.

    A checkpoint that lacks its part gets it; other parts are deleted.
    """
    for part in output.glob(f"{_BESIDE}*"):
        checkpoint = part.with_name(part.name.removeprefix(_BESIDE))
        if checkpoint.is_dir() and not place_in(checkpoint).exists():
            move_in(part)
        else:
            shutil.rmtree(part)


def _table_choice(memory: EngramMemory, rows: RowOptimizer | None) -> str:
    """ "copy", or "link" to a sealed table that nothing changes."""
    info = memory.stores.info
    sealed = rows is None and info.table_id is not None and not info.writable
    return "link" if sealed else "copy"
