"""Which rows the weights of a state dict belong to, in a form that torch's own saving carries.

Rows are in no state dict, and loading a state dict beside other rows is an error. So EngramMemory
has an extra state ("_extra_state"): the address digest, the row format, and the names of each
layer's rows (store/names.py). It is JSON in a uint8 tensor whose size the config fixes, since
safetensors and distributed checkpoints take tensors alone.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DigestMismatch

if TYPE_CHECKING:
    from .memory import EngramMemory

_FORMAT = "engraphy-rows-1"
_HOW = (
    "rows are in no state dict: save them with memory.save (model and memory: engraphy.hf."
    "save_pretrained), load them with engraphy.load, and then the state dict"
)


def summary(memory: EngramMemory) -> str:
    """Sizes and identities of a memory, in three lines."""
    config, stores = memory.config, memory.stores
    info = stores.info
    origin = f" at {info.path}" if info.path else ""
    return (
        f"layers {list(memory.layers)}, orders {list(config.hash.orders)}, "
        f"addresses {memory.address_digest}\n"
        f"{stores.rows:,} rows ({stores.format.kind}, d = {stores.format.d}), "
        f"{stores.bytes:,} bytes in {info.kind} stores, table_id {info.table_id}{origin}\n"
        f"parameters: table {config.table_parameters():,}, dense {config.dense_parameters():,}"
    )


def row_names(memory: EngramMemory) -> dict[str, list[str]]:
    """Layer -> the names of its rows as they are now."""
    return {str(layer): names for layer, names in memory.stores.row_names().items()}


def add_row_names(memory: EngramMemory, names: Mapping[str, Iterable[str]]) -> None:
    """The rows have these names, too. Layers are strings, as in JSON."""
    by_layer = {layer: names.get(str(layer), ()) for layer in memory.layers}
    memory.stores.adopt_names(by_layer)


def extra_state(memory: EngramMemory) -> Tensor:
    """uint8 [n]: which rows the memory's weights belong to. n depends on the config alone."""
    body = json.dumps(
        {
            "format": _FORMAT,
            "address_digest": memory.address_digest,
            "row_format": _row_format(memory),
            "rows": row_names(memory),
        }
    ).encode()
    size = 512 + 320 * len(memory.layers)
    return torch.from_numpy(np.frombuffer(body.ljust(size), np.uint8).copy())


def check_extra_state(memory: EngramMemory, state: Any) -> None:
    """Raises DigestMismatch unless `state` is of a memory with the rows that this one has now.

    Rows that have one name in common have all their names in common.
    """
    body = _read(state)
    expected = {"address_digest": memory.address_digest, "row_format": _row_format(memory)}
    for name, value in expected.items():
        if body[name] != value:
            raise DigestMismatch(
                f"state dict of a memory: expected {name} {value}, found {body[name]}; {_HOW}"
            )
    for layer, names in row_names(memory).items():
        saved_names = body["rows"].get(layer, [])
        if not set(names) & set(saved_names):
            raise DigestMismatch(
                f"state dict of a memory, layer {layer}: its weights belong to the rows "
                f"{saved_names}, "
                f"the memory has the rows {names} now; {_HOW}"
            )
    add_row_names(memory, body["rows"])


def warn_if_unnamed(state_dict: Mapping[str, Any], prefix: str) -> None:
    """Warns of a state dict whose weights of a memory do not say which rows they belong to."""
    weights = any(name.startswith(f"{prefix}blocks.") for name in state_dict)
    if weights and f"{prefix}_extra_state" not in state_dict:
        warnings.warn(
            f"the state dict has weights of a memory but no {prefix}_extra_state, so it is not "
            f"known which rows they belong to; {_HOW}",
            stacklevel=4,
        )


def _row_format(memory: EngramMemory) -> str:
    return f"{memory.format.kind} {memory.format.d} {memory.format.scale or ''}".strip()


def _read(state: Any) -> dict[str, Any]:
    try:
        if not isinstance(state, Tensor) or state.ndim != 1:
            raise ValueError(f"{type(state).__name__} {list(getattr(state, 'shape', []))}")
        values = state.detach().cpu()
        bytes_ = values.to(torch.uint8)
        if not torch.equal(bytes_.to(values.dtype), values):
            raise ValueError(f"values of {values.dtype} that are no bytes")
        body = json.loads(bytes_.numpy().tobytes())
        if body["format"] != _FORMAT:
            raise ValueError(f"format {body['format']!r}")
        rows = {layer: list(map(str, names)) for layer, names in body["rows"].items()}
        return {
            "address_digest": body["address_digest"],
            "row_format": body["row_format"],
            "rows": rows,
        }
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise DigestMismatch(
            f"state dict of a memory: expected _extra_state as EngramMemory.state_dict gives it, "
            f"found {type(error).__name__}: {error}; to average weights take memory.blocks"
        ) from None
