"""The text that `finetune` trains on: read, encoded, and divided into training and held-out
documents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.documents import Documents, load_documents
from ..errors import ConfigError, DataUnavailable, InputError

HELDOUT_TOKENS = 100_000
"""About the largest number of tokens to hold out. They are measured twice, so more would take
longer, and would show nothing new."""


def load_texts(source: str) -> Documents:
    """Reads the documents of a text file, a folder, a .jsonl file or a named data set.

    Args:
        source: A .jsonl file with "text" in each line, or what `load_documents` takes.

    Returns:
        The documents, none of them empty.

    Raises:
        DataUnavailable: If the file or data set does not exist, or has no text.
        InputError: If the file is not UTF-8, or a line has no "text".
    """
    path = Path(source)
    if path.suffix != ".jsonl":
        return load_documents(source)
    texts = [text for text in _lines_of(path) if text.strip()]
    if not texts:
        raise DataUnavailable(f"{path}: expected documents, found no text")
    return Documents(source, "not stated", tuple(texts))


def _lines_of(path: Path) -> list[str]:
    """The "text" of each line of a .jsonl file; blank lines are skipped."""
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataUnavailable(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, found {error}") from None
    # Split at line feeds only. JSON strings may hold U+2028, U+0085 and others, at which
    # str.splitlines would cut.
    lines = enumerate(content.split("\n"), start=1)
    return [_text(path, number, line) for number, line in lines if line.strip()]


def _text(path: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'{path}, line {number}: expected a JSON object with "text", '
            f"found {type(error).__name__}: {error}"
        ) from None
    if not isinstance(text, str):
        raise InputError(
            f'{path}, line {number}: expected a string as "text", found {type(text).__name__}'
        )
    return text


def read_documents(
    source: str, tokenizer: Any, *, heldout: float, seed: int, batch: int, length: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Reads and encodes the documents to train on and those to hold out.

    If there is only one document, its end is held out.

    Args:
        source: As `load_texts` takes it.
        tokenizer: A tokenizer of transformers.
        heldout: Share of the documents that is not trained on. Books have a split of their own.
        seed: Seed of the division.
        batch: Rows of a step.
        length: Tokens of a row.

    Returns:
        Ids of the training documents and of the held-out documents, int32 [T] each. The held-out
        documents end with the one that reaches HELDOUT_TOKENS.

    Raises:
        DataUnavailable, InputError: As `load_texts` raises them; InputError also if the text does
            not fill one step, or leaves nothing to hold out.
    """
    documents = load_texts(source)
    if len(set(documents.texts)) > 1:
        parts = documents.split(heldout, seed)
        training, unseen = (encode_texts(tokenizer, part) for part in parts)
    else:
        training, unseen = _divided(encode_texts(tokenizer, documents.texts[:1]), heldout)
    total = sum(len(ids) + 1 for ids in training)
    needed = batch * length
    if total < needed or not sum(map(len, unseen)):
        raise InputError(
            f"{source}: expected at least {needed:,} tokens to train on (a step of {batch} rows of "
            f"{length}), and some to hold out, found {total:,}; give more text, or a smaller batch "
            "or length"
        )
    begins = np.cumsum([0, *map(len, unseen)])[:-1]
    kept = [ids for ids, begin in zip(unseen, begins, strict=True) if begin < HELDOUT_TOKENS]
    return training, kept


def _divided(
    documents: list[np.ndarray], heldout: float
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Divides one document (or none) into its beginning and its end."""
    ids = np.concatenate([np.empty(0, np.int32), *documents])
    cut = len(ids) - max(1, round(heldout * len(ids)))
    return [ids[:cut]], [ids[cut:][:HELDOUT_TOKENS]]


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of the texts that have any, int32 each.

    Args:
        tokenizer: A tokenizer of transformers. Text that looks like a special token is encoded as
            text.
        texts: Documents.
    """
    encoded = tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
    )
    return [np.array(ids, dtype=np.int32) for ids in encoded["input_ids"] if len(ids)]


def start_id(tokenizer: Any) -> int:
    """Returns the token that a document begins with: BOS, or EOS if the tokenizer has no BOS.

    Args:
        tokenizer: A tokenizer of transformers.

    Returns:
        The id.

    Raises:
        ConfigError: If the tokenizer has neither.
    """
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ConfigError(
        "tokenizer: expected a BOS or EOS token to begin documents with, found neither"
    )
