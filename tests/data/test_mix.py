"""The mix: shares hold, sides depend on the document alone, nothing depends on the order in which
texts come, and each document keeps the name of its source."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from engraphy.cli.app import app
from engraphy.cli.arguments import with_books
from engraphy.data import books, encoded, mix, stdlib, wiki
from engraphy.data.books import Listed
from engraphy.data.corpus import Corpus, CorpusConfig, prepare
from engraphy.data.documents import load_documents
from engraphy.data.mix import Mix, described, open_mix, require_books
from engraphy.data.sources import Source, SplitText, own_source
from engraphy.errors import ConfigError, DataUnavailable, InputError
from engraphy.eval.losses import heldout_losses

WORDS = "river stone cloud maple engine violet harbor winter candle bridge".split()


def texts(name: str, count: int, words: int = 12) -> list[str]:
    random = np.random.default_rng(len(name) * 1000 + ord(name[0]))
    return [f"{name} {index} {' '.join(random.choice(WORDS, words))}" for index in range(count)]


def source(name: str, *given: SplitText | str) -> Source:
    whole = [text if isinstance(text, SplitText) else SplitText(text) for text in given]
    return Source(name, f"origin of {name}", "a licence", lambda: iter(whole))


def taken(found: Mix) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    sides = (found.training(), found.heldout())
    training, heldout = ([(each.source, each.text) for each in side] for side in sides)
    return training, heldout


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Small texts in place of Wikipedia, the standard library and the list of books. Gives a folder
    of four books."""
    monkeypatch.setattr(wiki, "wiki_texts", lambda language: texts(language, 200))
    code = tmp_path / "lib"
    code.mkdir()
    for index, text in enumerate(texts("import", 60, 20)):
        (code / f"m{index}.py").write_text(f"{text}\n")
    monkeypatch.setattr(stdlib, "stdlib_files", lambda: sorted(code.glob("*.py")))
    volumes = {f"book {index}": texts(f"book {index}", 1, 400)[0] for index in range(4)}
    known = tuple(
        Listed(hashlib.sha256(text.encode()).hexdigest(), split, title)
        for (title, text), split in zip(volumes.items(), ["train"] * 3 + ["heldout"], strict=True)
    )
    monkeypatch.setattr(books, "listed", lambda: known)
    folder = tmp_path / "books"
    folder.mkdir()
    for title, text in volumes.items():
        (folder / f"{title}.md").write_text(text)
    return folder


# --- shares and sides -----------------------------------------------------------------------------


def test_training_text_has_the_stated_shares_of_characters():
    sources = [source("a", *texts("a", 900)), source("b", *texts("b", 300))]
    found = Mix(sources, {"a": 0.4, "b": 0.6}, heldout=0.1)
    sizes = Counter()
    for name, text in taken(found)[0]:
        sizes[name] += len(text)
    assert sizes["a"] / sizes.total() == pytest.approx(0.4, abs=0.002)
    assert {part.source: part.characters for part in found.parts} == dict(sizes)
    whole = sum(len(text) for text in texts("b", 300))
    assert sizes["b"] > 0.85 * whole  # the scarce source gives all that is not held out


def test_held_out_text_has_the_shares_too_and_none_of_it_is_trained_on():
    sources = [source("a", *texts("a", 900)), source("b", *texts("b", 900))]
    training, heldout = taken(Mix(sources, {"a": 0.25, "b": 0.75}, heldout=0.2))
    assert not {text for _, text in training} & {text for _, text in heldout}
    sizes = Counter()
    for name, text in heldout:
        sizes[name] += len(text)
    assert sizes["b"] / sizes.total() == pytest.approx(0.75, abs=0.03)
    trained = sum(len(text) for _, text in training)
    assert sizes.total() / (sizes.total() + trained) == pytest.approx(0.2, abs=0.03)


