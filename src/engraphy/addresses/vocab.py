"""VocabMap: raw token ids -> the compressed ids that are hashed.

It knows tokenizers, but no addresses.

Ids whose text is the same after normalisation share a compressed id, so "Apple", " apple" and
"APPLE" are in the same n-grams. Only the hash sees compressed ids; the backbone keeps the raw ones
(paper, section 2.2, Tokenizer Compression).
"""

# pyright: reportUnnecessaryIsInstance=false
# Callers need not be typed, so arguments are checked at run time too.

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, normalizers

from ..errors import ConfigError, DigestMismatch, InputError
from ..spec.model_config import MOST_IDS
from ..system.files import write_file
from ..system.lfs import refuse_pointer

_FORMAT = "engraphy-vocab-1"
_LONE_SPACE = "\ue000"  # keeps a token that is one space apart from the empty string
# The `tokenizers` normalisers, not unicodedata: its StripAccents drops every combining mark (Mn, Mc
# and Me), and the released maps were made with it.
_NORMALIZER = normalizers.Sequence(
    [
        normalizers.NFKC(),
        normalizers.NFD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
        normalizers.Replace(Regex(r"^ $"), _LONE_SPACE),
        normalizers.Strip(),
        normalizers.Replace(_LONE_SPACE, " "),
    ]
)


