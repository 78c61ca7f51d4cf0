"""Tells the native core how to ask tensors of torch where they lie (`_native/tensor.hpp`)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import _native

_DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64]  # as TensorKind


@functools.cache
def introduce_tensors() -> bool:
    """Has to be called before the first native call that takes a tensor.

    Returns whether this version of torch answers in C (from 2.10 on), not in Python.
    """
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    return _native.compiled().know_tensors(Tensor, _DTYPES, torch.is_grad_enabled, exchange)