def test_the_side_of_a_document_depends_on_its_text_and_the_seed_alone():
    a, b = texts("a", 300), texts("b", 300)
    alone = set(taken(Mix([source("a", *a)], {}, 0.2))[1])
    beside = taken(Mix([source("b", *b), source("a", *reversed(a))], {}, 0.2))[1]
    assert {pair for pair in beside if pair[0] == "a"} == alone
    assert set(taken(Mix([source("a", *a)], {}, 0.2, seed=1))[1]) != alone


def test_a_sources_own_split_is_kept():
    own = [SplitText(text, index % 3 == 0) for index, text in enumerate(texts("a", 90))]
    training, heldout = taken(Mix([source("a", *own)], {}, 0.5))
    assert [text for _, text in training] == [text for text, side in own if not side]
    assert [text for _, text in heldout] == [text for text, side in own if side]


def test_a_text_that_comes_twice_is_taken_once():
    a = texts("a", 200)
    training, heldout = taken(Mix([source("a", *a, *a), source("b", *a, *texts("b", 200))], {}))
    both = [text for _, text in training + heldout]
    assert len(both) == len(set(both)) == 400
    assert {name for name, text in training + heldout if text in a} == {"a"}


def test_blank_texts_are_left_out():
    found = Mix([source("a", *texts("a", 100), " ", "\n")], {})
    assert found.parts[0].documents + found.parts[0].heldout_documents == 100


def test_a_long_document_is_held_out_up_to_the_end_of_a_line(monkeypatch):
    monkeypatch.setattr(mix, "EXCERPT", 50)
    long = "\n".join(["a line of words"] * 9)
    own = [SplitText(long, True), SplitText("x" * 99, True), SplitText("to train on", False)]
    found = Mix([source("a", *own)], {})
    assert taken(found)[1] == [("a", "\n".join(["a line of words"] * 3)), ("a", "x" * 50)]
    assert found.parts[0].heldout_characters == 47 + 50


def test_a_source_with_a_share_keeps_one_held_out_document_whatever_its_size():
    own = [SplitText("x" * 999, True), SplitText("to train on", False)]
    found = Mix([source("a", *own)], {"a": 1.0}, 0.01)
    assert found.parts[0].heldout_documents == 1


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(ConfigError, match="each source once, found a, a"):
        Mix([source("a", "x"), source("a", "y")], {})
    with pytest.raises(ConfigError, match="heldout"):
        Mix([source("a", "x")], {}, heldout=1.0)
    with pytest.raises(DataUnavailable, match="origin of b: expected documents to train on"):
        Mix([source("a", *texts("a", 50)), source("b", " ")], {})
    with pytest.raises(InputError, match="mix of a: expected documents to hold out"):
        Mix([source("a", SplitText("x", False))], {})


# --- digests --------------------------------------------------------------------------------------


def test_the_digest_tells_what_would_change_the_mix_and_not_the_order():
    a, b = texts("a", 50), texts("b", 50)

    def digest(a=a, b=b, shares=None, heldout=0.1, seed=0) -> str:
        return Mix([source("a", *a), source("b", *b)], shares or {}, heldout, seed).digest

    assert digest() == digest(a=a[::-1])
    changed = [
        digest(a=[*a, "one more"]),
        digest(shares={"a": 0.5, "b": 0.5}),
        digest(heldout=0.2),
        digest(seed=1),
    ]
    assert len({digest(), *changed}) == 5


def test_the_digest_of_a_part_does_not_depend_on_the_seed():
    parts = [Mix([source("a", *texts("a", 50))], {}, seed=seed).parts[0] for seed in (0, 1)]
    assert parts[0].digest == parts[1].digest


# --- the named mix --------------------------------------------------------------------------------


