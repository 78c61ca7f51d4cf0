"""Text of a domain for an existing model: documents to adapt to, documents held out, and text that
has nothing to do with either.

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
ICD_LICENCE = (
    "ICD-10-CM of the United States' CMS and NCHS after the WHO's ICD-10 "
    "(PyPI simple-icd-10-cm is MIT)"
)
# Diseases and findings. Chapters 19 to 22 (injuries, external causes, factors that influence
# health) have most of the codes, and repeat the same text for each limb and each encounter.
CHAPTERS = tuple(str(number) for number in range(1, 19))
_LONGEST = len("E11.9")  # codes below that tell left from right
_CODE = re.compile(r"\b[A-Z][0-9][0-9A-Z]")
_PACKED = (".txt.xz",)


@dataclass(frozen=True)
class Entry:
    """A code of the classification.

    Attributes:
        code: Such as "E11.9".
        title: What it stands for.
        terms: Other names of it.
        excludes: Notes on what it does not stand for.
    """

    code: str
    title: str
    terms: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Category:
    """A three-character category.

    Attributes:
        block: Heading of the block that it stands in.
        entries: The category itself, then the codes below it.
    """

    block: str
    entries: tuple[Entry, ...]

    @property
    def code(self) -> str:
        """Three characters."""
        return self.entries[0].code

    def text(self, unnamed: Collection[str] = ()) -> str:
        """The document.

        Args:
            unnamed: Codes of categories. Notes that name one of them are left out.
        """
        lines = [f"Block: {self.block}"]
        for entry in self.entries:
            lines.append(f"{entry.code} {entry.title}")
            for heading, notes in (("Includes", entry.terms), ("Excludes", entry.excludes)):
                kept = [note for note in notes if not _names(note, unnamed)]
                if kept:
                    lines.append(f"{heading}: {'; '.join(kept)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Domain:
    """Documents of a domain.

    Attributes:
        training: Documents to train on.
        heldout: Documents held out.
        about: Source, licence and, for each part, what `describe` returns.
    """

    training: list[str]
    heldout: list[str]
    about: dict[str, Any]


def medical(heldout: float = 0.1, seed: int = 0) -> Domain:
    """Diseases of the ICD-10-CM, one document a category, in the order of the classification.

    No training document names the code of a held-out category: notes that name one are left out.

    Args:
        heldout: Share of the categories that is held out.
        seed: Seed of the split.

    Raises:
        DataUnavailable: The package is not installed.
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
    """The categories behind `medical`: those to train on, and those held out.

    Args:
        heldout: As in `medical`.
        seed: As in `medical`.

    Raises:
        DataUnavailable: The package is not installed.
    """
    categories = _icd()
    training, _ = split_documents([category.code for category in categories], heldout, seed)
    seen = set(training)
    return (
        [category for category in categories if category.code in seen],
        [category for category in categories if category.code not in seen],
    )


def general(
    path: str | Path, characters: int = 90_000, passage: int = 1_000, seed: int = 0
) -> list[str]:
    """Passages of text that a model did not train on.

    Passages are taken in the order of their seeded hash until they have enough characters, and
    returned in the order of the text. So the same text gives the same passages on every machine.

    Args:
        path: A .txt, .md or .txt.xz file or a folder of them, with a form feed between documents.
        characters: Smallest total. 90,000 characters of English are about 20,000 tokens.
        passage: Smallest number of characters in a passage. A passage is whole paragraphs.
        seed: Seed of the hash.

    Raises:
        ConfigError: characters or passage is below 1.
        DataUnavailable: There is no such path, or it cannot be read.
        InputError: The text is too short.
    """
    if characters < 1 or passage < 1:
        raise ConfigError(
            f"characters, passage: expected at least 1 each, found {characters} and {passage}"
        )
    passages: list[str] = []
    for document in _texts(Path(path)):
        passages += _passages(document, passage)
    taken: set[int] = set()
    total = 0
    for index in sorted(range(len(passages)), key=lambda index: hashed(seed, passages[index])):
        if total >= characters:
            break
        taken.add(index)
        total += len(passages[index])
    if total < characters:
        raise InputError(
            f"{path}: expected passages with {characters} characters in all, found {total}"
        )
    return [text for index, text in enumerate(passages) if index in taken]


def describe(texts: Sequence[str]) -> dict[str, Any]:
    """Returns the number of documents and of characters, and the SHA-256 of the texts.

    A zero byte after each text is hashed too.
    """
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return {
        "documents": len(texts),
        "characters": sum(map(len, texts)),
        "sha256": digest.hexdigest(),
    }


def hashed(seed: int, key: str) -> bytes:
    """A key to shuffle by. It is the same on every machine and in every version of Python."""
    return hashlib.sha256(f"{seed}:{key}".encode()).digest()


def package(name: str, module: str) -> Any:
    """Imports a module of an optional package.

    Args:
        name: Name of the package.
        module: Name of the module.

    Raises:
        DataUnavailable: The package is not installed. The message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataUnavailable(
            f"expected the package {name}, which is not installed; pip install {name}"
        ) from None


def _domain(name: str, licence: str, training: list[str], heldout: list[str]) -> Domain:
    about = {
        "source": name,
        "licence": licence,
        "training": describe(training),
        "heldout": describe(heldout),
    }
    return Domain(training, heldout, about)


def _names(note: str, codes: Collection[str]) -> bool:
    """Whether a note names one of the categories."""
    return any(code in codes for code in _CODE.findall(note))


@cache
def _icd() -> tuple[Category, ...]:
    """All categories of CHAPTERS, in the order of the classification."""
    icd = package(ICD, "simple_icd_10_cm")
    categories = []
    for chapter in CHAPTERS:
        for block in icd.get_children(chapter):
            codes = _below(icd, block, longest=3)
            categories += [_category(icd, code) for code in codes if icd.is_category(code)]
    return tuple(categories)


def _category(icd: Any, code: str) -> Category:
    heading = icd.get_description(icd.get_parent(code), prioritize_blocks=True)
    block = re.sub(r" \([^()]*\)$", "", heading)
    return Category(block, tuple(_entry(icd, part) for part in _below(icd, code, _LONGEST)))


def _entry(icd: Any, code: str) -> Entry:
    return Entry(
        code,
        icd.get_description(code),
        (*icd.get_includes(code), *icd.get_inclusion_term(code)),
        (*icd.get_excludes1(code), *icd.get_excludes2(code)),
    )


def _below(icd: Any, code: str, longest: int) -> Iterator[str]:
    """A code and all below it: blocks, and codes of up to `longest` characters."""
    yield code
    for child in icd.get_children(code):
        if icd.is_block(child) or len(child) <= longest:
            yield from _below(icd, child, longest)


def _texts(path: Path) -> list[str]:
    """Documents of a file or folder, packed ones too."""
    files = [path]
    if path.is_dir():
        suffixes = (".txt", ".md", *_PACKED)
        files = sorted(file for file in path.rglob("*") if file.name.endswith(suffixes))
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
    """Whole paragraphs, joined until they have `least` characters. The rest is left out."""
    kept: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        kept.append(paragraph.strip())
        if sum(map(len, kept)) >= least:
            yield "\n\n".join(kept)
            kept = []
