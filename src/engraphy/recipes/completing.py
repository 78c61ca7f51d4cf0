"""Greedy completions of many prompts by a transformers model, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

_TAIL = 16  # last tokens that are looked through for a stop


def completer(
    model: Any, tokenizer: Any, batch: int, tokens: int, stops: Sequence[str] = ()
) -> Callable[[Sequence[str]], list[str]]:
    """The function that completes prompts.

    Args:
        model: A causal language model of transformers, in eval mode.
        tokenizer: Its tokenizer, with a padding token or an end token.
        batch: Prompts at a time. Shorter ones are padded on the left and masked.
        tokens: Most tokens to write after each.
        stops: Texts of up to 16 tokens. A row is done once it wrote one of them; what came with it
            stays.

    Returns:
        A function from prompts to what follows each, without the end token.

    Raises:
        InputError: The tokenizer has no token to pad with.
    """
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad_id is None:
        raise InputError("tokenizer: expected a padding or an end token, found neither")

    def complete(prompts: Sequence[str]) -> list[str]:
        encoded = [tokenizer(prompt).input_ids for prompt in prompts]
        # Prompts of similar length share a batch, so that little of it is padding.
        order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
        texts = [""] * len(prompts)
        for first in range(0, len(order), batch):
            part = order[first : first + batch]
            written = _continued(
                model, tokenizer, [encoded[i] for i in part], tokens, stops, pad_id
            )
            for index, text in zip(part, written, strict=True):
                texts[index] = text
        return texts

    return complete


@torch.no_grad()
def _continued(
    model: Any,
    tokenizer: Any,
    rows: Sequence[list[int]],
    tokens: int,
    stops: Sequence[str],
    pad_id: int,
) -> list[str]:
    longest = max(map(len, rows))
    ids_BT = torch.full((len(rows), longest), pad_id)
    mask_BT = torch.zeros_like(ids_BT)
    for row, ids in enumerate(rows):
        ids_BT[row, longest - len(ids) :] = torch.tensor(ids)
        mask_BT[row, longest - len(ids) :] = 1

    def stopped(ids_BT: Tensor, scores: Any, **_: Any) -> Tensor:
        tails = ids_BT[:, max(longest, ids_BT.shape[1] - _TAIL) :]
        texts = tokenizer.batch_decode(tails)
        done = [any(stop in text for stop in stops) for text in texts]
        return torch.tensor(done, device=ids_BT.device)

    out_BT = model.generate(
        ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=pad_id,
        stopping_criteria=[stopped],
    )
    return tokenizer.batch_decode(out_BT[:, longest:], skip_special_tokens=True)
