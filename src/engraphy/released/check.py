"""Whether a released model's config, its vocabulary map and a table belong together; if not, which
number differs."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..addresses.vocab import VocabMap
from ..errors import DigestMismatch
from ..spec.config import EngramConfig
from ..spec.hash import HashSpec
from ..spec.model_config import config_fields
from ..table.table import Table

# Field of HashSpec -> what it is called in a config of Qwen4-Exp and of DeepSeek-V4.1; a release
# fixes the rest.
_QWEN = {
    "layer_ids": "ple_layer_ids, counted from 0",
    "orders": "ngram_size",
    "heads": "heads_per_ngram",
    "rows_per_head": "ngram_vocab_size_base",
    "vocab_size": "vocab_size",
    "filler_id": "eos_token_id",
    "seed": "seed",
    "pad_to": "make_ngram_vocab_size_divisible_by",
}
_DEEPSEEK = {
    "layer_ids": "engram_layer_ids",
    "orders": "engram_max_ngram_size",
    "heads": "engram_n_heads",
    "rows_per_head": "engram_vocab_size",
    "vocab_size": "engram_compressed_vocab_size",
    "filler_id": "engram_pad_token_id",
}


def check_config(
    config: Any, vocab: VocabMap | None = None, table: Table | None = None
) -> EngramConfig:
    """The memory that a released model's config (object or dict) describes, compared with what it
    is used with.

    vocab: the map of the model's tokenizer; for Qwen4-Exp, which hashes raw ids, the identity is
    meant where none is given. table: a table on disk. Raises ConfigError for a config that
    contradicts itself (`EngramConfig.from_hf`), DigestMismatch naming every field that differs,
    with what was expected and what was found.
    """
    memory = EngramConfig.from_hf(config)
    if vocab is not None:
        _check_vocab(memory.hash, config_fields(config).get("vocab_size"), vocab)
    elif memory.hash.dialect == "qwen4":
        vocab = VocabMap.identity(memory.hash.vocab_size)
    if table is not None:
        _check_table(memory, vocab, table)
    return memory


def _check_vocab(spec: HashSpec, raw_size: int | None, vocab: VocabMap) -> None:
    name = _names(spec)["vocab_size"]
    if len(vocab) != spec.vocab_size:
        raise DigestMismatch(
            f"{name}: the config says {spec.vocab_size}, the vocabulary map has {len(vocab)} ids: "
            "another tokenizer"
        )
    if raw_size is not None and vocab.raw_size != raw_size:
        raise DigestMismatch(
            f"vocab_size: the config says {raw_size}, the vocabulary map takes {vocab.raw_size} raw "
            f"ids: make it with raw_size={raw_size}, or of another tokenizer"
        )
    if spec.dialect == "qwen4" and vocab.digest != VocabMap.identity(spec.vocab_size).digest:
        raise DigestMismatch(
            f"vocabulary map: Qwen4-Exp hashes raw ids, expected the identity of {spec.vocab_size} "
            "ids, found another map"
        )
    if spec.filler_id >= vocab.raw_size or vocab.table[spec.filler_id] < 0:
        raise DigestMismatch(
            f"{_names(spec)['filler_id']}: expected an id with a token in the vocabulary map of "
            f"{vocab.raw_size} raw ids, found {spec.filler_id}"
        )


def _check_table(memory: EngramConfig, vocab: VocabMap | None, table: Table) -> None:
    ours, theirs, names = memory.hash, table.config.hash, _names(memory.hash)
    found = []
    for field in dataclasses.fields(HashSpec):
        expected, value = getattr(ours, field.name), getattr(theirs, field.name)
        if expected != value:
            called = (
                f" ({names[field.name]})" if names.get(field.name, field.name) != field.name else ""
            )
            found.append(
                f"{field.name}{called}: expected {_plain(expected)}, found {_plain(value)}"
            )
    if memory.dim != table.config.dim:
        width = "ple_embed_dim over the columns" if ours.dialect == "qwen4" else "engram_head_dim"
        found.append(f"row width d ({width}): expected {memory.dim}, found {table.config.dim}")
    if found:
        raise DigestMismatch(f"{table.path}: not the table of this config: {'; '.join(found)}")
    if vocab is not None and table.address_digest != (
        expected := memory.address_digest(vocab.digest)
    ):
        raise DigestMismatch(
            f"{table.path}: made with another vocabulary map of {len(vocab)} ids, so for another "
            f"tokenizer: expected address digest {expected}, found {table.address_digest}"
        )


def _names(spec: HashSpec) -> dict[str, str]:
    return _QWEN if spec.dialect == "qwen4" else _DEEPSEEK


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
