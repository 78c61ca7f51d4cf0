"""Domains: what is held out is never named in training, passages are the same anywhere, missing
data is said."""

from __future__ import annotations

import hashlib
import lzma
import re
import sys
from importlib import metadata

import pytest

from engraphy.data import domains
from engraphy.data.domains import describe, general, medical, medical_categories
from engraphy.errors import ConfigError, DataUnavailable, InputError

# A classification of 22 chapters, each with one block that holds a block of six categories and one
# category with the block's own name; every disease is told from its neighbour.
CLASSIFICATION = """
def get_children(code):
    if code.isdigit():
        letter = chr(64 + int(code))
        return [f"{letter}00-{letter}09", f"{letter}9A"]
    if "-" in code:
        return [f"{code[0]}0{number}" for number in range(6)]
    if len(code) == 3:
        return [f"{code}.{number}" for number in (0, 1)]
    return [f"{code}1"] if len(code) == 5 else []

def is_block(code):
    return "-" in code or code.endswith("9A")

def is_category(code):
    return len(code) == 3

def get_parent(code):
    return f"{code[0]}00-{code[0]}09" if code[1] == "0" else code

def get_description(code, prioritize_blocks=False):
    if "-" in code or prioritize_blocks:
        return f"Diseases of {code[0]} (of a kind) ({code})"
    return f"Fever {code}"

def get_includes(code):
    return [f"heat of {code}"] if len(code) == 3 else []

def get_inclusion_term(code):
    return [f"Chill {code}", f"Ague {code}"] if len(code) == 5 else []

def get_excludes1(code):
    return [f"other fevers ({code[0]}0{number}.-)" for number in range(6)] if len(code) == 3 else []

def get_excludes2(code):
    return ["cold (Z99)"] if len(code) == 3 else []
"""


@pytest.fixture
def classification(tmp_path, monkeypatch):
    """An installed package with the interface of simple-icd-10-cm."""
    (tmp_path / "simple_icd_10_cm.py").write_text(CLASSIFICATION)
    (tmp_path / "simple_icd_10_cm-9.dist-info").mkdir()
    (tmp_path / "simple_icd_10_cm-9.dist-info" / "METADATA").write_text(
        "Name: simple-icd-10-cm\nVersion: 9\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "simple_icd_10_cm", raising=False)
    domains._icd.cache_clear()
    yield
    sys.modules.pop("simple_icd_10_cm", None)
    domains._icd.cache_clear()


def test_a_document_is_a_category_with_its_codes_and_names(classification):
    training, heldout = medical_categories()
    category = next(category for category in [*training, *heldout] if category.code == "C03")
    assert category.text().splitlines() == [
        "Block: Diseases of C (of a kind)",
        "C03 Fever C03",
        "Includes: heat of C03",
        "Excludes: "
        + "; ".join(f"other fevers (C0{number}.-)" for number in range(6))
        + "; cold (Z99)",
        "C03.0 Fever C03.0",
        "Includes: Chill C03.0; Ague C03.0",
        "C03.1 Fever C03.1",
        "Includes: Chill C03.1; Ague C03.1",
    ]


def test_every_disease_is_in_one_document_in_the_order_of_the_classification(classification):
    training, heldout = medical_categories(heldout=0.2, seed=3)
    codes = [[category.code for category in part] for part in (training, heldout)]
    expected = [
        f"{chr(64 + chapter)}{number}"
        for chapter in range(1, 19)
        for number in ("00", "01", "02", "03", "04", "05", "9A")
    ]
    assert sorted(codes[0] + codes[1]) == expected and len(codes[1]) == round(0.2 * len(expected))
    assert codes == [sorted(part) for part in codes]


def test_no_training_document_names_a_heldout_category(classification):
    domain = medical(heldout=0.2)
    codes = {re.findall(r"^([A-Z]\w\w) ", text, re.MULTILINE)[0] for text in domain.heldout}
    assert not [code for code in codes for text in domain.training if code in text]
    assert all(
        "Excludes: " in text for text in domain.training
    )  # only the notes in question are gone
    assert any(code in text for code in codes for text in domain.heldout)


def test_the_seed_alone_decides_what_is_held_out(classification):
    assert medical() == medical() and medical(seed=1).heldout != medical().heldout


def test_a_domain_tells_source_counts_and_digest(classification):
    domain = medical()
    assert (
        domain.about["source"] == "ICD-10-CM (simple-icd-10-cm 9)"
        and "ICD-10" in domain.about["licence"]
    )
    for part in ("training", "heldout"):
        texts = getattr(domain, part)
        assert domain.about[part] == describe(texts)
        assert domain.about[part]["documents"] == len(texts)
        assert domain.about[part]["characters"] == sum(len(text) for text in texts)


def test_the_digest_tells_texts_and_their_bounds_apart():
    assert (
        describe(["a", "bc"])["sha256"]
        == hashlib.sha256(b"a\0bc\0").hexdigest()
        != describe(["ab", "c"])["sha256"]
    )


def test_a_missing_package_names_the_command_to_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "simple_icd_10_cm", None)
    domains._icd.cache_clear()
    with pytest.raises(DataUnavailable, match="pip install simple-icd-10-cm"):
        medical()


