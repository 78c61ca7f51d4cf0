"""Text of a domain for a model that exists: documents to adapt to, documents held out, and text
that has nothing to do with either.

The medical domain is the ICD-10-CM, the classification of diseases of the United States' health
statistics: text that a small language model has hardly seen, full of names that repeat. It is read
out of the PyPI package `simple-icd-10-cm`.
"""

from __future__ import annotations

import hashlib
import importlib
import lzma
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataUnavailable, InputError
from .documents import load_documents, split_documents

ICD = "simple-icd-10-cm"
ICD_LICENCE = "ICD-10-CM of the United States' CMS and NCHS after the WHO's ICD-10 (PyPI simple-icd-10-cm is MIT)"
# Diseases and findings. Injuries, external causes and factors influencing health (19 to 22) are
# most of the codes and say the same of each limb and each encounter.
CHAPTERS = tuple(str(number) for number in range(1, 19))
_LONGEST = len("E11.9")  # codes below that tell left from right
_CODE = re.compile(r"\b[A-Z][0-9][0-9A-Z]")
_PACKED = (".txt.xz",)


@dataclass(frozen=True)
class Entry:
    """A code of the classification, what it stands for, and other names of it."""

    code: str
    title: str
    terms: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Category:
    """A three-character category: the heading of the block it stands in, and its entries, itself
    first."""

    block: str
    entries: tuple[Entry, ...]

    @property
    def code(self) -> str:
        """Three characters."""
        return self.entries[0].code

    def text(self, unnamed: Collection[str] = ()) -> str:
        """The document. `unnamed`: codes of categories; notes that name one of them are left out."""
        lines = [f"Block: {self.block}"]
        for entry in self.entries:
            lines.append(f"{entry.code} {entry.title}")
            notes = {"Includes": entry.terms, "Excludes": entry.excludes}
            for heading, given in notes.items():
                kept = [
                    note
                    for note in given
                    if not any(code in unnamed for code in _CODE.findall(note))
                ]
                lines += [f"{heading}: {'; '.join(kept)}"] if kept else []
        return "\n".join(lines)


@dataclass(frozen=True)
class Domain:
    """Documents to train on and documents held out. about: source, licence and, of each part, what
    `describe` tells."""

    training: list[str]
    heldout: list[str]
    about: dict[str, Any]


def medical(heldout: float = 0.1, seed: int = 0) -> Domain:
    """Diseases of the ICD-10-CM, one document a category, in the order of the classification.

    No training document names the code of a held-out category: notes that do are left out of it.
    Raises DataUnavailable where the package is missing.
    """
    training, unseen = medical_categories(heldout, seed)
    codes = {category.code for category in unseen}
    return _domain(
        f"ICD-10-CM ({ICD} {metadata.version(ICD)})",
        ICD_LICENCE,
        [category.text(codes) for category in training],
        [category.text() for category in unseen],
    )


def medical_categories(
    heldout: float = 0.1, seed: int = 0
) -> tuple[list[Category], list[Category]]:
    """The categories behind `medical`: those to train on and those held out."""
    categories = _icd()
    training, _ = split_documents([category.code for category in categories], heldout, seed)
    seen = set(training)
    return (
        [category for category in categories if category.code in seen],
        [category for category in categories if category.code not in seen],
    )


def wikipedia(heldout: float = 0.05, seed: int = 0) -> Domain:
    """The Wikipedia summaries of `lm.load_documents("wiki")`."""
    documents = load_documents("wiki")
    return _domain(
        documents.name, documents.licence, *split_documents(documents.texts, heldout, seed)
    )


def general(
    path: str | Path, characters: int = 90_000, passage: int = 1_000, seed: int = 0
) -> list[str]:
    """Passages of a file or folder of text, for what a model did not train on.

    .txt, .md and .txt.xz, a form feed between documents. A passage is whole paragraphs, at least
    `passage` characters; passages are taken in the order of their seeded hash until they have
    `characters`, and returned in the order of the text, so the same text gives the same passages
    anywhere. 90,000 characters of English are about 20,000 tokens. Raises DataUnavailable for no
    such path, InputError for too little text.
    """
    if characters < 1 or passage < 1:
        raise ConfigError(
            f"expected characters and passage of at least 1, found {characters} and {passage}"
        )
    found = [text for document in _texts(Path(path)) for text in _passages(document, passage)]
    taken, total = set(), 0
    for index in sorted(range(len(found)), key=lambda index: hashed(seed, found[index])):
        if total >= characters:
            break
        taken.add(index)
        total += len(found[index])
    if total < characters:
        raise InputError(
            f"{path}: expected passages with {characters} characters in all, found {total}"
        )
    return [text for index, text in enumerate(found) if index in taken]


def describe(texts: Sequence[str]) -> dict[str, Any]:
    """How many documents and characters, and the SHA-256 of the texts with a zero byte after each."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return {
        "documents": len(texts),
        "characters": sum(map(len, texts)),
        "sha256": digest.hexdigest(),
    }


def hashed(seed: int, key: str) -> bytes:
    """What things are shuffled by: the same on every machine and in every version of Python."""
    return hashlib.sha256(f"{seed}:{key}".encode()).digest()


def package(name: str, module: str) -> Any:
    """An optional package's module. Raises DataUnavailable, with the command that installs it,
    where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataUnavailable(
            f"expected the package {name}, which is not installed; pip install {name}"
        ) from None


def _domain(name: str, licence: str, training: list[str], heldout: list[str]) -> Domain:
    return Domain(
        training,
        heldout,
        {
            "source": name,
            "licence": licence,
            "training": describe(training),
            "heldout": describe(heldout),
        },
    )


@cache
def _icd() -> tuple[Category, ...]:
    icd = package(ICD, "simple_icd_10_cm")
    return tuple(
        _category(icd, code)
        for chapter in CHAPTERS
        for block in icd.get_children(chapter)
        for code in _below(icd, block, longest=3)
        if icd.is_category(code)
    )


def _category(icd: Any, code: str) -> Category:
    block = icd.get_description(icd.get_parent(code), prioritize_blocks=True)
    entries = (
        Entry(
            found,
            icd.get_description(found),
            (*icd.get_includes(found), *icd.get_inclusion_term(found)),
            (*icd.get_excludes1(found), *icd.get_excludes2(found)),
        )
        for found in _below(icd, code, _LONGEST)
    )
    return Category(re.sub(r" \([^()]*\)$", "", block), tuple(entries))


def _below(icd: Any, code: str, longest: int) -> Iterator[str]:
    """A code and those below it, of up to `longest` characters where they are no blocks."""
    yield code
    for child in icd.get_children(code):
        if icd.is_block(child) or len(child) <= longest:
            yield from _below(icd, child, longest)


def _texts(path: Path) -> list[str]:
    """Documents of a file or folder, packed ones too."""
    files = (
        sorted(file for file in path.rglob("*") if file.name.endswith((".txt", ".md", *_PACKED)))
        if path.is_dir()
        else [path]
    )
    texts: list[str] = []
    for file in files:
        if not file.name.endswith(_PACKED):
            texts += load_documents(str(file)).texts
            continue
        try:
            texts += lzma.decompress(file.read_bytes()).decode("utf-8-sig").split("\f")
        except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
            raise DataUnavailable(
                f"{file}: expected UTF-8 text packed by xz, found {error}"
            ) from None
    return texts


def _passages(text: str, least: int) -> Iterator[str]:
    kept: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        kept.append(paragraph.strip())
        if sum(map(len, kept)) >= least:
            yield "\n\n".join(kept)
            kept = []
