"""The directory of a model and its memory, read without transformers.

`hf.save_pretrained` writes it: config.json with the backbone's config in text_config, the
backbone's weights, which the engine loads itself, and the memory in the folder engraphy.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DigestMismatch
from ..memory import saved
from ..memory.memory import EngramMemory
from ..spec.config import EngramConfig
from ..spec.model_config import need
from ..system.checks import as_int
from ..system.environment import STORE
from ..system.lfs import refuse_pointer

MODEL_TYPE = "engraphy"
"""The model_type in config.json of such a directory."""
STORE_FIELD = "engraphy_store"
"""The field of config.json with the URL of the store to serve the rows from."""
_MEMORY = "engraphy"
_IDENTITY = ("memory_config", "address_digest", "table_id")


@dataclass(frozen=True)
class Composite:
    """A model and its memory in one directory.

    Attributes:
        path: The directory.
        backbone: The backbone's config, as in its own config.json.
        memory: Sizes of the memory.
        store: The URL to serve the rows from; None = the saved table.
    """

    path: Path
    backbone: dict[str, Any]
    memory: EngramConfig
    store: str | None

    @property
    def architecture(self) -> str:
        """Class name of the backbone, such as LlamaForCausalLM."""
        return self.backbone["architectures"][0]


def read_folder(path: str | os.PathLike[str]) -> Composite:
    """Reads and compares what the parts of the directory say. Opens no table.

    The store is that of the environment variable ENGRAPHY_STORE, else that of the field
    engraphy_store in config.json, else the saved table.

    Args:
        path: The directory, on this machine.

    Returns:
        What it holds.

    Raises:
        ConfigError: A file or field is missing, or the memory has other sizes than the backbone.
        DigestMismatch: The memory belongs to other weights, or to another kind of model.
    """
    path = Path(path)
    fields = _read_config(path / "config.json")
    if fields.get("model_type") != MODEL_TYPE:
        raise ConfigError(
            f"{path / 'config.json'}: expected model_type {MODEL_TYPE!r} of a model saved with its "
            f"memory (hf.save_pretrained), found {fields.get('model_type')!r}"
        )
    backbone = fields.get("text_config")
    if not isinstance(backbone, dict) or not backbone.get("architectures"):
        raise ConfigError(
            f"{path / 'config.json'}: expected the backbone's config with its architectures in "
            f"text_config, found {type(backbone).__name__}"
        )
    expected = {name: fields.get(name) for name in _IDENTITY}
    found = saved.identity_of(path / _MEMORY)
    if found != expected:
        raise DigestMismatch(
            f"{path / _MEMORY}: config.json belongs to the memory {expected}, found {found}"
        )
    store = STORE.given() or fields.get(STORE_FIELD)
    memory = EngramConfig.from_json(found["memory_config"])
    _check_fits(path, backbone, memory)
    return Composite(path, backbone, memory, store)


def open_memory(composite: Composite) -> EngramMemory:
    """The memory of the directory, in eval mode and frozen.

    The caller closes it. Token ids that the backbone has and the memory does not know are dead.

    Raises:
        DigestMismatch: The table belongs to other weights, or the memory was made for another
            model.
        EngraphyError: Whatever `EngramMemory.load` raises.
    """
    memory = EngramMemory.load(composite.path / _MEMORY, composite.store)
    try:
        _check_made_for(composite, memory)
        memory.widen(as_int("vocab_size", need(composite.backbone, "vocab_size"), 1))
    except BaseException:
        memory.close()
        raise
    return memory.eval().requires_grad_(False)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        refuse_pointer(path, ConfigError)
        raise ConfigError(
            f"{path}: expected config.json of a model saved with its memory, as a folder on this "
            f"machine, found {type(error).__name__}: {error}"
        ) from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: expected an object, found {type(fields).__name__}")
    return fields


def _check_fits(path: Path, backbone: dict[str, Any], memory: EngramConfig) -> None:
    depth = as_int("num_hidden_layers", need(backbone, "num_hidden_layers"), 1)
    hidden = as_int("hidden_size", need(backbone, "hidden_size"), 1)
    streams = as_int("hc_mult", backbone.get("hc_mult") or 1, 1)
    for layer in memory.hash.layer_ids:
        if layer >= depth:
            raise ConfigError(
                f"{path}: expected layers 0 to {depth - 1}, found layer {layer} in the memory"
            )
    expected = (hidden, streams)
    found = (memory.layer.hidden_size, memory.layer.streams)
    if found != expected:
        raise ConfigError(
            f"{path}: expected a memory with (hidden size, streams) = {expected}, found {found}"
        )


def _check_made_for(composite: Composite, memory: EngramMemory) -> None:
    """As when it is attached: the same model with a larger vocabulary is accepted."""
    made_for = memory.made_for or {}
    found = {name: composite.backbone.get(name) for name in ("model_type", "vocab_size")}
    other_type = made_for.get("model_type", found["model_type"]) != found["model_type"]
    size = made_for.get("vocab_size")
    smaller = size is not None and (found["vocab_size"] or 0) < size
    if other_type or smaller:
        raise DigestMismatch(
            f"{composite.path}: expected {made_for}, which the memory was made for (or the same "
            f"with a larger vocab_size, whose new ids are dead), found {found}"
        )
