"""The config of a model saved with its memory, as engines see it: that of its backbone.

Engines read a model's config with transformers. They get the backbone's own config, so all that
they derive from it (heads, rotary embeddings, limits) is as without a memory. Only the name of the
class to run differs, and the plugin has registered a class of that name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ..errors import ConfigError
from .folder import MODEL_TYPE

PREFIX = "Engraphy"
"""What the names of our classes have in front of the backbone's: EngraphyLlamaForCausalLM."""


class _CompositeConfig(PreTrainedConfig):
    """Stands for the model_type; gives configs of the backbone."""

    model_type = MODEL_TYPE
    served: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The backbone's config. Raises ConfigError if no class of ours runs the backbone."""
        backbone = dict(config_dict.get("text_config") or {})
        (name, *_) = backbone.get("architectures") or [None]
        if name not in cls.served:
            raise ConfigError(
                f"a model saved with its memory: expected a backbone of {', '.join(cls.served)}, "
                f"found {name}"
            )
        kind = AutoConfig.for_model(backbone.pop("model_type"))
        backbone["architectures"] = [PREFIX + name]
        return type(kind).from_dict(backbone, **kwargs)


def register_config(architectures: Sequence[str]) -> None:
    """Makes AutoConfig read such directories.

    Args:
        architectures: Class names of the backbones that the engine can run with a memory.
    """
    _CompositeConfig.served = tuple(architectures)
    AutoConfig.register(MODEL_TYPE, _CompositeConfig, exist_ok=True)
