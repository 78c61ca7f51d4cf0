"""Tokenizers of the reference model: a byte-level BPE trained on its text, or an existing
tokenizer.json."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ..errors import ConfigError, DataUnavailable, InputError
from ..system.lfs import refuse_pointer

END = "<|endoftext|>"
PAD = "<|pad|>"
_END_NAMES = (END, "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")
_LEAST = 256 + 2  # all bytes, END and PAD
_BATCH = 2**20  # characters that are encoded at a time


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE. The same texts give the same tokenizer.

    Args:
        texts: The texts to train on.
        vocab_size: Number of ids. END is id 0 and PAD id 1.

    Raises:
        ConfigError: The vocabulary cannot hold all bytes.
        InputError: The text is too short to fill the vocabulary.
    """
    if vocab_size < _LEAST:
        raise ConfigError(
            f"vocab_size: expected at least {_LEAST} (all bytes, {END} and {PAD}), "
            f"found {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    size = tokenizer.get_vocab_size()
    if size != vocab_size:
        raise InputError(
            f"texts: expected text for {vocab_size} tokens, found text too short, for {size} only; "
            "give more text or a smaller vocab_size"
        )
    return tokenizer


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Reads a tokenizer.json, as Tokenizer.save writes it.

    Raises:
        DataUnavailable: `path` is not a tokenizer.json.
    """
    if not os.path.isfile(path):
        raise DataUnavailable(f"{os.fspath(path)}: expected a tokenizer.json, found no such file")
    try:
        return Tokenizer.from_file(os.fspath(path))
    except Exception as error:  # the library raises bare Exceptions
        refuse_pointer(path, DataUnavailable)
        raise DataUnavailable(
            f"{os.fspath(path)}: expected a tokenizer.json, found {error}"
        ) from None


def end_id(tokenizer: Tokenizer) -> int:
    """Returns the id of the token that ends a document.

    Raises:
        ConfigError: The tokenizer has no such token under the usual names.
    """
    for name in _END_NAMES:
        token = tokenizer.token_to_id(name)
        if token is not None:
            return token
    raise ConfigError(f"tokenizer: expected one of the end tokens {list(_END_NAMES)}, found none")


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> list[np.ndarray]:
    """Returns the token ids of each text, int32 [tokens].

    No special tokens are added. If a text has the name of one, the name is encoded as plain text.
    """
    return list(encode_each(tokenizer, texts))


def encode_each(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """Gives what `encode` returns one by one. The texts are read in parts, as they are needed."""
    rest = iter(texts)
    while batch := list(_batch(rest)):
        before = tokenizer.encode_special_tokens
        tokenizer.encode_special_tokens = True
        try:
            encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        finally:
            tokenizer.encode_special_tokens = before
        for encoding in encodings:
            yield np.array(encoding.ids, dtype=np.int32)


def _batch(texts: Iterator[str]) -> Iterator[str]:
    """Texts until their characters reach _BATCH: an Encoding takes many times the memory of its
    ids."""
    characters = 0
    while characters < _BATCH and (text := next(texts, None)) is not None:
        characters += len(text) + 1
        yield text
