"""Centred kernel alignment (CKA): how alike the layers of two models represent the same tokens.

Linear kernel, the unbiased HSIC estimator of Song et al. (2012), and minibatches whose estimates
are summed before they are divided (Nguyen et al., arXiv 2010.15327):

    HSIC(K, L) = (tr(K L) + 1'K1 1'L1 / ((n-1)(n-2)) - 2/(n-2) 1'K L1) / (n (n-3))
    CKA        = sum HSIC(K, L) / sqrt(sum HSIC(K, K) sum HSIC(L, L))

with the diagonals of K and L set to zero. The estimate may be below zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, InputError
from .logitlens import before_memory

_LEAST = 4  # samples of a batch: the estimator divides by n - 3


@dataclass(frozen=True)
class Alignment:
    """Which layers of another model the layers of a model resemble.

    Attributes:
        similarity_LR: f64, CKA of each layer (left) with each layer of the other model (right).
        aligned_L: f64, the soft alignment of each layer: a place, counted from 0, among the layers
            of the other model.
        before_memory: For each layer, whether its block runs before the first memory is added.
    """

    similarity_LR: Tensor
    aligned_L: Tensor
    before_memory: tuple[bool, ...]


class MinibatchCKA:
    """Sums HSIC estimates over batches, for each pair of layers.

    Args:
        left: Number of layers of the model that is placed.
        right: Number of layers of the model beside which it is placed.
    """

    def __init__(self, left: int, right: int) -> None:
        self._cross_LR = torch.zeros(left, right, dtype=torch.float64)
        self._left_L = torch.zeros(left, dtype=torch.float64)
        self._right_R = torch.zeros(right, dtype=torch.float64)

    def add(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
        """Adds a batch.

        Args:
            left: The states of each layer, [..., D]: all dimensions but the last are samples. D may
                differ from layer to layer.
            right: Those of the other model, for the same tokens in the same order.

        Raises:
            InputError: The number of layers or samples is another one, or there are fewer than four
                samples.
        """
        expected = tuple(self._cross_LR.shape)
        if (len(left), len(right)) != expected:
            raise InputError(f"expected {expected} layers, found {(len(left), len(right))}")
        kernels_L = [_kernel(states) for states in left]
        kernels_R = [_kernel(states) for states in right]
        sizes = sorted({len(kernel) for kernel in (*kernels_L, *kernels_R)})
        if len(sizes) != 1 or sizes[0] < _LEAST:
            raise InputError(
                f"states: expected the same {_LEAST} or more samples in all layers, found {sizes}"
            )
        for place, kernel in enumerate(kernels_L):
            self._left_L[place] += hsic(kernel, kernel)
            for other, kernel_R in enumerate(kernels_R):
                self._cross_LR[place, other] += hsic(kernel, kernel_R)
        for place, kernel in enumerate(kernels_R):
            self._right_R[place] += hsic(kernel, kernel)

    def similarity(self) -> Tensor:
        """Returns CKA over all batches, f64 [left, right].

        Raises:
            InputError: The states of a layer do not vary, or no batch was added.
        """
        for name, own in (("left", self._left_L), ("right", self._right_R)):
            still = [place for place, value in enumerate(own.tolist()) if not value > 0]
            if still:
                raise InputError(f"{name} layers {still}: expected states that vary, found none")
        return self._cross_LR / (self._left_L[:, None] * self._right_R).sqrt()

    def alignment(self, memory_layers: Sequence[int] = (), top: int = 5) -> Alignment:
        """Places each layer of the left model among those of the right one.

        Args:
            memory_layers: Layers of the left model that have a memory, 0-based.
            top: As in `soft_alignment`.

        Raises:
            InputError: As `similarity` raises it.
        """
        similarity_LR = self.similarity()
        marks = before_memory(len(similarity_LR), memory_layers)
        return Alignment(similarity_LR, soft_alignment(similarity_LR, top), marks)


def hsic(kernel_NN: Tensor, other_NN: Tensor) -> float:
    """The unbiased HSIC estimate of two kernel matrices.

    Args:
        kernel_NN: Symmetric, f64. Its diagonal does not count.
        other_NN: The same, of the other representation.
    """
    count = len(kernel_NN)
    one_NN = kernel_NN - torch.diag(kernel_NN.diagonal())
    two_NN = other_NN - torch.diag(other_NN.diagonal())
    trace = (one_NN * two_NN).sum()
    sums = one_NN.sum() * two_NN.sum() / ((count - 1) * (count - 2))
    rows = one_NN.sum(0) @ two_NN.sum(0) * 2 / (count - 2)
    return float(trace + sums - rows) / (count * (count - 3))


def soft_alignment(similarity_LR: Tensor, top: int = 5) -> Tensor:
    """The mean place of the most similar layers, weighted by similarity (paper, section 5.1).

    Args:
        similarity_LR: CKA of each layer with each layer of the other model.
        top: How many of the most similar layers count; all, if there are fewer.

    Returns:
        f64 [L]; NaN if none of them is similar (all at most 0).

    Raises:
        ConfigError: top is below 1.
    """
    if top < 1:
        raise ConfigError(f"top: expected 1 or more, found {top}")
    highest = similarity_LR.double().topk(min(top, similarity_LR.shape[1]), dim=1)
    weight_LK = highest.values.clamp_min(0)  # below 0 means no similarity
    total_L = weight_LK.sum(1)
    place_L = (weight_LK * highest.indices).sum(1) / total_L
    return torch.where(total_L > 0, place_L, math.nan)


def _kernel(states: Tensor) -> Tensor:
    """X X', f64 [N, N]."""
    x_ND = states.detach().double().flatten(0, -2)
    # Centred first: the same estimate, but the products lose fewer digits.
    x_ND = x_ND - x_ND.mean(0)
    return x_ND @ x_ND.T
