"""Documents of token ids packed into rows, and batches of rows in an order that any step can be
found in.

A row never carries context over from another row or document: `starts` marks where attention, hash
and conv begin anew. Which tokens a step sees depends on the documents, the sizes and the seed
alone, so every arm of a comparison trains on the same tokens in the same order, and a resumed run
goes on where it stopped.
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
    """ids and targets int64 [B, T], starts bool [B, T]. targets[t] is the token after ids[t], or
    IGNORED."""

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
    """Concatenate documents (integer ids, without special tokens) and cut them into rows of
    `tokens`.

    Each document follows an end token, which starts it: the end token is the target of a document's
    last token and predicts the first of the next, as the first token of all does. A row's first
    position is a start too. Nothing else crosses: no position sees a token before its start. fill:
    complete the last row with end tokens whose targets are IGNORED; otherwise what does not fill a
    row is left out.
    """
    lengths = np.array([len(ids) for ids in documents], dtype=np.int64)
    stream = np.full(int(lengths.sum()) + len(documents) + 1, end_id, dtype=np.int32)
    starts = np.zeros(len(stream), dtype=bool)
    starts[np.cumsum(np.concatenate([[0], lengths + 1]))] = True
    stream[~starts] = np.concatenate(documents) if len(documents) else []
    targets, stream, starts = stream[1:], stream[:-1], starts[:-1]
    count = -(-len(stream) // tokens) if fill else len(stream) // tokens
    missing = max(0, count * tokens - len(stream))
    shape, size = (count, tokens), count * tokens
    ids_RT = np.pad(stream, (0, missing), constant_values=end_id)[:size].reshape(shape)
    targets_RT = np.pad(targets, (0, missing), constant_values=IGNORED)[:size].reshape(shape)
    starts_RT = np.pad(starts, (0, missing), constant_values=True)[:size].reshape(shape)
    starts_RT[:, 0] = True
    return Rows(ids_RT, targets_RT, starts_RT)


class Batches:
    """Batches of rows by step: `batches[step]` is the same whenever and wherever it is asked for.

    documents: integer ids of each, without special tokens. seed: documents and rows are shuffled
    anew each epoch, a batch has `batch` rows, what is left over is dropped, and steps run on from
    epoch to epoch. seed None (held-out text): documents as given, all of them, one epoch; the last
    batch may have fewer rows. `len()` is the number of batches of an epoch, iterating gives one
    epoch. Raises InputError for no documents, documents without ids, or too little text for one
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
        if not documents or min(len(ids) for ids in documents) < 1:
            raise InputError("documents: expected ids in each, found none")
        self.documents, self.end_id, self.batch, self.tokens, self.seed = (
            documents,
            end_id,
            batch,
            tokens,
            seed,
        )
        total = sum(len(ids) + 1 for ids in documents)
        self._length = -(-total // (tokens * batch)) if seed is None else total // tokens // batch
        if not self._length:
            raise InputError(
                f"documents: expected at least {batch} rows of {tokens} tokens, found {total} tokens"
            )
        self._epoch, self._rows = self._pack(0)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a whole batch."""
        return self.batch * self.tokens

    @property
    def digest(self) -> str:
        """SHA-256 over the documents, the sizes and the seed: equal digests, equal batches."""
        found = hashlib.sha256(f"{self.end_id} {self.batch} {self.tokens} {self.seed}".encode())
        for ids in self.documents:
            found.update(f" {len(ids)}:".encode() + ids.astype("<i8").tobytes())
        return found.hexdigest()

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        return (self[step] for step in range(len(self)))

    def __getitem__(self, step: int) -> Batch:
        epoch, index = divmod(step, len(self))
        if step < 0 or (epoch and self.seed is None):
            raise InputError(
                f"step: expected {'0 or more' if self.seed is not None else f'0 to {len(self) - 1}'}, "
                f"found {step}"
            )
        if epoch != self._epoch:
            self._epoch, self._rows = self._pack(epoch)
        part = slice(index * self.batch, (index + 1) * self.batch)
        ids, targets, starts = (torch.from_numpy(values[part]) for values in self._rows)
        return Batch(ids.long(), targets.long(), starts.clone())

    def _pack(self, epoch: int) -> tuple[int, Rows]:
        if self.seed is None:
            return epoch, pack(self.documents, self.end_id, self.tokens, fill=True)
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.documents))
        rows = pack(
            [self.documents[index] for index in order], self.end_id, self.tokens, fill=False
        )
        # Rows are shuffled as well, or a batch would be one long document.
        mixed = random.permutation(len(rows.ids_RT))
        return epoch, Rows(*(values[mixed] for values in rows))
