"""The tokens of one forward of an engine: the next chunk of each request, one after the other.

Chunks have different lengths: one token of a request that decodes, hundreds of one whose prompt is
read. A request may begin with slots that another request fills in this same forward: engines share
the beginning of a prompt as soon as it is scheduled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Chunks:
    """The tokens of one forward.

    Attributes:
        ids_N: int [N], the token ids of all requests, request after request.
        bounds: int64 [R + 1], where each request's tokens begin, and N.
        slots_N: int64 [N], the KV slot of each token.
        past_RP: int64 [R, P], the KV slots of the P tokens before each chunk, oldest first; -1 =
            before the first token of the request.
    """

    ids_N: Tensor
    bounds: np.ndarray
    slots_N: np.ndarray
    past_RP: np.ndarray

    def __post_init__(self) -> None:
        bounds = self.bounds
        if len(bounds) != len(self.past_RP) + 1 or bounds[0] or (np.diff(bounds) < 1).any():
            raise InputError(
                f"chunks: expected bounds of {len(self.past_RP)} requests of a token or more, "
                f"found {bounds.tolist()}"
            )
        if not bounds[-1] == len(self.ids_N) == len(self.slots_N):
            raise InputError(
                f"chunks: expected {bounds[-1]} ids and slots, found {len(self.ids_N)} and "
                f"{len(self.slots_N)}"
            )

    def before(self, distances_K: np.ndarray) -> np.ndarray:
        """The slots of the tokens that stand so far before each token.

        Args:
            distances_K: int64, from 0 (the token itself) to P.

        Returns:
            int64 [N, K]; -1 = before the first token of the request.
        """
        requests, past = self.past_RP.shape
        places_N = np.arange(len(self.slots_N)) + past * np.repeat(
            np.arange(1, requests + 1), np.diff(self.bounds)
        )  # in a list of all slots, in which each request's past stands before its chunk
        slots = np.empty(len(self.slots_N) + self.past_RP.size, dtype=np.int64)
        slots[places_N] = self.slots_N
        places_R = self.bounds[:-1] + past * np.arange(requests)
        slots[places_R[:, None] + np.arange(past)] = self.past_RP
        return slots[places_N[:, None] - distances_K]


def past_slots(
    blocks_RM: np.ndarray, block_size: int, lengths: np.ndarray, count: int
) -> np.ndarray:
    """The slots of the last tokens of each request, by its block table.

    Args:
        blocks_RM: int [R, M], the KV blocks of each request in order.
        block_size: Slots of a block.
        lengths: int64 [R], how many tokens of each request there are so far.
        count: How many slots are wanted.

    Returns:
        int64 [R, count], oldest first; -1 = before the first token.
    """
    positions_RP = lengths[:, None] - np.arange(count, 0, -1)
    known_RP = np.clip(positions_RP, 0, None)
    blocks_RP = np.take_along_axis(blocks_RM.astype(np.int64), known_RP // block_size, axis=1)
    slots_RP = blocks_RP * block_size + known_RP % block_size
    return np.where(positions_RP >= 0, slots_RP, -1)