def test_the_mix_has_three_languages_and_code_and_takes_books_and_folders(small, tmp_path):
    found = open_mix("mix")
    assert [part.source for part in found.parts] == ["en", "fr", "es", "code"]
    assert [part.share for part in found.parts] == [0.35, 0.2, 0.2, 0.25]
    (tmp_path / "own.txt").write_text("\f".join(texts("own", 40)))
    more = open_mix(f"mix+books:{small}+{tmp_path / 'own.txt'}")
    names = [part.source for part in more.parts]
    assert names == ["en", "fr", "es", "code", "books", str(tmp_path / "own.txt")]
    shares = [part.share for part in more.parts]
    assert shares[:5] == pytest.approx([0.0875, 0.05, 0.05, 0.0625, 0.75]) and shares[5] is None
    assert (more.parts[4].documents, more.parts[4].heldout_documents) == (3, 1)
    own = more.parts[5]
    assert own.documents + own.heldout_documents == 40


def test_the_parts_name_version_list_and_digest(small):
    found = open_mix(f"mix+books:{small}")
    lines = described(found.parts)
    assert f"standard library of {stdlib.version()}" in lines[3] and "PSF-2.0" in lines[3]
    assert found.parts[3].digest[:16] in lines[3]
    assert f"list {books.list_digest()[:16]}" in lines[4] and "share 0.75, 0." in lines[4]


def test_long_runs_on_the_mix_require_books():
    with pytest.raises(ConfigError, match=r"at most 5,000,000 .* found 5,000,001; add books"):
        require_books("mix", 5_000_001)
    with pytest.raises(ConfigError, match="add books"):
        require_books("mix+more.txt", 10_000_000)
    for data, tokens in (("mix", 5_000_000), ("mix+books:b", 10**9), ("wiki", 10**9)):
        require_books(data, tokens)


def test_the_option_adds_books_to_a_mix_and_to_nothing_else():
    assert with_books("mix", Path("b")) == "mix+books:b" and with_books("mix", None) == "mix"
    with pytest.raises(ConfigError, match="expected --data mix"):
        with_books("wiki", Path("b"))
    done = CliRunner().invoke(app, ["demo", "--data", "mix", "--tokens", "6000000"])
    assert done.exit_code == 1 and "add books" in done.stderr


def test_a_missing_part_is_named(small, tmp_path):
    with pytest.raises(DataUnavailable, match="nowhere"):
        open_mix(f"mix+{tmp_path / 'nowhere'}")
    (small / "book 2.md").unlink()
    with pytest.raises(DataUnavailable, match="missing: book 2"):
        open_mix(f"mix+books:{small}")


def test_the_mix_is_a_source_of_documents_with_its_own_split(small):
    documents = load_documents("mix")
    training, heldout = documents.split(heldout=0.9, seed=5)
    found = open_mix("mix")
    assert training == [each.text for each in found.training()]
    assert heldout == [each.text for each in found.heldout()]
    assert "CC BY-SA" in documents.licence and "PSF" in documents.licence


# --- a corpus of a mix ----------------------------------------------------------------------------


@pytest.fixture
def corpus(small, monkeypatch) -> Corpus:
    monkeypatch.setattr(encoded, "IN_MEMORY", 1000)
    return prepare(CorpusConfig(f"mix+books:{small}", vocab_size=300, batch=2, length=32))


def test_documents_of_a_corpus_keep_the_name_of_their_source(corpus):
    for part in (corpus.training, corpus.heldout):
        assert set(part.names) == {"en", "fr", "es", "code", "books"}
        for index, ids in enumerate(part):
            name = part.source(index)
            first = {"code": "import", "books": "book"}.get(name, name)
            assert corpus.tokenizer.decode(ids.tolist()).startswith(first)
            assert part.of_source(name)[index]


def test_losses_split_by_source_through_the_document_of_each_target(corpus):
    def losses(batch):  # the loss of a target: its id
        return batch.targets_BT.clamp(min=0).float()

    nats, documents = heldout_losses(losses, corpus.heldout_batches())
    for name in corpus.heldout.names:
        inside = corpus.heldout.of_source(name)[documents - 1]
        expected = [
            [*corpus.heldout[index].tolist(), corpus.end_id]
            for index in np.flatnonzero(corpus.heldout.of_source(name))
        ]
        assert nats[inside].tolist() == [float(value) for ids in expected for value in ids]


