"""Fields of a model's config, read by name and checked.

What the fields of a released checkpoint mean stands with its dialect, in dialects/.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from ..errors import ConfigError
from ..system.checks import as_int

MOST_IDS = 1 << 28  # of a vocabulary, so that a map of them takes some memory, and not all of it


def config_fields(config: Any) -> Mapping[str, Any]:
    """The fields of a model's config, or of the `text_config` in it.

    Args:
        config: A mapping, or an object such as a transformers config.

    Returns:
        Field name -> value. Fields that transformers knows under a common name have that name too.

    Raises:
        ConfigError: `config` has no fields.
    """
    fields = _own_fields(config)
    nested = fields.get("text_config")
    try:
        return fields if nested is None else config_fields(nested)
    except RecursionError:
        raise ConfigError(
            "expected a model's config, found text_config within text_config without an end"
        ) from None


def _own_fields(config: Any) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return cast("Mapping[str, Any]", config)
    if hasattr(config, "to_dict"):
        fields = config.to_dict()
    else:
        fields = getattr(config, "__dict__", None)
    if fields is None:
        raise ConfigError("expected a model's config: a mapping or an object with fields")
    # transformers' common names for GPT-2's n_layer and the like.
    aliases = getattr(config, "attribute_map", {})
    return {name: fields[own] for name, own in aliases.items() if own in fields} | fields


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
    """The value of a field that a config has under one of several names.

    Args:
        fields: The config.
        *names: The field's names.

    Returns:
        The value.

    Raises:
        ConfigError: The field is missing, or two names have different values.
    """
    values = {name: fields[name] for name in names if fields.get(name) is not None}
    if not values:
        raise ConfigError(f"the model's config has no {' or '.join(names)}")
    value = next(iter(values.values()))
    if any(other != value for other in values.values()):
        raise ConfigError(
            f"the model's config contradicts itself: expected one value, found {values}"
        )
    return value


def first(value: Any) -> Any:
    """A value, or the first one of a list; None if the list is empty."""
    if not isinstance(value, (list, tuple)):
        return value
    values = cast("Sequence[Any]", value)
    return values[0] if values else None
