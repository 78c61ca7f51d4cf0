"""data/ngrams.py and `engraphy data ngrams`: texts and ids in files are counted as they stand."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from typer.testing import CliRunner

from engraphy import EngramConfig, HashSpec, LayerSpec, RowFormat, Table, VocabMap
from engraphy.addresses import Addresser, Ngrams
from engraphy.addresses.counting import count_ngrams
from engraphy.cli import app
from engraphy.data import ngrams
from engraphy.data.ngrams import count_file
from engraphy.errors import ConfigError, DataUnavailable

WORDS = ["<pad>", "the", "The", "cat", "sat", "mat", "on", "<end>"]
TEXT = "the cat sat\fThe cat sat on the mat\f the cat"


def tokenizer() -> Tokenizer:
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    made.pre_tokenizer = Whitespace()
    return made


def addresser(orders=(2, 3)) -> Addresser:
    vocab = VocabMap.from_tokenizer(tokenizer())
    return Addresser(HashSpec.demo((1,), orders, 1, 9, len(vocab), pad_id=0), vocab)


def expected(top: int = 5) -> Ngrams:
    documents = [tokenizer().encode(text).ids for text in TEXT.split("\f")]
    begins = np.cumsum([0, *map(len, documents)])[:-1]
    return count_ngrams(addresser(), np.concatenate(documents), top, begins=begins)


def equal(found: Ngrams, wanted: Ngrams) -> bool:
    return found.tokens == wanted.tokens and all(
        np.array_equal(found.ids[order], ids)
        and np.array_equal(found.counts[order], wanted.counts[order])
        for order, ids in wanted.ids.items()
    )


def test_a_text_and_the_same_ids_give_the_same_counts(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    made = addresser()
    found = count_file(tmp_path / "text.txt", tmp_path / "out", made, 5, tokenizer=tokenizer())
    assert equal(found, expected()) and equal(Ngrams.load(tmp_path / "out"), expected())
    assert not (tmp_path / "out.work").exists()
    ids = [[*tokenizer().encode(text).ids, 7] for text in TEXT.split("\f")]
    np.save(tmp_path / "ids.npy", np.concatenate(ids).astype(np.int32))
    found = count_file(tmp_path / "ids.npy", tmp_path / "out", made, 50, document_end=7)
    of_text = expected(50)
    for order, grams in found.ids.items():
        kept = ~(grams == made.vocab.table[7]).any(axis=1)
        assert np.array_equal(grams[kept], of_text.ids[order])
        assert np.array_equal(found.counts[order][kept], of_text.counts[order])


def test_a_text_that_was_encoded_is_not_encoded_again(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)

    def stop(*told):
        if told[0].startswith("order"):
            raise KeyboardInterrupt

    arguments = (tmp_path / "text.txt", tmp_path / "out", addresser(), 5)
    with pytest.raises(KeyboardInterrupt):
        count_file(*arguments, tokenizer=tokenizer(), progress=stop)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(ngrams, "_encode", None)  # a call would fail
    assert equal(count_file(*arguments, tokenizer=tokenizer()), expected())


def test_what_cannot_be_counted_is_refused_by_name(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "no.npy").write_text("no array")
    made, out = addresser(), tmp_path / "out"
    for name, told, kind, arguments in [
        ("text.txt", "expected a tokenizer", ConfigError, {}),
        ("text.txt", "document", ConfigError, {"tokenizer": tokenizer(), "document_end": 7}),
        ("empty.txt", "found none", DataUnavailable, {"tokenizer": tokenizer()}),
        ("no.npy", "no.npy: expected token ids", DataUnavailable, {}),
        ("nothing.npy", "nothing.npy: expected token ids", DataUnavailable, {}),
    ]:
        with pytest.raises(kind, match=told):
            count_file(tmp_path / name, out, made, 5, **arguments)
    assert not out.exists()


def test_the_command_counts_by_a_tokenizer_a_map_or_a_table(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    made = addresser()
    made.vocab.save(tmp_path / "vocab.json")
    config = EngramConfig(made.spec, LayerSpec(8, 2 * 4), 4)
    table = Table.create(tmp_path / "table", config, RowFormat("f32", 4), made.vocab)
    table.seal()
    common = ["data", "ngrams", str(tmp_path / "text.txt"), str(tmp_path / "out"), "--top", "5"]
    common += ["--tokenizer", str(tmp_path / "tokenizer.json")]
    for options in (
        ["--filler", "0"],
        ["--filler", "0", "--vocab", str(tmp_path / "vocab.json"), "--orders", "2,3"],
        ["--table", str(tmp_path / "table")],
        ["--table", str(tmp_path / "table"), "--orders", "2,3"],
    ):
        done = CliRunner().invoke(app, [*common, *options])
        assert done.exit_code == 0, done.output
        assert "11 tokens\norder 2: 5 n-grams, 90.91% of the text" in done.output
        assert equal(Ngrams.load(tmp_path / "out"), expected())
    for options, told in (
        ([], "expected --filler"),
        (["--filler", "0", "--dialect", "qwen4"], "expected --vocab"),
        (["--filler", "0", "--orders", "2,x"], "orders: expected numbers"),
    ):
        done = CliRunner().invoke(app, [*common, *options])
        assert done.exit_code == 1 and told in " ".join(done.output.split()), done.output
