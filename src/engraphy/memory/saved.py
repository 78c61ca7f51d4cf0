"""A memory as a folder: memory.json, vocab.json, memory.safetensors (dense weights) and, if it was
copied, the table.

The table_id ties dense weights and table together; the address digest ties both to the config.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..addresses.vocab import VocabMap
from ..errors import ConfigError, DigestMismatch, EngraphyError
from ..spec.config import EngramConfig
from ..system.files import publish_folder
from ..system.lfs import refuse_pointer
from .identity import add_row_names, row_names

if TYPE_CHECKING:
    from .memory import EngramMemory

_FORMAT = "engraphy-memory-1"


def save(memory: EngramMemory, path: str | os.PathLike[str], table: str) -> None:
    """`EngramMemory.save`."""
    check_choice(memory, table)
    with publish_folder(path, needed=bytes_of(memory, table), last="memory.json") as folder:
        write(memory, folder, table)


def check_choice(memory: EngramMemory, table: str) -> None:
    """Raises ConfigError unless the memory can be saved with this choice of its table."""
    if table not in ("copy", "link", "skip"):
        raise ConfigError(f'table: expected "copy", "link" or "skip", found {table!r}')
    info = memory.stores.info
    if table != "copy" and (info.table_id is None or info.writable):
        found = "one open for writing" if info.table_id else f"a {info.kind} store"
        raise ConfigError(
            f'table="{table}": expected stores over a sealed table on disk, found {found}'
        )
    if table == "link" and info.kind != "file":
        raise ConfigError(
            f'table="link": expected file: stores, found a {info.kind} store; '
            'table="skip" leaves the table out, and load takes its URL'
        )


def bytes_of(memory: EngramMemory, table: str) -> int:
    """Bytes that `write` takes, without headers and descriptions."""
    dense = sum(tensor.nbytes for tensor in memory.blocks.state_dict().values())
    if table != "copy":
        return dense
    index = 0 if memory.hot is None else memory.hot.bytes
    return dense + memory.stores.bytes + index


def write(memory: EngramMemory, path: Path, table: str) -> str:
    """Writes the parts into a folder, which the caller makes appear whole.

    Args:
        memory: the memory.
        path: an existing folder.
        table: as in `EngramMemory.save`; `check_choice` has accepted it.

    Returns:
        The table_id of the rows.
    """
    info = memory.stores.info
    where = {"copy": "table", "link": str(info.path), "skip": None}[table]
    table_id = info.table_id
    if table == "copy":
        table_id = memory.write_table(path / "table", parent=table_id)
    memory.vocab.save(path / "vocab.json")
    tensors = {name: value.contiguous() for name, value in memory.blocks.state_dict().items()}
    identity = {"table_id": str(table_id), "address_digest": memory.address_digest}
    save_file(tensors, path / "memory.safetensors", metadata=identity)
    body = {
        "format": _FORMAT,
        "config": memory.config.to_json(),
        "made_for": memory.made_for,
        "table": where,
        "rows": row_names(memory),
        **identity,
    }
    (path / "memory.json").write_text(json.dumps(body, indent=1), encoding="utf-8")
    return str(table_id)


def load(
    kind: type[EngramMemory], path: str | os.PathLike[str], store: str | os.PathLike[str] | None
) -> EngramMemory:
    """`EngramMemory.load`."""
    path = Path(path)
    body, config = _read_json(path)
    vocab = _read_vocab(path)
    own_table = store is None or store == "ram:"
    if own_table and body["table"] is None:
        raise ConfigError(f"{path}: saved without its table; give store=")
    identity = {"table_id": body["table_id"], "address_digest": body["address_digest"]}
    tensors = _read_dense(path / "memory.safetensors", identity)
    source = path / str(body["table"]) if own_table or store is None else store
    memory = kind(config, vocab, source)
    try:
        _check_table(memory, path, body["table_id"])
        if store == "ram:":
            with memory as served:
                memory = kind(config, vocab, "ram:", served.format, hot=served.hot)
                memory.read_table(path / str(body["table"]))
        add_row_names(memory, body["rows"])
        _check_shapes(memory, path, tensors)
        memory.blocks.to(next(iter(tensors.values())).dtype)
        memory.blocks.load_state_dict(tensors)
    except BaseException:
        memory.close()
        raise
    memory.made_for = body["made_for"]
    return memory


def restore(memory: EngramMemory, path: str | os.PathLike[str]) -> str:
    """Reads what `save` wrote into a memory that exists: dense weights, and rows if they were
    copied.

    Returns the table_id of the saved rows. Raises ConfigError if there is no saved memory, or one
    of other sizes; DigestMismatch if it has other addresses, or if neither `path` nor the memory's
    stores have the rows of the dense weights.
    """
    path = Path(path)
    body, _ = _read_json(path)
    identity = {"table_id": body["table_id"], "address_digest": memory.address_digest}
    tensors = _read_dense(path / "memory.safetensors", identity)
    _check_shapes(memory, path, tensors)
    if body["table"] == "table":
        memory.read_table(path / "table", body["table_id"])
    else:
        _check_table(memory, path, body["table_id"])
    add_row_names(memory, body["rows"])
    memory.blocks.load_state_dict(tensors)
    return body["table_id"]


def identity_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The memory_config, address_digest and table_id of what `save` wrote.

    Raises ConfigError if `path` is no saved memory.
    """
    body, _ = _read_json(Path(path))
    return {
        "memory_config": body["config"],
        "address_digest": body["address_digest"],
        "table_id": body["table_id"],
    }


