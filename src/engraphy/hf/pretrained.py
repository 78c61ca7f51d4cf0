"""A transformers model and its tokenizer, by folder or hub name, or one line that says what is
missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from .. import hf  # noqa: F401  registers the model type of a model saved with its memory
from ..errors import DataUnavailable, EngraphyError
from ..system.lfs import refuse_pointer
from ..train.dtype import AUTO, DtypeChoice, choose_dtype


def load_tokenizer(name: str) -> Any:
    """The tokenizer that lies with a model. Raises DataUnavailable where there is none."""
    _load(name, "a model with a tokenizer", AutoConfig.from_pretrained)
    return _load(name, "a tokenizer beside the model", AutoTokenizer.from_pretrained)


def load_model(name: str, dtype: str = AUTO) -> tuple[Any, DtypeChoice]:
    """The model, on a GPU if there is one, in eval mode; and its dtype, whatever the file holds.

    Args:
        name: a folder, or a name on the hub.
        dtype: as `choose_dtype` takes it.

    Raises:
        DataUnavailable: there is no such model.
        ConfigError: there is no such dtype.
    """
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    choice = choose_dtype(dtype, device)

    def load(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(name, dtype=choice.torch)

    model = _load(name, "a model", load)
    return model.to(device), choice


def require_peft(what: str) -> Any:
    """The package peft, which `what` needs. Raises DataUnavailable without it."""
    try:
        import peft
    except ImportError as error:
        raise DataUnavailable(
            f'{what}: expected the package peft, found {error}; pip install "peft>=0.18"'
        ) from None
    return peft


def load_adapter(model: Any, folder: Path) -> Any:
    """The PEFT model of `model` and the adapters in `folder`, in eval mode. Raises DataUnavailable."""
    peft = require_peft(str(folder))
    return _load(
        str(folder), "LoRA adapters", lambda name: peft.PeftModel.from_pretrained(model, name)
    ).eval()


def _load(name: str, what: str, load: Callable[[str], Any]) -> Any:
    try:
        return load(name)
    except EngraphyError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        for path in sorted(Path(name).iterdir()) if Path(name).is_dir() else ():
            refuse_pointer(path, DataUnavailable)
        reason = str(error).strip().partition("\n")[0]
        raise DataUnavailable(
            f"{name}: expected {what}, as a folder or a name on the hub, "
            f"found {type(error).__name__}: {reason}"
        ) from error