def _version() -> str | None:
    try:
        return metadata.version("simple-icd-10-cm")
    except metadata.PackageNotFoundError:
        return None


@pytest.mark.slow
@pytest.mark.skipif(_version() != "1.5.0", reason="simple-icd-10-cm 1.5.0 not installed")
def test_the_real_classification_gives_the_known_documents():
    domains._icd.cache_clear()
    domain = medical()
    assert domain.about["training"] == {
        "documents": 1244,
        "characters": 813326,
        "sha256": "025afc94cf557698c508f6f19e4b1f0241f8c927cd92d7addb6697de8d5cfb0c",
    }
    assert domain.about["heldout"] == {
        "documents": 138,
        "characters": 89644,
        "sha256": "45a2930839b92ea9b93a58916cdec8248944e9d7e7ab8dd69538b906d70bfe98",
    }


@pytest.fixture
def books():
    """Three books of paragraphs, each paragraph with a text of its own."""
    return [
        "\n\n".join(f"Book {book}, paragraph {number}: " + "word " * 8 for number in range(40))
        for book in range(3)
    ]


def test_packed_text_a_file_and_a_folder_give_the_same_passages(books, tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    for number, book in enumerate(books):
        (folder / f"{number}.txt").write_text(book)
    (tmp_path / "all.txt").write_text("\f".join(books))
    (tmp_path / "all.txt.xz").write_bytes(lzma.compress("\f".join(books).encode()))
    (folder / "2.txt").unlink()
    (folder / "2.txt.xz").write_bytes(lzma.compress(books[2].encode("utf-8-sig")))
    found = [
        general(path, 2000, 200) for path in (tmp_path / "all.txt", tmp_path / "all.txt.xz", folder)
    ]
    assert found[0] == found[1] == found[2]


def test_passages_are_whole_paragraphs_in_order_and_as_many_as_asked(books, tmp_path):
    path = tmp_path / "all.txt"
    path.write_text("\f".join(books))
    found = general(path, 2000, 200)
    assert 2000 <= sum(map(len, found)) < 2000 + max(map(len, found))
    whole = [paragraph.strip() for book in books for paragraph in book.split("\n\n")]
    for passage in found:
        paragraphs = passage.split("\n\n")
        assert len(passage) >= 200 and set(paragraphs) <= set(whole)
        assert len({paragraph.split(",")[0] for paragraph in paragraphs}) == 1  # of one book
    firsts = [whole.index(passage.split("\n\n")[0]) for passage in found]
    assert firsts == sorted(firsts) and len(set(firsts)) == len(firsts)


def test_another_seed_takes_other_passages(books, tmp_path):
    path = tmp_path / "all.txt"
    path.write_text("\f".join(books))
    assert general(path, 2000, 200) == general(path, 2000, 200) != general(path, 2000, 200, seed=1)


def test_text_that_cannot_be_had_is_an_error(books, tmp_path):
    path = tmp_path / "all.txt"
    path.write_text(books[0])
    with pytest.raises(InputError, match="expected passages with 90000 characters in all, found 2"):
        general(path)
    with pytest.raises(ConfigError, match="at least 1 each, found 0"):
        general(path, 0)
    with pytest.raises(DataUnavailable, match="no such path"):
        general(tmp_path / "nothing.txt")
    with pytest.raises(DataUnavailable, match="packed by xz, found .*No such file"):
        general(tmp_path / "nothing.txt.xz")
    (tmp_path / "bad.txt.xz").write_bytes(b"plain")
    with pytest.raises(DataUnavailable, match="UTF-8 text packed by xz"):
        general(tmp_path / "bad.txt.xz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="found 0"):
        general(tmp_path / "empty", 10)
