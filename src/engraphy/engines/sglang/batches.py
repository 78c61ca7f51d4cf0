"""The tokens of one forward of SGLang, as `Chunks`.

A decoded token, a chunk of a prompt and both in one batch look alike here: each request has some
tokens at positions that follow each other, and the slots of all tokens before them stand in the
table `req_to_token`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from ..chunks import Chunks


def ids_before(requests: Sequence[Any], starts: Sequence[int], count: int) -> Tensor:
    """int64 [R, count], the ids before each chunk, oldest first; -1 = before the first token.

    Args:
        requests: SGLang's requests, with origin_input_ids and output_ids.
        starts: The position of the first token of each chunk.
        count: How many ids are wanted.

    Raises:
        InputError: The host does not have the ids of a request up to its chunk.
    """
    ids_RP = np.full((len(requests), count), -1, dtype=np.int64)
    for row, (request, start) in enumerate(zip(requests, starts, strict=True)):
        prompt = request.origin_input_ids
        known = len(prompt) + len(request.output_ids)
        if known < start:
            raise InputError(
                f"request {request.rid}: expected {start} ids on the host, found {known}"
            )
        first = max(start - count, 0)
        ids = list(prompt[first:start])
        if start > len(prompt):
            ids += request.output_ids[max(first - len(prompt), 0) : start - len(prompt)]
        ids_RP[row, count - len(ids) :] = ids
    return torch.from_numpy(ids_RP)


def chunks_of(batch: Any, req_to_token: Tensor, past: int) -> Chunks | None:
    """The chunks of a ForwardBatch. None if it has no token (an idle one).

    Args:
        batch: The ForwardBatch.
        req_to_token: int [requests, positions], the slot of each token.
        past: P, how many slots before each chunk are wanted.

    Raises:
        InputError: The tokens came as embeddings, or a request has none.
    """
    if batch.input_embeds is not None or batch.replace_embeds is not None:
        raise InputError("a memory looks up ids: expected token ids, found input_embeds")
    if batch.forward_mode.is_decode():
        lengths = np.ones(batch.batch_size, dtype=np.int64)
    elif batch.forward_mode.is_idle():
        return None
    else:
        lengths = np.asarray(batch.extend_seq_lens_cpu, dtype=np.int64)
    bounds = np.concatenate([[0], lengths.cumsum()])
    tokens = int(bounds[-1])
    starts_R = _numpy(batch.positions)[bounds[:-1]].astype(np.int64)
    positions_RP = starts_R[:, None] - np.arange(past, 0, -1)
    columns_RP = torch.from_numpy(np.maximum(positions_RP, 0)).to(req_to_token.device)
    slots_RP = req_to_token[batch.req_pool_indices[:, None].to(torch.int64), columns_RP]
    return Chunks(
        batch.input_ids[:tokens],
        bounds,
        _numpy(batch.out_cache_loc)[:tokens].astype(np.int64),
        np.where(positions_RP >= 0, _numpy(slots_RP).astype(np.int64), -1),
    )


def _numpy(values: Tensor) -> np.ndarray:
    return values.numpy(force=True)
