"""Documents of token ids packed into rows, and batches of rows in a fixed order.

A row never carries context over from another row or document: `starts` marks where attention, hash
and conv begin anew. The tokens of a step depend on the documents, the sizes and the seed alone. So
every arm of a comparison trains on the same tokens in the same order, and a resumed run continues
where it stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, InputError

IGNORED = -100
"""Target of a position that has none."""


class Batch(NamedTuple):
    """What one step sees.

    Attributes:
        ids_BT: int64 [B, T].
        targets_BT: int64 [B, T]. targets[t] is the token after ids[t], or IGNORED.
        starts_BT: bool [B, T]. True where a document, or a row, begins.
    """

    ids_BT: Tensor
    targets_BT: Tensor
    starts_BT: Tensor

    def without_target(self, token: int) -> Batch:
        """The same batch, with IGNORED in place of the targets that are `token`."""
        targets_BT = self.targets_BT.where(self.targets_BT != token, IGNORED)
        return Batch(self.ids_BT, targets_BT, self.starts_BT)


class Rows(NamedTuple):
    """Packed rows: ids and targets int32 [R, T], starts bool [R, T]."""

    ids_RT: np.ndarray
    targets_RT: np.ndarray
    starts_RT: np.ndarray


def pack(documents: Sequence[np.ndarray], end_id: int, tokens: int, fill: bool) -> Rows:
    """Concatenates documents and cuts them into rows.

    Each document follows an end token, which starts it. So the end token is the target of a
    document's last token and predicts the first token of the next document; the very first token
    is an end token too. A row's first position is also a start. No position sees a token before its
    start.

    Args:
        documents: Integer ids of each, without special tokens.
        end_id: Id of the end token.
        tokens: Length of a row.
        fill: True = complete the last row with end tokens whose targets are IGNORED. False = leave
            out the rest that does not fill a row.
    """
    stream = _Stream(documents, np.arange(len(documents)), end_id)
    count = -(-stream.targets // tokens) if fill else stream.targets // tokens
    return stream.rows(np.arange(count), tokens)


class _Stream:
    """Documents in an order, as `pack` concatenates them. Only the rows that are asked for are
    read, so the documents may lie in a file.

    Args:
        documents: Integer ids of each, without special tokens.
        order: int64, indices of the documents.
        end_id: Id of the end token.

    Attributes:
        targets: Number of positions that have a target.
    """

    def __init__(self, documents: Sequence[np.ndarray], order: np.ndarray, end_id: int):
        self.documents = documents
        self.order = order
        self.end_id = end_id
        lengths = np.array([len(documents[index]) + 1 for index in order], dtype=np.int64)
        # Positions of the end tokens: one before each document, and the last one.
        self.ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.targets = int(self.ends[-1])

    def rows(self, numbers: np.ndarray, tokens: int) -> Rows:
        """The rows of these numbers, each of `tokens` positions. What lies behind the last target
        is filled with end tokens."""
        ids_RT = np.full((len(numbers), tokens), self.end_id, dtype=np.int32)
        targets_RT = np.full((len(numbers), tokens), IGNORED, dtype=np.int32)
        starts_RT = np.zeros((len(numbers), tokens), dtype=bool)
        for number, ids, targets, starts in zip(
            numbers.tolist(), ids_RT, targets_RT, starts_RT, strict=True
        ):
            begin = number * tokens
            kept = max(0, min(tokens, self.targets - begin))
            part = self._part(begin, begin + kept + 1)
            ids[:kept] = part[:-1]
            targets[:kept] = part[1:]
            first, last = np.searchsorted(self.ends, (begin, begin + kept))
            starts[self.ends[first:last] - begin] = True
            starts[kept:] = True
            starts[0] = True
        return Rows(ids_RT, targets_RT, starts_RT)

    def _part(self, begin: int, end: int) -> np.ndarray:
        """Positions `begin` to `end` of the stream, int32."""
        part = np.full(end - begin, self.end_id, dtype=np.int32)
        index = int(np.searchsorted(self.ends, begin, side="right")) - 1
        while index < len(self.order) and self.ends[index] + 1 < end:
            ids = self.documents[self.order[index]]
            place = int(self.ends[index]) + 1  # of the document's first token
            low = max(begin, place)
            high = min(end, place + len(ids))
            part[low - begin : high - begin] = ids[low - place : high - place]
            index += 1
        return part


class Batches:
    """Batches of rows by step. `batches[step]` is always the same, and read when it is asked for.

    `len()` is the number of batches of an epoch, and iterating gives one epoch.

    Args:
        documents: Integer ids of each, without special tokens.
        end_id: Id of the end token.
        batch: Rows of a batch.
        tokens: Tokens of a row.
        seed: Documents and rows are shuffled anew each epoch, the rest that does not fill a batch
            is dropped, and steps run on from epoch to epoch. None (held-out text): all documents in
            their order, one epoch; the last batch may have fewer rows.

    Raises:
        ConfigError: batch or tokens is below 1.
        InputError: There are no documents, a document has no ids, or the text is too short for one
            batch.
    """

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        end_id: int,
        *,
        batch: int = 16,
        tokens: int = 128,
        seed: int | None,
    ):
        if batch < 1 or tokens < 1:
            raise ConfigError(
                f"expected batch and tokens of at least 1, found {batch} and {tokens}"
            )
        if not len(documents) or min(len(ids) for ids in documents) < 1:
            raise InputError("documents: expected ids in each, found none")
        self.documents = documents
        self.end_id = end_id
        self.batch = batch
        self.tokens = tokens
        self.seed = seed
        total = sum(len(ids) + 1 for ids in documents)
        self._length = -(-total // (tokens * batch)) if seed is None else total // tokens // batch
        if not self._length:
            raise InputError(
                f"documents: expected at least {batch} rows of {tokens} tokens, "
                f"found {total} tokens"
            )
        self._epoch = 0
        self._stream, self._order = self._packed(0)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a whole batch."""
        return self.batch * self.tokens

    @property
    def digest(self) -> str:
        """SHA-256 over the documents, the sizes and the seed: equal digests, equal batches."""
        digest = hashlib.sha256(f"{self.end_id} {self.batch} {self.tokens} {self.seed}".encode())
        for ids in self.documents:
            digest.update(f" {len(ids)}:".encode() + ids.astype("<i8").tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        return (self[step] for step in range(len(self)))

    def __getitem__(self, step: int) -> Batch:
        epoch, index = divmod(step, len(self))
        if step < 0 or (epoch and self.seed is None):
            allowed = f"0 to {len(self) - 1}" if self.seed is None else "0 or more"
            raise InputError(f"step: expected {allowed}, found {step}")
        if epoch != self._epoch:
            self._epoch = epoch
            self._stream, self._order = self._packed(epoch)
        part = self._order[index * self.batch : (index + 1) * self.batch]
        ids, targets, starts = map(torch.from_numpy, self._stream.rows(part, self.tokens))
        return Batch(ids.long(), targets.long(), starts)

    def _packed(self, epoch: int) -> tuple[_Stream, np.ndarray]:
        """The stream of an epoch, and the numbers of its rows in their order."""
        count = len(self.documents)
        if self.seed is None:
            stream = _Stream(self.documents, np.arange(count), self.end_id)
            return stream, np.arange(-(-stream.targets // self.tokens))
        random = np.random.default_rng([self.seed, epoch])
        stream = _Stream(self.documents, random.permutation(count), self.end_id)
        # Rows are shuffled as well, or a batch would be one long document.
        return stream, random.permutation(stream.targets // self.tokens)
