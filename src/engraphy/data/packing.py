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
    lengths = np.array([len(ids) for ids in documents], dtype=np.int64)
    stream = np.full(int(lengths.sum()) + len(documents) + 1, end_id, dtype=np.int32)
    starts = np.zeros(len(stream), dtype=bool)
    starts[np.cumsum(np.concatenate([[0], lengths + 1]))] = True
    stream[~starts] = np.concatenate(documents) if len(documents) else []
    count = len(stream) - 1
    rows = -(-count // tokens) if fill else count // tokens

    def cut(values: np.ndarray, filler: int) -> np.ndarray:
        missing = max(0, rows * tokens - count)
        whole = np.pad(values, (0, missing), constant_values=filler)
        return whole[: rows * tokens].reshape(rows, tokens)

    starts_RT = cut(starts[:-1], True)
    starts_RT[:, 0] = True
    return Rows(cut(stream[:-1], end_id), cut(stream[1:], IGNORED), starts_RT)


class Batches:
    """Batches of rows by step. `batches[step]` is always the same.

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
        if not documents or min(len(ids) for ids in documents) < 1:
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
        self._epoch, self._rows = self._pack(0)

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
            self._epoch, self._rows = self._pack(epoch)
        part = slice(index * self.batch, (index + 1) * self.batch)
        ids, targets, starts = (torch.from_numpy(values[part]) for values in self._rows)
        return Batch(ids.long(), targets.long(), starts.clone())

    def _pack(self, epoch: int) -> tuple[int, Rows]:
        """The epoch, and its rows in their order."""
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