class VocabMap:
    """A map of raw ids to compressed ids. Immutable; `len()` is the number of compressed ids.

    Attributes:
        table: int32 [V]. -1: the id has no token. It lies in a gap of the tokenizer's ids, or
            between its last id and a model's padded vocabulary. Such positions are dead: they take
            part in no n-gram.
        raw_size: V.
        has_dead_ids: Whether `table` has a -1.
        digest: SHA-256 of the map, as hex; dead ids that `widened` added at the end do not count.

    Raises:
        ConfigError: The table is not an array of integers, or has ids below -1 or only -1.
    """

    def __init__(self, table_V: np.ndarray):
        raw = np.asarray(table_V)
        if raw.dtype.kind not in "iu" or raw.ndim != 1 or not raw.size:
            raise ConfigError(
                f"vocabulary map: expected integers [V], found {raw.dtype} {list(raw.shape)}"
            )
        if raw.min() < -1 or raw.max() < 0 or raw.max() >= 2**31 - 1:
            raise ConfigError(
                "vocabulary map: expected int32 ids from -1 on, not all of them -1, "
                f"found {raw.min()} to {raw.max()}"
            )
        table = raw.astype(np.int32)
        table.setflags(write=False)
        self.table = table
        self._own_size = len(table)
        self._size = int(table.max()) + 1
        self.has_dead_ids = bool(table.min() < 0)
        self.digest = hashlib.sha256(table.astype("<i4").tobytes()).hexdigest()

    @classmethod
    def from_tokenizer(cls, tok: Any, raw_size: int | None = None) -> VocabMap:
        """The map of a whole tokenizer, added tokens included.

        It takes seconds for 129k ids: save the map and load it.

        Args:
            tok: A `tokenizers.Tokenizer`, or a transformers fast tokenizer, which has one as
                `backend_tokenizer`.
            raw_size: The model's padded vocabulary. By default the tokenizer's largest id plus one.

        Returns:
            The map. Ids that have no token are dead.

        Raises:
            ConfigError: `tok` is no such tokenizer or has no tokens, or raw_size is out of range.
        """
        tok = getattr(tok, "backend_tokenizer", tok)
        if not hasattr(tok, "get_vocab_size") or not hasattr(tok, "id_to_token"):
            raise ConfigError(
                "expected a tokenizers.Tokenizer or a transformers fast tokenizer, "
                f"found {type(tok).__name__}"
            )
        known = np.unique(list(tok.get_vocab(with_added_tokens=True).values())).tolist()
        if not known:
            raise ConfigError("expected a tokenizer with tokens, found none")
        size = known[-1] + 1
        if raw_size is not None and (
            not isinstance(raw_size, (int, np.integer)) or not size <= raw_size <= MOST_IDS
        ):
            raise ConfigError(
                f"raw_size: expected at least the tokenizer's {size} ids and at most {MOST_IDS}, "
                f"found {raw_size!r}"
            )
        texts = tok.decode_batch([[i] for i in known], skip_special_tokens=False)
        id_of_key: dict[str, int] = {}
        table = np.full(size if raw_size is None else raw_size, -1, dtype=np.int32)
        for i, text in zip(known, texts, strict=True):
            key = _key(text, tok.id_to_token(i))
            table[i] = id_of_key.setdefault(key, len(id_of_key))
        return cls(table)

    @classmethod
    def identity(cls, n: int) -> VocabMap:
        """No compression: n raw ids map to themselves (Qwen4-Exp).

        Raises ConfigError if n is not a positive int, or is too large.
        """
        if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or not 1 <= n <= MOST_IDS:
            raise ConfigError(
                f"identity vocabulary: expected a positive size up to {MOST_IDS}, found {n!r}"
            )
        return cls(np.arange(n, dtype=np.int32))

    def widened(self, raw_size: int) -> VocabMap:
        """The same map for a model with more ids, all of them dead.

        The new map has the digest of this one, and `save` writes the same file: dead ids at the end
        change no address.

        Args:
            raw_size: The model's vocabulary.

        Returns:
            A map of `raw_size` raw ids; this one if it has at least as many.

        Raises:
            ConfigError: raw_size is too large.
        """
        if raw_size <= self.raw_size:
            return self
        if raw_size > MOST_IDS:
            raise ConfigError(f"raw_size: expected at most {MOST_IDS} ids, found {raw_size}")
        own_V = self.table[: self._own_size]
        table_V = np.full(raw_size, -1, np.int32)
        table_V[: self._own_size] = own_V
        wide = VocabMap(table_V)
        wide._own_size = self._own_size
        wide.digest = self.digest
        return wide

    def agrees_with(self, tok: Any) -> bool:
        """Whether a tokenizer gives every live id of this map the same compressed id.

        Tokens that the tokenizer has at dead ids of this map, or beyond its end, do not count.
        """
        live = np.flatnonzero(self.table >= 0)
        other = VocabMap.from_tokenizer(tok).widened(self.raw_size).table
        return bool((other[live] == self.table[live]).all())

    @property
    def raw_size(self) -> int:
        """V: raw ids are 0 to V-1."""
        return len(self.table)

    def __repr__(self) -> str:
        return f"VocabMap({self.raw_size} -> {len(self)} ids, digest {self.digest[:8]}…)"

    def __len__(self) -> int:
        return self._size

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """Compressed ids of raw ids of any shape, int32; -1 if a raw id has no token.

        Raises InputError if an id is outside 0..V-1.
        """
        ids = np.asarray(ids)
        if not np.issubdtype(ids.dtype, np.integer):
            raise InputError(f"token ids: expected integers, found dtype {ids.dtype}")
        if ids.size and (ids.min() < 0 or ids.max() >= len(self.table)):
            bad = ids[(ids < 0) | (ids >= len(self.table))].flat[0]
            raise InputError(f"token ids: expected 0 to {len(self.table) - 1}, found {int(bad)}")
        return self.table[ids]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the map and its digest to one JSON file, which appears whole.

        Raises WriteFailed if it cannot be written.
        """
        body = {
            "format": _FORMAT,
            "digest": self.digest,
            "size": len(self),
            "table": self.table[: self._own_size].tolist(),
        }
        write_file(path, json.dumps(body, separators=(",", ":")))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> VocabMap:
        """Read what `save` wrote.

        Raises ConfigError if the file is of another kind, DigestMismatch if it is damaged.
        """
        try:
            body = json.loads(Path(path).read_text())
            kind = body["format"]
            digest = body["digest"]
            vocab = cls(np.array(body["table"]))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            refuse_pointer(path, ConfigError)
            found = f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"{path}: expected a vocabulary map ({_FORMAT}), found {found}"
            ) from None
        if kind != _FORMAT:
            raise ConfigError(f"{path}: expected format {_FORMAT!r}, found {kind!r}")
        if vocab.digest != digest:
            raise DigestMismatch(
                f"{path}: expected a map of digest {digest}, found {vocab.digest}: damaged"
            )
        return vocab


def _key(text: str, token: str) -> str:
    """The key of a token: its normalised text, or the raw token if its bytes do not decode.

    Tokens with the same key share a compressed id.
    """
    if "\ufffd" in text:
        return token
    return _NORMALIZER.normalize_str(text) or text
