"""The sizes of a backbone as rows of text, which a study prints before it starts, and as JSON."""

from __future__ import annotations

from typing import Any

from .configs import Backbone
from .sizes import EMBEDDING, expert_share, parts, total


def size_rows(found: Backbone) -> list[tuple[str, str]]:
    """All sizes of a backbone, of its memory too, and its parameters.

    Returns:
        (what, value) for each size, then for each part "parameters, PART" with those that a token
        uses, and the totals.
    """
    sizes = [*model_sizes(found).items(), *memory_sizes(found).items()]
    counts = [
        (f"parameters, {name}", f"{number}, {activated} activated")
        for name, number, activated in parameter_rows(found)
    ]
    return [("backbone", found.name), *sizes, *counts]


def model_sizes(found: Backbone) -> dict[str, str]:
    """Sizes of the model without its memory, by name; empty if there is none."""
    model = found.model
    if model is None:
        return {}
    rows = {
        "vocabulary": f"{model.vocab_size:,}",
        "hidden size": f"{model.hidden_size:,}",
        "blocks": f"{model.layers}",
        "heads": f"{model.heads}",
    }
    if model.mla is None:
        rows["a head"] = f"{model.hidden_size // model.heads}"
    else:
        mla = model.mla
        rows["a head"] = f"{mla.plain} + {mla.turned} turned, value {mla.value}"
        queries = "" if mla.query_rank is None else f"{mla.query_rank} queries, "
        rows["latents"] = f"{queries}{mla.kv_rank} keys and values"
    rows["streams"] = f"{model.streams}"
    if len(model.moe_layers) < model.layers:
        rows["dense width"] = f"{model.ffn:,} in {model.layers - len(model.moe_layers)}"
    if model.moe_layers:
        rows |= {
            "experts": f"{model.experts} in {len(model.moe_layers)}",
            "top-k": f"{model.top_k}",
            "expert width": f"{model.expert_ffn:,}",
            "shared width": f"{model.shared_ffn:,}",
        }
    rows["longest row"] = f"{model.max_tokens:,}"
    return rows


def memory_sizes(found: Backbone) -> dict[str, str]:
    """Sizes of the memory, by name; empty if there is none."""
    memory = found.memory
    if memory is None:
        return {}
    spec = memory.hash
    return {
        "memory layers": ", ".join(map(str, spec.layer_ids)),
        "n-gram orders": ", ".join(map(str, spec.orders)),
        "memory heads": f"{spec.heads} an order",
        "rows per head": ", ".join(f"{rows:,}" for rows in dict.fromkeys(spec.rows_per_head)),
        "row width": f"{memory.dim}",
        "hashed ids": f"{spec.vocab_size:,}",
    }


def parameter_rows(found: Backbone) -> list[tuple[str, str, str]]:
    """(part, parameters, those that one token uses), then the totals with and without the token
    embedding, and rho if there is a table and experts."""
    counted = parts(found.model, found.memory)
    rows = [(part.name, f"{part.total:,}", f"{part.activated:,}") for part in counted]
    everything = sum(part.total for part in counted)
    used = sum(part.activated for part in counted)
    rows.append(("total", f"{everything:,}", f"{used:,}"))
    embedding = total(counted, EMBEDDING)
    if embedding:
        rows.append(("without token embedding", f"{everything - embedding:,}", f"{used:,}"))
    share = expert_share(counted)
    if 0 < share < 1:
        rows.append(("rho", f"{share:.3f}", ""))
    return rows


def as_json(found: Backbone) -> dict[str, Any]:
    """JSON values: name, source, model (LMConfig.to_json) and memory (EngramConfig.to_json) or
    None, and for each part its parameters, total and activated."""
    counted = parts(found.model, found.memory)
    return {
        "name": found.name,
        "source": found.source,
        "model": None if found.model is None else found.model.to_json(),
        "memory": None if found.memory is None else found.memory.to_json(),
        "parameters": {
            part.name: {"total": part.total, "activated": part.activated} for part in counted
        },
    }
