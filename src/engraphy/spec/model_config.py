"""Fields of a model's config, read by name and checked.

What the fields of a released checkpoint mean stands with its dialect, in dialects/.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError
from ..system.checks import as_int

MOST_IDS = 1 << 28  # of a vocabulary: what a map of them takes is some memory, and not all of it


def config_fields(config: Any) -> Mapping[str, Any]:
    """The fields of a config (object or mapping), or of the `text_config` in it.

    Raises ConfigError for what has no fields.
    """
    if not isinstance(config, Mapping):
        aliases = getattr(
            config, "attribute_map", {}
        )  # transformers' common names for GPT-2's n_layer and the like
        config = (
            config.to_dict() if hasattr(config, "to_dict") else getattr(config, "__dict__", None)
        )
        if config is not None:
            config = {name: config[own] for name, own in aliases.items() if own in config} | config
    if config is None:
        raise ConfigError("expected a model's config: a mapping or an object with fields")
    nested = config.get("text_config")
    try:
        return config if nested is None else config_fields(nested)
    except RecursionError:
        raise ConfigError(
            "expected a model's config, found text_config within text_config without an end"
        ) from None


def largest_order(name: str, value: Any) -> int:
    """`value` as the largest n-gram order. Raises ConfigError unless it is from 2 to 32."""
    order = as_int(name, value)
    if not 2 <= order <= 32:  # checked here, before a list of all orders is made
        raise ConfigError(f"{name}: expected the largest of the orders, 2 to 32, found {order}")
    return order


def check_layers(name: str, layers: Sequence[int], lowest: int, fields: Mapping[str, Any]) -> None:
    """Raise ConfigError if a layer is not one of the model's.

    Args:
        name: The field that lists the layers.
        layers: Layers of the model, the first one counted as `lowest`.
        lowest: 0 or 1.
        fields: The config. If it does not give the model's depth, any depth is accepted.
    """
    depths = [fields.get(key) for key in ("num_hidden_layers", "n_layers")]
    known = [depth for depth in depths if depth is not None]
    last = as_int("num_hidden_layers", known[0], 1) + lowest - 1 if known else max(layers)
    if min(layers) < lowest or max(layers) > last:
        raise ConfigError(f"{name}: expected {lowest} to {last}, found {list(layers)}")


def need(fields: Mapping[str, Any], *names: str) -> Any:
    """The value of a field, under whichever of its names the config has it.

    Raises ConfigError where it is missing, and where two names have different values.
    """
    found = {name: fields[name] for name in names if fields.get(name) is not None}
    if not found:
        raise ConfigError(f"the model's config has no {' or '.join(names)}")
    value = next(iter(found.values()))
    if any(other != value for other in found.values()):
        raise ConfigError(
            f"the model's config contradicts itself: expected one value, found {found}"
        )
    return value


def first(value: Any) -> Any:
    """A value, or the first one of a list; None of an empty one."""
    return (value[0] if value else None) if isinstance(value, (list, tuple)) else value
