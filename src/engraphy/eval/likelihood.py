"""Log-likelihoods of texts: what multiple choice and pairs of sentences are scored by.

A model is known through one function, `Logits`. So the reference model, a transformers model with
or without a memory, and a test double go through the same loop, and this module imports none of
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from ..data.tokens import encode, end_id
from ..errors import InputError
from .losses import LanguageModel

Logits = Callable[[Tensor, Tensor], Tensor]
"""Takes ids, int64 [B, T], and which of them are text, bool [B, T]. Returns logits, [B, T, V].

Rows are padded on the right. The logits of padding are not used.
"""


class Text(NamedTuple):
    """What is scored.

    Attributes:
        ids: Token ids.
        given: How many of them are given, at least one: the rest are scored.
    """

    ids: list[int]
    given: int


def logits_of(model: Any) -> Logits:
    """The logits of a model in eval mode. The model is back in its own mode after each call.

    Args:
        model: The reference model, a causal language model of transformers, or a function that is
            Logits already.
    """
    if isinstance(model, LanguageModel):
        return partial(_reference_logits, model)
    if isinstance(model, nn.Module):
        return partial(_transformers_logits, model)
    return model


def _reference_logits(model: Any, ids_BT: Tensor, live_BT: Tensor) -> Tensor:
    with _eval_mode(model) as device:
        return model(ids_BT.to(device))


def _transformers_logits(model: Any, ids_BT: Tensor, live_BT: Tensor) -> Tensor:
    with _eval_mode(model) as device:
        mask_BT = live_BT.long().to(device)
        return model(input_ids=ids_BT.to(device), attention_mask=mask_BT, use_cache=False).logits


@contextmanager
def _eval_mode(model: Any) -> Iterator[torch.device]:
    """Puts the model into eval mode for a while; gives its device."""
    training = model.training
    model.eval()
    try:
        yield next(model.parameters()).device
    finally:
        model.train(training)


@torch.no_grad()
def log_likelihoods(logits: Logits, texts: Sequence[Text], batch: int = 32) -> list[float]:
    """Log-likelihoods of the tokens of each text that are not given, in nats.

    Args:
        logits: The model.
        texts: What to score.
        batch: Number of texts at a time.

    Raises:
        InputError: The model returns NaN or infinity.
    """
    # Texts of similar length share a batch, so that little of it is padding.
    order = sorted(range(len(texts)), key=lambda index: len(texts[index].ids))
    sums = [math.nan] * len(texts)
    for first in range(0, len(order), batch):
        part = order[first : first + batch]
        ids_BT, live_BT = _padded([texts[index].ids for index in part])
        logits_BTV = logits(ids_BT, live_BT)
        for row, index in enumerate(part):
            ids, given = texts[index]
            logits_TV = logits_BTV[row, given - 1 : len(ids) - 1].float()
            targets_T = ids_BT[row, given : len(ids)].to(logits_TV.device)
            sums[index] = -float(functional.cross_entropy(logits_TV, targets_T, reduction="sum"))
    if not all(map(math.isfinite, sums)):
        raise InputError("model: expected finite log-likelihoods, found NaN or infinity")
    return sums


def _padded(texts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids, int64 [B, T], padded on the right, and which of them are text, bool [B, T]."""
    longest = max(map(len, texts))
    ids_BT = torch.zeros(len(texts), longest, dtype=torch.int64)
    live_BT = torch.zeros(len(texts), longest, dtype=torch.bool)
    for row, ids in enumerate(texts):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        live_BT[row, : len(ids)] = True
    return ids_BT, live_BT


def texts_of(tokenizer: Any, question: str, options: Sequence[str]) -> list[Text]:
    """Question + option for each option. What is given is the same in all of them: the tokens that
    the question alone has too.

    So a token that spans the boundary is scored as a whole, in every option alike. The harness
    leaves it out; where no token spans the boundary, both score the same tokens.

    Args:
        tokenizer: Of transformers, or of the package tokenizers.
        question: "" = none: the token that begins texts, or else the one that ends them, is given.
        options: The texts that may follow.

    Raises:
        InputError: No token of the question precedes an option.
    """
    if not question:
        begin = _first_id(tokenizer)
        bare = [_ids(tokenizer, option, add_special_tokens=False) for option in options]
        return [Text(ids if ids[:1] == [begin] else [begin, *ids], 1) for ids in bare]
    asked = _ids(tokenizer, question)
    whole = [_ids(tokenizer, question + option) for option in options]
    given = min(_shared(asked, ids) for ids in whole)
    if not given:
        raise InputError(
            "item: expected a token of the question before the option, "
            f"found none in {question!r} and {list(options)}"
        )
    return [Text(ids, given) for ids in whole]


def _ids(tokenizer: Any, text: str, **special: bool) -> list[int]:
    if isinstance(tokenizer, Tokenizer):
        return encode(tokenizer, [text])[0].tolist()
    return tokenizer(text, **special).input_ids


def _first_id(tokenizer: Any) -> int:
    """What a text begins with that has no context."""
    if isinstance(tokenizer, Tokenizer):
        return end_id(tokenizer)
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    found = next((token for token in ids if token is not None), None)
    if found is None:
        raise InputError("tokenizer: expected a token that begins or ends texts, found none")
    return found


def _shared(first: list[int], second: list[int]) -> int:
    """Length of the common prefix."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
