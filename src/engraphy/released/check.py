"""Checks that a released model's config, its vocabulary map and a table belong together.

If they do not, the error names each field that differs.
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
    """Compares the memory that a released model's config describes with its vocabulary and table.

    Args:
        config: The model's config, an object or a dict.
        vocab: The map of the model's tokenizer. If it is None and the release hashes raw ids
            (Qwen4-Exp), the table is expected to have the identity map. If it is None otherwise, no
            vocabulary is compared.
        table: A table on disk; None = compare no table.

    Returns:
        The memory.

    Raises:
        ConfigError: The config contradicts itself (`EngramConfig.from_hf`).
        DigestMismatch: Something differs; the message names the fields, each with the expected
            value and the one found.
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
            f"{name}: expected {spec.vocab_size} ids, as in the config, found {len(vocab)} in the "
            "vocabulary map: it belongs to another tokenizer"
        )
    if raw_size is not None and vocab.raw_size != raw_size:
        raise DigestMismatch(
            f"vocab_size: expected {raw_size} raw ids, as in the config, found {vocab.raw_size} in "
            f"the vocabulary map: make it with raw_size={raw_size}, or from another tokenizer"
        )
    if spec.rules.raw_ids and vocab.digest != VocabMap.identity(spec.vocab_size).digest:
        raise DigestMismatch(
            f"vocabulary map: expected the identity of {spec.vocab_size} ids, since "
            f"{release.title} hashes raw ids, found another map"
        )
    if spec.filler_id >= vocab.raw_size or vocab.table[spec.filler_id] < 0:
        filler = release.field_names["filler_id"]
        raise DigestMismatch(
            f"{filler}: expected an id with a token in the vocabulary map of "
            f"{vocab.raw_size} raw ids, found {spec.filler_id}"
        )


def _check_table(memory: EngramConfig, vocab: VocabMap | None, table: Table) -> None:
    release = memory.hash.rules.released
    names = release.field_names
    differences: list[str] = []
    for field in dataclasses.fields(HashSpec):
        expected = getattr(memory.hash, field.name)
        value = getattr(table.config.hash, field.name)
        if expected != value:
            title = field.name
            config_name = names.get(field.name, field.name)
            if config_name != field.name:
                title += f" ({config_name})"
            differences.append(f"{title}: expected {_plain(expected)}, found {_plain(value)}")
    if memory.dim != table.config.dim:
        differences.append(
            f"row width d ({release.dim_name}): expected {memory.dim}, found {table.config.dim}"
        )
    if differences:
        listed = "; ".join(differences)
        raise DigestMismatch(f"{table.path}: expected the table of this config; {listed}")
    if vocab is None:
        return
    expected = memory.address_digest(vocab.digest)
    if table.address_digest != expected:
        raise DigestMismatch(
            f"{table.path}: expected address digest {expected}, found {table.address_digest}: the "
            f"table was made with another vocabulary map of {len(vocab)} ids, for another tokenizer"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
