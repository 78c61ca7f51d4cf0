"""A transformers model and its tokenizer, by folder or hub name, or one line that says what is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from .. import hf  # noqa: F401  registers the model type of a model saved with its memory
from ..doctor import bf16_is_fast
from ..errors import DataUnavailable, EngraphyError
from ..lfs import refuse_pointer


def load_tokenizer(name: str) -> Any:
    """The tokenizer that lies with a model. Raises DataUnavailable where there is none."""
    _load(name, "a model with a tokenizer", AutoConfig.from_pretrained)
    return _load(name, "a tokenizer beside the model", AutoTokenizer.from_pretrained)


def load_model(name: str) -> Any:
    """The model, on a GPU where there is one, in eval mode. Raises DataUnavailable where there is none.

    In bfloat16 on a GPU and on a CPU that is fast at it, else in float32, whatever the file holds.
    """
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" or bf16_is_fast() else torch.float32
    model = _load(name, "a model", lambda name: AutoModelForCausalLM.from_pretrained(name, dtype=dtype))
    return model.to(device)


def require_peft(what: str) -> Any:
    """The package peft, which `what` needs. Raises DataUnavailable without it."""
    try:
        import peft
    except ImportError as error:
        raise DataUnavailable(f'{what}: expected the package peft, found {error}; '
                              'pip install "peft>=0.18"') from None
    return peft


def load_adapter(model: Any, folder: Path) -> Any:
    """The PEFT model of `model` and the adapters in `folder`, in eval mode. Raises DataUnavailable."""
    peft = require_peft(str(folder))
    return _load(str(folder), "LoRA adapters", lambda name: peft.PeftModel.from_pretrained(model, name)).eval()


def _load(name: str, what: str, load: Callable[[str], Any]) -> Any:
    try:
        return load(name)
    except EngraphyError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        for path in sorted(Path(name).iterdir()) if Path(name).is_dir() else ():
            refuse_pointer(path, DataUnavailable)
        reason = str(error).strip().partition("\n")[0]
        raise DataUnavailable(f"{name}: expected {what}, as a folder or a name on the hub, "
                              f"found {type(error).__name__}: {reason}") from error
