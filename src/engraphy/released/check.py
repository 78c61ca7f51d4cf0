"""Whether a released model's config, its vocabulary map and a table belong together.

If not, the error names the number that differs.
"""

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
    """The memory that a released model's config describes, compared with what it is used with.

    Args:
        config: The model's config, an object or a dict.
        vocab: The map of the model's tokenizer. Without it, the identity is compared if the release
            hashes raw ids (Qwen4-Exp), else nothing.
        table: A table on disk.

    Returns:
        The memory.

    Raises:
        ConfigError: The config contradicts itself (`EngramConfig.from_hf`).
        DigestMismatch: Something differs; the message names every field with what was expected and
            what was found.
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
            f"vocab_size: the config says {raw_size}, the vocabulary map takes {vocab.raw_size} "
            f"raw ids: make it with raw_size={raw_size}, or of another tokenizer"
        )
    if spec.rules.raw_ids and vocab.digest != VocabMap.identity(spec.vocab_size).digest:
        raise DigestMismatch(
            f"vocabulary map: {release.title} hashes raw ids, expected the identity of "
            f"{spec.vocab_size} ids, found another map"
        )
    if spec.filler_id >= vocab.raw_size or vocab.table[spec.filler_id] < 0:
        filler = release.field_names["filler_id"]
        raise DigestMismatch(
            f"{filler}: expected an id with a token in the vocabulary map of "
            f"{vocab.raw_size} raw ids, found {spec.filler_id}"
        )


def _check_table(memory: EngramConfig, vocab: VocabMap | None, table: Table) -> None:
    ours, theirs = memory.hash, table.config.hash
    release = ours.rules.released
    names = release.field_names
    differences: list[str] = []
    for field in dataclasses.fields(HashSpec):
        expected, value = getattr(ours, field.name), getattr(theirs, field.name)
        if expected != value:
            called = names.get(field.name, field.name)
            also = "" if called == field.name else f" ({called})"
            differences.append(
                f"{field.name}{also}: expected {_plain(expected)}, found {_plain(value)}"
            )
    if memory.dim != table.config.dim:
        differences.append(
            f"row width d ({release.dim_name}): expected {memory.dim}, found {table.config.dim}"
        )
    if differences:
        listed = "; ".join(differences)
        raise DigestMismatch(f"{table.path}: not the table of this config: {listed}")
    if vocab is None:
        return
    expected = memory.address_digest(vocab.digest)
    if table.address_digest != expected:
        raise DigestMismatch(
            f"{table.path}: made with another vocabulary map of {len(vocab)} ids, so for another "
            f"tokenizer: expected address digest {expected}, found {table.address_digest}"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
