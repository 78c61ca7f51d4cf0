"""PEFT's adapters in a model, looked at without importing PEFT: are they all switched off?"""

from __future__ import annotations

from typing import Any

from torch import nn


class Adapters:
    """The adapters in `model`, which may come and go: PEFT keeps `model.peft_config` of them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = (model,)  # in a tuple: what holds this may be a module
        self._config: Any = None
        self._names: tuple[str, ...] = ()
        self._layers: list[Any] = []

    @property
    def present(self) -> bool:
        """Whether there are any."""
        return bool(getattr(self._model[0], "peft_config", None))

    def all_disabled(self) -> bool:
        """Whether there are adapters and all of their layers are off, as in `disable_adapter`.

        Looks at each layer; walks over the model only after adapters were added or removed.
        """
        (model,) = self._model
        config = getattr(model, "peft_config", None)
        if not config:
            self._config, self._layers = None, []
            return False
        if config is not self._config or tuple(config) != self._names:
            self._config, self._names = config, tuple(config)
            self._layers = [module for module in model.modules() if _is_adapter_layer(module)]
        return bool(self._layers) and all(layer.disable_adapters for layer in self._layers)


def _is_adapter_layer(module: nn.Module) -> bool:
    return isinstance(getattr(type(module), "disable_adapters", None), property)
