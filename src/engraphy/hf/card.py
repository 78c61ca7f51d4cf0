"""A model card for a saved memory: its numbers, and code that loads it.

The card is a draft, which its author completes.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from ..memory import saved
from ..memory.memory import EngramMemory
from ..system.files import write_file
from .hub import FOLDER, adapter_of

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_MEMORY = """import engraphy
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base})
memory = engraphy.load(model, {name})  # the path of this folder, or its name on the hub"""
_ADAPTED = """import engraphy
import peft
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base})
model = peft.PeftModel.from_pretrained(model, {name}, subfolder="adapter")
memory = engraphy.load(model, {name})  # the path of this folder, or its name on the hub"""
_WHOLE = """import engraphy.hf  # registers the model type; pip install "engraphy[hf]"
from transformers import AutoModelForCausalLM

# the path of this folder, or its name on the hub
model = AutoModelForCausalLM.from_pretrained({name})
memory = model.engraphy"""
_REMOTE = (
    "A program that does not import engraphy loads it with `trust_remote_code=True`: the package "
    "has to be\ninstalled, and the one file of code here, `modeling_engraphy.py`, imports it."
)


def trainable_parameters(memory: EngramMemory) -> int:
    """Number of values that training would change now.

    These are the dense parameters that require grad. The table counts if its rows learn and its
    store is writable.
    """
    dense = sum(parameter.numel() for parameter in memory.parameters() if parameter.requires_grad)
    learns = dense > 0 if memory.rows_require_grad is None else memory.rows_require_grad
    writable = all(store.info.writable for store in memory.stores.values())
    return dense + (memory.config.table_parameters() if learns and writable else 0)


def card(
    memory: EngramMemory,
    name: str,
    table_id: str,
    base_model: str | None = None,
    *,
    whole: bool = False,
    adapted: bool = False,
    note: str = "",
) -> str:
    """The text of a README.md with the hub's front matter.

    Args:
        memory: The memory.
        name: Name of the saved folder, or of its repository on the hub.
        table_id: Identity of the saved table. `memory` may serve another table.
        base_model: A name on the hub, or a path. The front matter leaves a path out, because the
            hub knows only names.
        whole: Whether the folder is a model with its memory (`hf.save_pretrained`), not a memory
            alone.
        adapted: Whether the folder holds adapters that were trained with the memory.
        note: A paragraph of your own, such as results.
    """
    local = base_model is not None and _is_local(base_model)
    base = "path/to/the/base/model"
    if base_model:
        base = Path(base_model).name if local else base_model
    template = _ADAPTED if adapted else _MEMORY
    kind = "An Engraphy memory for a language model"
    if whole:
        template = _WHOLE
        kind = "A language model with an Engraphy memory"
    code = template.format(base=json.dumps(base), name=json.dumps(name))
    facts = {"base model": f"`{base}`" if base_model else "not stated"} | _facts(memory, table_id)
    rows = [f"| {fact} | {value} |" for fact, value in facts.items()]
    parts = (
        _front_matter(None if local else base_model, whole),
        f"# {name.rpartition('/')[2]}",
        f"{kind}: hashed n-gram tables (Engram, arXiv 2601.07372) that the model looks up.",
        note,
        "\n".join(["| | |", "|---|---|", *rows]),
        f"```python\n{code}\n```",
        _REMOTE if whole else "",
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def write_card(
    folder: str | os.PathLike[str],
    memory: EngramMemory,
    base_model: str | None = None,
    *,
    note: str = "",
    name: str | None = None,
) -> Path:
    """Write README.md into a folder that `memory.save` or `hf.save_pretrained` has written.

    Args:
        folder: The folder.
        memory: The memory that was saved.
        base_model: As in `card`.
        note: As in `card`.
        name: Name that the text gives the folder, such as the repository's on the hub. None = the
            folder's own.

    Returns:
        The path of README.md.

    Raises:
        ConfigError: The folder holds no saved memory.
        WriteFailed: The system refuses to write.
    """
    folder = Path(os.path.abspath(folder))
    whole = not (folder / "memory.json").exists()
    identity = saved.identity_of(folder / FOLDER if whole else folder)
    text = card(
        memory,
        name or folder.name,
        identity["table_id"],
        base_model,
        whole=whole,
        adapted=adapter_of(folder) is not None,
        note=note,
    )
    path = folder / "README.md"
    write_file(path, text)
    return path


def _is_local(base_model: str) -> bool:
    return os.path.exists(base_model) or not _HUB_NAME.fullmatch(base_model)


def _facts(memory: EngramMemory, table_id: str) -> dict[str, str]:
    """The rows of the card's table: title to value."""
    config, spec, row_format = memory.config, memory.config.hash, memory.format
    table_bytes = config.table_bytes(row_format.row_bytes)
    dense = sum(parameter.numel() for parameter in memory.parameters())
    rows = [f"{memory.config.row_count(layer):,} in layer {layer}" for layer in memory.layers]
    return {
        "table": f"{config.table_parameters():,} parameters, {table_bytes:,} bytes",
        "dense layers": f"{dense:,} parameters",
        "trainable": f"{trainable_parameters(memory):,} parameters as saved",
        "layers": f"{_listed(memory.layers)} (0-based)",
        "orders, heads": f"{_listed(spec.orders)}; {spec.heads} heads each",
        "rows": ", ".join(rows),
        "row format": (f"{row_format.kind}, {config.dim} values in {row_format.row_bytes} bytes"),
        "addresses": (
            f"dialect {spec.dialect}, {len(memory.vocab):,} ids hashed; "
            f"digest `{memory.address_digest}`"
        ),
        "table_id": f"`{table_id}`",
    }


def _front_matter(base_model: str | None, whole: bool) -> str:
    lines = ["library_name: engraphy"]
    if base_model:
        lines += [
            f"base_model: {json.dumps(base_model)}",
            f"base_model_relation: {'finetune' if whole else 'adapter'}",
        ]
    lines += [
        "pipeline_tag: text-generation",
        "tags:",
        "- engraphy",
        "- engram",
        "- conditional-memory",
    ]
    return "\n".join(["---", *lines, "---"])


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