def test_a_corpus_of_a_mix_on_disk_is_the_same_and_lies_in_a_file(corpus, tmp_path):
    folder = tmp_path / "corpus"
    corpus.save(folder)
    again = Corpus.load(folder, corpus.config)
    assert again.batches().digest == corpus.batches().digest
    assert again.heldout_batches().digest == corpus.heldout_batches().digest
    assert again.parts == corpus.parts and again.training.names == corpus.training.names
    assert (again.training.sources == corpus.training.sources).all()
    for side in (corpus.training, again.training):
        assert isinstance(side.ids, np.memmap)
    assert json.loads((folder / "corpus.json").read_text())["parts"][0]["source"] == "en"


@pytest.mark.parametrize("least", [0, 10, 10**9])
def test_ids_in_memory_and_in_a_file_are_the_same(corpus, monkeypatch, least):
    monkeypatch.setattr(encoded, "IN_MEMORY", least)
    again = prepare(corpus.config)
    assert isinstance(again.training.ids, np.memmap) == (least < 10**9)
    assert again.batches().digest == corpus.batches().digest


@pytest.mark.parametrize("name", ["training.ids", "heldout.ids", "training.npz"])
def test_token_ids_that_are_cut_off_are_named(corpus, tmp_path, name):
    corpus.save(tmp_path / "corpus")
    path = tmp_path / "corpus" / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ConfigError, match="expected token ids of a prepared corpus"):
        Corpus.load(tmp_path / "corpus")


def test_the_order_in_which_books_lie_changes_no_batch(corpus, small):
    for index in range(4):
        (small / f"book {index}.md").rename(small / f"{9 - index}.md")
    again = prepare(corpus.config)
    assert again.batches().digest == corpus.batches().digest


def test_seeds_split_and_order_a_mix_anew(corpus):
    other = prepare(dataclasses.replace(corpus.config, seed=1))
    assert other.batches().digest != corpus.batches().digest
    heldout = [
        {part.tokenizer.decode(ids.tolist()) for ids in part.heldout} for part in (corpus, other)
    ]
    assert heldout[0] != heldout[1]


@pytest.mark.slow
def test_a_large_text_is_never_in_memory(small, tmp_path):
    """40 MB in 40 files: choosing, encoding and batching take a few of them at a time."""
    folder = tmp_path / "large"
    folder.mkdir()
    line = " ".join(WORDS) + "\n"
    for index in range(40):
        (folder / f"{index}.txt").write_text(f"{index} " + line * (1_000_000 // len(line)))
    tracemalloc.start()
    config = CorpusConfig(f"mix+{folder}", vocab_size=300, heldout=0.05)
    found = open_mix(config.data, config.heldout)
    count = sum(1 for _ in found.training())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 30
    assert peak < 10e6
    assert sum(part.characters for part in found.parts) > 30e6


# --- the standard library -------------------------------------------------------------------------


def test_the_standard_library_gives_code_and_neither_tests_nor_packages():
    names = [path.as_posix() for path in stdlib.stdlib_files()]
    assert len(names) > 400 and any(name.endswith("json/decoder.py") for name in names)
    for part in ("/test/", "/tests/", "/site-packages/", "/encodings/", "_sysconfigdata"):
        assert not any(part in name for name in names)
    text = next(stdlib.stdlib_texts())
    assert "\n" in text and "\r" not in text


def test_own_text_is_read_file_by_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\ftwo")
    (tmp_path / "b.txt").write_bytes("é".encode("latin-1"))
    stream = own_source(str(tmp_path)).read()
    assert [next(stream).text, next(stream).text] == ["one", "two"]
    with pytest.raises(InputError, match=r"b\.txt"):
        next(stream)
