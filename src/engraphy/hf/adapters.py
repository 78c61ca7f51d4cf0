"""Finds out whether all of PEFT's adapters in a model are disabled, without importing PEFT."""

from __future__ import annotations

from typing import Any

from torch import nn


class Adapters:
    """The adapters in `model`. They may come and go; PEFT lists them in `model.peft_config`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = (model,)  # a tuple, so that nn.Module does not register it as a submodule
        self._config: Any = None
        self._names: tuple[str, ...] = ()
        self._layers: list[Any] = []

    @property
    def present(self) -> bool:
        """Whether the model has adapters."""
        return bool(getattr(self._model[0], "peft_config", None))

    def all_disabled(self) -> bool:
        """Whether the model has adapters and all of their layers are off, as in `disable_adapter`.

        Looks at each adapter layer. Walks over the whole model only after adapters were added or
        removed.
        """
        (model,) = self._model
        config = getattr(model, "peft_config", None)
        if not config:
            self._config = None
            self._layers = []
            return False
        if config is not self._config or tuple(config) != self._names:
            self._config = config
            self._names = tuple(config)
            self._layers = [module for module in model.modules() if _is_adapter_layer(module)]
        return bool(self._layers) and all(layer.disable_adapters for layer in self._layers)


def _is_adapter_layer(module: nn.Module) -> bool:
    return isinstance(getattr(type(module), "disable_adapters", None), property)
