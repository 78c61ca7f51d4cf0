"""What `engraphy table stat --ngrams` looks at and prints: frequent n-grams that share rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from tokenizers import Tokenizer

from ..addresses.addresser import Addresser
from ..addresses.ngrams import Ngrams
from ..addresses.tokenizers import load_map, load_tokenizer
from ..addresses.vocab import VocabMap
from ..errors import ConfigError
from ..released.checkpoint import Checkpoint
from ..released.rows import is_release
from ..spec.config import EngramConfig
from ..table.sharing import OrderSharing, SharedRow, shared_rows
from ..table.table import Table
from ..table.usage import find_vocab
from .terminal import grid, progress


def find_sharing(
    path: Path, counts: Path, top: int | None, vocab: Path | None, tokenizer: Path | None
) -> tuple[list[OrderSharing], Wording]:
    """The n-grams of a file that share rows in a layout, and how to write them as text.

    Args:
        path: A table, a checkpoint, a GGUF file, or a model's config.json.
        counts: The n-grams, as `engraphy data ngrams` writes them.
        top: Only so many of each order.
        vocab: A saved vocabulary map.
        tokenizer: A tokenizer.json; by default that of a checkpoint's folder, if it has one.
    """
    beside = path.parent if path.is_file() else path
    if tokenizer is None and (beside / "tokenizer.json").exists():
        tokenizer = beside / "tokenizer.json"
    model_tokenizer = None if tokenizer is None else load_tokenizer(tokenizer)
    addresser = _layout(path, vocab, model_tokenizer)
    ngrams = Ngrams.load(counts)
    with progress() as report:
        found = shared_rows(addresser, ngrams if top is None else ngrams.top(top), progress=report)
    return found, Wording(addresser.vocab, model_tokenizer)


def is_config(path: Path) -> bool:
    """Whether a path is a model's config.json, which says a layout and has no rows."""
    return path.name == "config.json" and path.is_file()


class Wording:
    """N-grams as text; as compressed ids if there is no tokenizer."""

    def __init__(self, vocab: VocabMap, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        # Of the raw ids that share a compressed id, the first one stands for all.
        self._raw_V = np.zeros(len(vocab), dtype=np.int64)
        alive = np.flatnonzero(vocab.table >= 0)[::-1]
        self._raw_V[vocab.table[alive]] = alive

    def of(self, ids: tuple[int, ...]) -> str:
        if self._tokenizer is None:
            return " ".join(map(str, ids))
        raw = self._raw_V[list(ids)].tolist()
        return repr(self._tokenizer.decode(raw, skip_special_tokens=False))


def print_sharing(found: list[OrderSharing], wording: Wording) -> None:
    """Prints a table for each order and layer, and its examples."""
    for part in found:
        count = max(1, part.ngrams)
        Console().print(
            f"\nlayer {part.layer}, order {part.order}: {part.ngrams:,} n-grams, "
            f"{1 - part.in_heads[0] / count:.2%} share a row in a head or more, "
            f"{part.in_heads[-1] / count:.2%} in all {len(part.heads)}",
            soft_wrap=True,
            highlight=False,
        )
        grid(
            {
                "head": [head.head for head in part.heads],
                "rows used": [head.used for head in part.heads],
                "of": [head.rows for head in part.heads],
                "share a row": [f"{head.sharing / count:.2%}" for head in part.heads],
                "by chance": [f"{head.expected / count:.2%}" for head in part.heads],
                "of the reads": [f"{head.reads:.2%}" for head in part.heads],
                "most on a row": [head.most for head in part.heads],
            }
        )
        for row in part.examples:
            Console().print(_line(row, wording), soft_wrap=True, highlight=False, markup=False)


def _line(row: SharedRow, wording: Wording) -> str:
    named = [f"{wording.of(ngram.ids)} ({ngram.count:,})" for ngram in row.ngrams]
    more = row.total - len(named)
    also = f" and {more:,} more" if more else ""
    return f"head {row.head}, row {row.row:,}: " + ", ".join(named) + also


def _layout(path: Path, saved: Path | None, tokenizer: Tokenizer | None) -> Addresser:
    if is_config(path):
        return _of_config(path, saved, tokenizer)
    if is_release(path):
        checkpoint = Checkpoint.open(path)
        return Addresser(checkpoint.config.hash, checkpoint.vocab(saved))
    table = Table.open(path)
    vocab = find_vocab(table, saved, tokenizer)
    return Addresser(table.config.hash, vocab, table.hot)


def _of_config(path: Path, saved: Path | None, tokenizer: Tokenizer | None) -> Addresser:
    """The layout of a release without its files."""
    try:
        data: Any = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected JSON, found something else ({error})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected an object, found {type(data).__name__}")
    spec = EngramConfig.from_hf(data).hash
    if saved is not None:
        vocab = load_map(saved)
    elif spec.rules.raw_ids:
        vocab = VocabMap.identity(spec.vocab_size)
    elif tokenizer is not None:
        vocab = VocabMap.from_tokenizer(tokenizer)
    else:
        raise ConfigError(f"{path}: expected --tokenizer or --vocab with it, found neither")
    return Addresser(spec, vocab)
