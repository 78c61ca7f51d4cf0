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
    elif memory.hash.rules.raw_ids:
        vocab = VocabMap.identity(memory.hash.vocab_size)
    if table is not None:
        _check_table(memory, vocab, table)
    return memory


def _check_vocab(spec: HashSpec, raw_size: int | None, vocab: VocabMap) -> None:
    release = spec.rules.released
    name = release.field_names["vocab_size"]
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
    if spec.rules.raw_ids and vocab.digest != VocabMap.identity(spec.vocab_size).digest:
        raise DigestMismatch(
            f"vocabulary map: {release.title} hashes raw ids, expected the identity of "
            f"{spec.vocab_size} ids, found another map"
        )
    if spec.filler_id >= vocab.raw_size or vocab.table[spec.filler_id] < 0:
        raise DigestMismatch(
            f"{release.field_names['filler_id']}: expected an id with a token in the vocabulary map of "
            f"{vocab.raw_size} raw ids, found {spec.filler_id}"
        )


def _check_table(memory: EngramConfig, vocab: VocabMap | None, table: Table) -> None:
    ours, theirs = memory.hash, table.config.hash
    release = ours.rules.released
    names = release.field_names
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
        found.append(
            f"row width d ({release.dim_name}): expected {memory.dim}, found {table.config.dim}"
        )
    if found:
        raise DigestMismatch(f"{table.path}: not the table of this config: {'; '.join(found)}")
    if vocab is not None and table.address_digest != (
        expected := memory.address_digest(vocab.digest)
    ):
        raise DigestMismatch(
            f"{table.path}: made with another vocabulary map of {len(vocab)} ids, so for another "
            f"tokenizer: expected address digest {expected}, found {table.address_digest}"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
