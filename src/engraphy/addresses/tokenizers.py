"""Tokenizers and saved vocabulary maps, by path, or an error that says what lies there instead."""

from __future__ import annotations

import os

from tokenizers import Tokenizer

from ..errors import ConfigError
from ..system.lfs import refuse_pointer
from .vocab import VocabMap


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a tokenizer.json. Raises ConfigError if the file is something else."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises no narrower class
        refuse_pointer(path, ConfigError)
        raise ConfigError(
            f"{path}: expected a tokenizer.json, found something else ({error})"
        ) from None


def load_map(path: str | os.PathLike[str]) -> VocabMap:
    """A saved vocabulary map.

    Raises ConfigError if there is no file, and what `VocabMap.load` raises.
    """
    try:
        return VocabMap.load(path)
    except OSError as error:
        raise ConfigError(f"{path}: expected a saved vocabulary map, found {error}") from None
