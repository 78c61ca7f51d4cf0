"""The tokens of one forward of an engine: the next chunk of each request, one after the other.

Chunks have different lengths: one token of a request that decodes, hundreds of one whose prompt is
read. Chunks of equal length are computed together as one batch [B, T], so nothing is padded.

A request may begin with slots that another request fills in this same forward: engines share the
beginning of a prompt as soon as it is scheduled. A conv therefore has to compute such a request
after the other one. `batches` gives the order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Batch:
    """Chunks of equal length of some requests.

    Attributes:
        requests: int64 [B], which requests of the forward.
        tokens_BT: int64 [B, T], the places of their tokens among all tokens of the forward.
    """

    requests: np.ndarray
    tokens_BT: np.ndarray


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

    def batches(self, ordered: bool) -> list[Batch]:
        """The chunks of each length together.

        Args:
            ordered: True: a request whose earlier tokens are computed in this forward too comes
                after the batch that computes them.
        """
        lengths = np.diff(self.bounds)
        rounds = self._rounds() if ordered else np.zeros_like(lengths)
        keys = np.stack([rounds, lengths], axis=1)
        batches = []
        for number, length in np.unique(keys, axis=0):
            requests = np.flatnonzero((rounds == number) & (lengths == length))
            tokens_BT = self.bounds[requests, None] + np.arange(length)
            batches.append(Batch(requests, tokens_BT))
        return batches

    def _rounds(self) -> np.ndarray:
        """int64 [R], how many other requests have to be computed before each one."""
        rounds = np.zeros(len(self.past_RP), dtype=np.int64)
        if not np.isin(self.past_RP, self.slots_N).any():
            return rounds
        owners = np.repeat(np.arange(len(rounds)), np.diff(self.bounds))
        owner_of = dict(zip(self.slots_N.tolist(), owners.tolist(), strict=True))
        needed = [
            {owner_of[slot] for slot in past if slot in owner_of} for past in self.past_RP.tolist()
        ]
        for _ in range(len(rounds)):
            before = rounds.copy()
            for request, others in enumerate(needed):
                for other in others:
                    rounds[request] = max(rounds[request], rounds[other] + 1)
            if (rounds == before).all():
                return rounds
        raise InputError("chunks: expected requests of which none waits for itself, found some")


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