def _check_table(memory: EngramMemory, path: Path, table_id: str) -> None:
    served = memory.stores.table_id
    if served != table_id:
        raise DigestMismatch(
            f"{path}: the dense weights belong to table {table_id}, the store serves {served}"
        )


def _check_shapes(memory: EngramMemory, path: Path, tensors: dict[str, Tensor]) -> None:
    """Raises ConfigError naming the first tensor that is missing, extra or of another shape."""
    expected = {name: list(value.shape) for name, value in memory.blocks.state_dict().items()}
    found = {name: list(value.shape) for name, value in tensors.items()}
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            raise ConfigError(
                f"{path / 'memory.safetensors'}: expected tensors of this memory, "
                f"{name} of shape {expected.get(name)}, found {found.get(name)}"
            )


def _read_json(path: Path) -> tuple[dict[str, Any], EngramConfig]:
    try:
        body = json.loads((path / "memory.json").read_text())
        if body["format"] != _FORMAT:
            raise ConfigError(f"{path}: expected format {_FORMAT!r}, found {body['format']!r}")
        fields = {name: body[name] for name in ("config", "table", "table_id", "address_digest")}
        fields["rows"] = {}
        for layer, names in body.get("rows", {}).items():
            fields["rows"][str(int(layer))] = [str(name) for name in names]
        fields["made_for"] = body.get("made_for")  # memories that were saved early have none
        return fields, EngramConfig.from_json(body["config"])
    except EngraphyError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        refuse_pointer(path / "memory.json", ConfigError)
        inside = path / "engraphy"  # where hf.save_pretrained has it
        hint = f"; load {inside}, or the whole model" if (inside / "memory.json").exists() else ""
        raise ConfigError(
            f"{path}: expected memory.json of a saved memory ({_FORMAT}), "
            f"found {type(error).__name__}: {error}{hint}"
        ) from None


def _read_vocab(path: Path) -> VocabMap:
    try:
        return VocabMap.load(path / "vocab.json")
    except OSError as error:
        raise ConfigError(
            f"{path}: expected the vocabulary map vocab.json, found {error}"
        ) from None


def _read_dense(path: Path, expected: dict[str, str]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        refuse_pointer(path, ConfigError)
        raise ConfigError(
            f"{path}: expected dense weights, found {type(error).__name__}: {error}"
        ) from None
    found = {key: metadata.get(key) for key in expected}
    if found != expected:
        raise DigestMismatch(f"{path}: expected {expected}, found {found}")
    return tensors
