"""Books: the same texts whatever the files look like, and whatever else lies beside them; what is
missing is named."""

from __future__ import annotations

import hashlib
import lzma

import pytest
from typer.testing import CliRunner

from engraphy.cli.app import app
from engraphy.data import books
from engraphy.data.books import Listed, listed, normalised, read_books, stream_books
from engraphy.data.corpus import CorpusConfig, prepare
from engraphy.data.documents import load_documents
from engraphy.errors import DataUnavailable, InputError

TEXTS = {
    title: f"# Title: {title}\n\n## Author: Some One\n\nIt was {title}.\n\fNo line of its own."
    for title in ("The Sea", "Café", "Last Words")
}
SPLITS = {"The Sea": "train", "Café": "heldout", "Last Words": "train"}


@pytest.fixture(autouse=True)
def small_list(monkeypatch):
    """A list of three books in place of the real one."""
    books_listed = tuple(
        Listed(hashlib.sha256(text.encode()).hexdigest(), SPLITS[title], title)
        for title, text in TEXTS.items()
    )
    monkeypatch.setattr(books, "listed", lambda: books_listed)


@pytest.fixture
def packed(tmp_path):
    text = "\n\f\n".join(TEXTS.values())
    (tmp_path / "all.txt.xz").write_bytes(lzma.compress(text.encode()))
    return tmp_path


def check(found: books.Books) -> None:
    assert found.train == (TEXTS["The Sea"], TEXTS["Last Words"])
    assert found.heldout == (TEXTS["Café"],)
    assert not found.missing


def test_form_feed_lines_divide_a_packed_file(packed):
    check(read_books(packed))


def test_markdown_files_are_found_at_any_depth_and_given_in_the_order_of_the_list(tmp_path):
    for depth, (title, text) in enumerate(reversed(TEXTS.items())):
        folder = tmp_path.joinpath(*"abc"[:depth])
        folder.mkdir(exist_ok=True)
        (folder / f"{title}.md").write_text(text, encoding="utf-8")
    check(read_books(tmp_path))


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_line_ends_outer_white_space_and_a_byte_order_mark_change_no_digest(tmp_path, end):
    sea, café, last = (text.replace("\n", end).encode() for text in TEXTS.values())
    divider = f"{end}{end}\f{end} ".encode()
    (tmp_path / "two.txt.xz").write_bytes(lzma.compress(sea + divider + café + divider))
    (tmp_path / "last.md").write_bytes(b"\xef\xbb\xbf" + b" \t" + last + end.encode() * 3)
    found = read_books(tmp_path)
    check(found)
    assert not found.foreign


def test_white_space_within_a_text_counts():
    assert normalised(" a \r\n\r\nb\t\n") == "a \n\nb"


def test_missing_books_are_named_and_partial_goes_on(tmp_path):
    (tmp_path / "sea.md").write_text(TEXTS["The Sea"])
    (tmp_path / "changed.md").write_text(TEXTS["Last Words"] + " A line more.")
    message = r"expected 3 books .* found 1; missing: Café, Last Words \(with another text\)"
    with pytest.raises(DataUnavailable, match=message):
        read_books(tmp_path)
    found = read_books(tmp_path, partial=True)
    assert (found.train, found.heldout) == ((TEXTS["The Sea"],), ())
    assert found.missing == ("Café", "Last Words")


def test_what_is_not_listed_is_named_and_not_in_the_texts(packed):
    (packed / "README.md").write_text("Read me.")
    (packed / "notes.txt").write_text("Not looked at.")
    (packed / "more.txt.xz").write_bytes(lzma.compress(b"# Title: New\n\ntext\n\f\n\n\f\nOther"))
    found = read_books(packed)
    check(found)
    assert set(found.foreign) == {
        "README.md",
        "more.txt.xz: # Title: New",
        "more.txt.xz: Other",
    }


def test_a_book_that_lies_there_twice_is_read_once(packed):
    (packed / "again.md").write_text(TEXTS["The Sea"])
    check(read_books(packed))


def test_streamed_books_come_once_each_in_the_order_of_the_folder(packed):
    (packed / "again.md").write_text(TEXTS["The Sea"])
    (packed / "README.md").write_text("Read me.")
    found = [(book.title, text) for book, text in stream_books(packed)]
    assert found == list(TEXTS.items())


def test_streamed_books_that_are_missing_are_named_after_the_last_one(tmp_path):
    (tmp_path / "sea.md").write_text(TEXTS["The Sea"])
    stream = stream_books(tmp_path)
    assert next(stream)[1] == TEXTS["The Sea"]
    with pytest.raises(DataUnavailable, match="missing: Café, Last Words"):
        next(stream)


def test_a_folder_that_cannot_be_read_is_said(tmp_path):
    with pytest.raises(DataUnavailable, match="no such folder"):
        read_books(tmp_path / "nowhere")
    (tmp_path / "a.txt.xz").write_bytes(b"not packed")
    with pytest.raises(DataUnavailable, match="packed by xz"):
        read_books(tmp_path)
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"a text cut off" * 99)[:-20])
    with pytest.raises(DataUnavailable, match="packed by xz"):
        read_books(tmp_path)
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress("é".encode("latin-1")))
    with pytest.raises(InputError, match=r"a\.txt\.xz.*UTF-8"):
        read_books(tmp_path)


def test_books_are_a_source_of_documents_with_their_own_split(packed):
    documents = load_documents(f"books:{packed}")
    assert documents.texts == (TEXTS["The Sea"], TEXTS["Last Words"], TEXTS["Café"])
    training, heldout = documents.split(heldout=0.9, seed=5)
    assert (training, heldout) == ([TEXTS["The Sea"], TEXTS["Last Words"]], [TEXTS["Café"]])
    assert "public domain" in documents.licence


def test_a_corpus_of_books_holds_out_the_books_that_the_list_holds_out(packed):
    corpus = prepare(CorpusConfig(data=f"books:{packed}", vocab_size=270))
    decoded = [corpus.tokenizer.decode(ids.tolist()) for ids in corpus.heldout]
    assert decoded == [TEXTS["Café"]] and len(corpus.training) == 2


def test_the_command_counts_books_names_the_others_and_fails_if_one_is_missing(packed):
    (packed / "README.md").write_text("Read me.")
    done = CliRunner().invoke(app, ["data", "books", str(packed)])
    assert done.exit_code == 0
    assert "train: 2 books" in done.stdout and "heldout: 1 books" in done.stdout
    assert "not listed, left out: README.md" in done.stderr
    (packed / "all.txt.xz").write_bytes(lzma.compress(TEXTS["Café"].encode()))
    done = CliRunner().invoke(app, ["data", "books", str(packed)])
    assert done.exit_code == 1 and "missing: The Sea, Last Words" in done.stderr
    done = CliRunner().invoke(app, ["data", "books", str(packed), "--partial"])
    assert done.exit_code == 0 and "missing: The Sea, Last Words" in done.stderr


def test_a_long_list_of_names_is_cut():
    assert books.some([str(i) for i in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"


def test_the_real_list_has_274_books_with_digests_and_titles_of_their_own():
    real = listed()
    assert len(real) == len({book.digest for book in real}) == 274
    assert len({book.title for book in real}) == 274 and all(book.title for book in real)
    splits = [book.split for book in real]
    assert splits.count("train") == 254 and splits.count("heldout") == 20
    assert all(len(bytes.fromhex(book.digest)) == 32 for book in real)
