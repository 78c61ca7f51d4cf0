"""A model card for a saved memory: what it is in numbers, and code that loads it. A stub for its
author to go on with."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..memory.memory import EngramMemory
from ..system.files import write_file
from ..system.lfs import refuse_pointer
from .hub import adapter_of

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

model = AutoModelForCausalLM.from_pretrained({name})  # the path of this folder, or its name on the hub
memory = model.engraphy"""
_REMOTE = """A program that does not import engraphy loads it with `trust_remote_code=True`: the package has to be
installed, and the one file of code here, `modeling_engraphy.py`, imports it."""


def saved_identity(path: str | os.PathLike[str]) -> dict[str, Any]:
    """memory_config, address_digest and table_id of what `memory.save` wrote. Raises ConfigError
    for anything else."""
    file = Path(path) / "memory.json"
    try:
        body = json.loads(file.read_text())
        return {
            "memory_config": body["config"],
            "address_digest": body["address_digest"],
            "table_id": body["table_id"],
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse_pointer(file, ConfigError)
        raise ConfigError(
            f"{file}: expected the description of a saved memory, "
            f"found {type(error).__name__}: {error}"
        ) from None


def trainable_parameters(memory: EngramMemory) -> int:
    """Values that training would change, as the memory stands: dense parameters that require grad,
    and the table where its rows learn and its store can be written."""
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

    name: of the saved folder, or on the hub. table_id: of the saved table, which the memory in hand
    need not serve. base_model: a name on the hub or a path; a path stays out of the front matter,
    where the hub knows names alone. whole: the folder is a model with its memory
    (`hf.save_pretrained`), not a memory alone. adapted: it holds adapters that were trained with
    the memory. note: a paragraph of one's own, such as results.
    """
    config, spec = memory.config, memory.config.hash
    dense = sum(parameter.numel() for parameter in memory.parameters())
    local = base_model is not None and (
        os.path.exists(base_model) or not _HUB_NAME.fullmatch(base_model)
    )
    base = (
        "path/to/the/base/model"
        if not base_model
        else Path(base_model).name
        if local
        else base_model
    )
    rows = ", ".join(f"{spec.row_count(layer):,} in layer {layer}" for layer in memory.layers)
    size = config.table_bytes(memory.format.row_bytes)
    facts = {
        "base model": f"`{base}`" if base_model else "not stated",
        "table": f"{config.table_parameters():,} parameters, {size:,} bytes",
        "dense layers": f"{dense:,} parameters",
        "trainable": f"{trainable_parameters(memory):,} parameters as saved",
        "layers": f"{_listed(memory.layers)} (0-based)",
        "orders, heads": f"{_listed(spec.orders)}; {spec.heads} heads each",
        "rows": rows,
        "row format": f"{memory.format.kind}, {config.dim} values in {memory.format.row_bytes} bytes",
        "addresses": f"dialect {spec.dialect}, {len(memory.vocab):,} ids hashed; digest `{memory.address_digest}`",
        "table_id": f"`{table_id}`",
    }
    template = _ADAPTED if adapted else _MEMORY
    template = _WHOLE if whole else template
    code = template.format(base=json.dumps(base), name=json.dumps(name))
    kind = (
        "A language model with an Engraphy memory"
        if whole
        else "An Engraphy memory for a language model"
    )
    table = "\n".join(
        ["| | |", "|---|---|", *(f"| {fact} | {value} |" for fact, value in facts.items())]
    )
    parts = (
        _front_matter(None if local else base_model, whole),
        f"# {name.rpartition('/')[2]}",
        f"{kind}: hashed n-gram tables (Engram, arXiv 2601.07372) that the model looks up.",
        note,
        table,
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
    """Write README.md into a folder that `memory.save` or `hf.save_pretrained` has written. Returns
    its path.

    name: of the folder in the text, by default its own; on the hub, the repository's. Raises
    ConfigError for another folder, WriteFailed.
    """
    folder = Path(os.path.abspath(folder))
    whole = not (folder / "memory.json").exists()
    table_id = saved_identity(folder / "engraphy" if whole else folder)["table_id"]
    path = folder / "README.md"
    write_file(
        path,
        card(
            memory,
            name or folder.name,
            table_id,
            base_model,
            whole=whole,
            note=note,
            adapted=adapter_of(folder) is not None,
        ),
    )
    return path


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
