"""The reference language model: dense or mixture of experts, with or without a memory; the paper's
models are sizes of it."""

from ..system.moved import moved_names
from .arms import (
    Arm,
    Arms,
    MemorySizes,
    Parameters,
    count_parameters,
    demo_config,
    dense_arm,
    memory_arm,
    moe_arm,
    three_arms,
)
from .config import LMConfig, MLAConfig, YarnConfig
from .configs import NAMES, Backbone, backbone, scaled
from .model import LM
from .sizes import Part, parts
from .tables import size_rows

__all__ = [
    "LM",
    "NAMES",
    "Arm",
    "Arms",
    "Backbone",
    "LMConfig",
    "MLAConfig",
    "MemorySizes",
    "Parameters",
    "Part",
    "YarnConfig",
    "backbone",
    "count_parameters",
    "demo_config",
    "dense_arm",
    "memory_arm",
    "moe_arm",
    "parts",
    "scaled",
    "size_rows",
    "three_arms",
]

__getattr__ = moved_names(
    __name__,
    {
        "BANDS": "eval.bands",
        "BandLoss": "eval.bands",
        "Batch": "data.packing",
        "Batches": "data.packing",
        "Documents": "data.documents",
        "NgramCounts": "eval.bands",
        "encode": "data.tokens",
        "end_id": "data.tokens",
        "load_documents": "data.documents",
        "load_tokenizer": "data.tokens",
        "loss_by_band": "eval.bands",
        "pack": "data.packing",
        "split_documents": "data.documents",
        "train_tokenizer": "data.tokens",
    },
)
