"""Documents, their split, and rows: each token is predicted once, in an order that any step can be
found in."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engraphy.data.documents import load_documents, split_documents
from engraphy.data.packing import Batches, pack
from engraphy.errors import ConfigError, DataUnavailable, InputError

END = 0


def documents(count: int = 30, seed: int = 0) -> list[np.ndarray]:
    """Documents of 1 to 40 ids that tell which document and place they come from."""
    random = np.random.default_rng(seed)
    return [1000 * (index + 1) + np.arange(random.integers(1, 41)) for index in range(count)]


def transitions(ids: np.ndarray, targets: np.ndarray) -> set[tuple[int, int]]:
    return set(zip(ids[targets >= 0].tolist(), targets[targets >= 0].tolist(), strict=True))


# --- sources
# ------------------------------------------------------------------------------------------------


def test_a_folder_gives_its_text_files_in_order_divided_by_form_feeds(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.md").write_text("third")
    (tmp_path / "a.txt").write_text("first é\nline\n\f\nsecond\n\f\n \n", encoding="utf-8")
    (tmp_path / "c.py").write_text("not this")
    found = load_documents(str(tmp_path))
    assert found.texts == ("first é\nline", "second", "third")
    assert found.name == str(tmp_path) and found.licence == "not stated"


def test_a_single_file_may_have_any_suffix(tmp_path):
    (tmp_path / "notes").write_text("one\ftwo")
    assert load_documents(str(tmp_path / "notes")).texts == ("one", "two")


def test_what_is_not_there_or_holds_no_text_is_said(tmp_path):
    (tmp_path / "blank.txt").write_text(" \n\f\n")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    for source in ("no/such/folder", str(tmp_path / "blank.txt")):
        with pytest.raises(DataUnavailable, match=source):
            load_documents(source)
    with pytest.raises(InputError, match=r"latin\.txt"):
        load_documents(str(tmp_path / "latin.txt"))


def test_a_datasets_source_gives_its_text_column_and_licence(monkeypatch):
    class Data(dict):
        column_names, info = ["text", "id"], SimpleNamespace(license="mit")

    asked = []
    fake = SimpleNamespace(
        load_dataset=lambda *args, **kw: asked.append((args, kw)) or Data(text=["one", "", "two"])
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    found = load_documents("hf:owner/name:raw")
    assert asked == [(("owner/name", "raw"), {"split": "train"})]
    assert (found.texts, found.licence, found.name) == (("one", "two"), "mit", "hf:owner/name:raw")
    Data.column_names = ["body"]
    with pytest.raises(DataUnavailable, match="body"):
        load_documents("hf:owner/name")


def test_a_datasets_source_that_fails_or_is_not_installed_says_what_to_give_instead(monkeypatch):
    def offline(*args, **kw):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    with pytest.raises(DataUnavailable, match="no network.*instead"):
        load_documents("hf:owner/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataUnavailable, match="pip install datasets"):
        load_documents("hf:owner/name")


# --- split
# ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=40)
@given(st.lists(st.text(max_size=3), min_size=2, max_size=40), st.integers(0, 3), st.randoms())
def test_the_split_knows_neither_order_nor_repetition(texts, seed, random):
    if len(set(texts)) < 2:
        return
    train, unseen = split_documents(texts, 0.3, seed)
    assert (
        sorted(train + unseen) == sorted(texts)
        and not set(train) & set(unseen)
        and train
        and unseen
    )
    mixed = texts * 2
    random.shuffle(mixed)
    assert set(split_documents(mixed, 0.3, seed)[1]) == set(unseen)


def test_the_split_has_the_share_asked_for_and_follows_the_seed():
    texts = [f"text {index}" for index in range(1000)]
    train, unseen = split_documents(texts, 0.05, seed=0)
    assert len(unseen) == 50 and train == [text for text in texts if text not in unseen]
    assert unseen != split_documents(texts, 0.05, seed=1)[1]


def test_what_cannot_be_split_is_refused():
    with pytest.raises(InputError, match="form feed"):
        split_documents(["same", "same"])
    with pytest.raises(ConfigError, match="heldout"):
        split_documents(["a", "b"], 1.0)


# --- rows
# ------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 7))
def test_each_token_is_predicted_once_and_from_its_own_document(lengths, tokens):
    docs = [100 * (index + 1) + np.arange(length) for index, length in enumerate(lengths)]
    rows = pack(docs, END, tokens, fill=True)
    expected = {pair for ids in docs for pair in zip([END, *ids], [*ids, END], strict=True)}
    assert transitions(rows.ids_RT, rows.targets_RT) == expected
    assert (rows.targets_RT >= 0).sum() == sum(lengths) + len(lengths)
    assert rows.starts_RT[:, 0].all()
    assert (rows.starts_RT[:, 1:] == (rows.ids_RT[:, 1:] == END)).all()


def test_without_fill_only_what_completes_no_row_is_left_out():
    docs = documents()
    whole, filled = pack(docs, END, 16, fill=False), pack(docs, END, 16, fill=True)
    count = len(whole.ids_RT)
    assert len(filled.ids_RT) == count + 1 and (whole.targets_RT >= 0).all()
    for ours, theirs in zip(whole, filled, strict=True):
        assert (ours == theirs[:count]).all()


def test_batches_are_tensors_of_rows():
    batch = Batches(documents(), END, batch=4, tokens=16, seed=0)[0]
    assert [(value.dtype, tuple(value.shape)) for value in batch] == [
        (torch.int64, (4, 16)),
        (torch.int64, (4, 16)),
        (torch.bool, (4, 16)),
    ]
    inner = ~batch.starts_BT[:, 1:]
    assert torch.equal(batch.targets_BT[:, :-1][inner], batch.ids_BT[:, 1:][inner])


def test_a_step_gives_the_same_batch_whatever_was_asked_before():
    first, second = (Batches(documents(), END, batch=4, tokens=16, seed=3) for _ in range(2))
    steps = 3 * len(first)
    in_order = [first[step] for step in range(steps)]
    for step in np.random.default_rng(0).permutation(steps).tolist():
        for ours, theirs in zip(second[step], in_order[step], strict=True):
            assert torch.equal(ours, theirs)


def test_writing_to_a_batch_does_not_change_the_next_one():
    batches = Batches(documents(), END, batch=4, tokens=16, seed=3)
    for value in batches[0]:
        value.zero_()
    assert batches[0].ids_BT.any() and batches[0].starts_BT.any()


def test_epochs_hold_the_same_documents_in_another_order():
    docs = documents(100)
    batches = Batches(docs, END, batch=2, tokens=16, seed=0)
    assert len(batches) == sum(len(ids) + 1 for ids in docs) // 16 // 2
    epochs = [
        [batches[epoch * len(batches) + step].ids_BT for step in range(len(batches))]
        for epoch in range(2)
    ]
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))
    seen = [set(torch.cat(epoch).flatten().tolist()) for epoch in epochs]
    assert len(seen[0] ^ seen[1]) <= 2 * 3 * 16  # what fills no batch


def test_a_long_document_is_spread_over_the_batches():
    docs = [np.full(1600, 5), np.full(1600, 6)]
    batches = Batches(docs, END, batch=10, tokens=16, seed=0)
    assert all({5, 6} <= set(batch.ids_BT.flatten().tolist()) for batch in batches)


def test_held_out_batches_cover_every_token_once_in_the_order_given():
    docs = documents()
    batches = list(Batches(docs, END, batch=4, tokens=16, seed=None))
    targets = torch.cat([batch.targets_BT.flatten() for batch in batches])
    assert targets[targets >= 0].tolist() == [
        value for ids in docs for value in (*ids.tolist(), END)
    ]
    with pytest.raises(InputError, match="step"):
        Batches(docs, END, batch=4, tokens=16, seed=None)[len(batches)]


def test_the_digest_tells_what_would_change_a_batch():
    docs = documents()
    digest = Batches(docs, END, batch=4, tokens=16, seed=0).digest
    assert (
        digest
        == Batches([ids.astype(np.int32) for ids in docs], END, batch=4, tokens=16, seed=0).digest
    )
    cut = [docs[0][:-1], np.concatenate([docs[0][-1:], docs[1]]), *docs[2:]]
    others = [
        Batches(docs, END, batch=4, tokens=16, seed=1),
        Batches(docs, END, batch=4, tokens=8, seed=0),
        Batches(docs, END, batch=2, tokens=16, seed=0),
        Batches(docs, 1, batch=4, tokens=16, seed=0),
        Batches(docs[::-1], END, batch=4, tokens=16, seed=0),
        Batches(cut, END, batch=4, tokens=16, seed=0),
        Batches(docs, END, batch=4, tokens=16, seed=None),
    ]
    assert len({digest, *(other.digest for other in others)}) == 1 + len(others)


def test_too_little_text_and_impossible_sizes_are_refused():
    for docs in ([], [np.arange(5), np.arange(0)], [np.arange(5)]):
        with pytest.raises(InputError, match="documents"):
            Batches(docs, END, batch=4, tokens=16, seed=0)
    with pytest.raises(ConfigError, match="batch"):
        Batches(documents(), END, batch=0, seed=0)
    with pytest.raises(InputError, match="step"):
        Batches(documents(), END, batch=4, tokens=16, seed=0)[-1]
