"""A model with a memory that has learned something, for tests of what is saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import engraphy
from tests.tools.hf_models import wake
from tests.tools.tiny_model import small_config

IDS_BT = torch.arange(2, 26).view(2, 12)


def remembering(folder: Path, seed: int = 5, **options: Any) -> Any:
    """The model in `folder` with a memory that has learned something."""
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    wake(engraphy.attach(model, small_config(model), dtype=torch.float32), seed)
    return model


@torch.no_grad()
def logits(model: Any, ids_BT: Tensor) -> Tensor:
    return model(ids_BT).logits
