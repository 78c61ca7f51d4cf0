"""Tokenizers: exact size, the same each time, lossless, and no special token out of a text."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from engraphy.data.tokens import END, PAD, encode, end_id, load_tokenizer, train_tokenizer
from engraphy.errors import ConfigError, DataUnavailable, InputError

SYLLABLES = ["ka", "lo", "mi", "ter", "un", "se", "do", "rin"]
TEXTS = [
    " ".join("".join(np.random.default_rng(seed).choice(SYLLABLES, 3)) for _ in range(8))
    for seed in range(60)
]
TOKENIZER = train_tokenizer(TEXTS, 300)


def test_a_trained_tokenizer_has_the_size_asked_for_and_both_special_tokens_first():
    assert TOKENIZER.get_vocab_size() == 300
    assert [TOKENIZER.id_to_token(index) for index in (0, 1)] == [END, PAD] and end_id(
        TOKENIZER
    ) == 0


@pytest.mark.slow
def test_the_same_texts_give_the_same_tokenizer_in_another_process_on_one_thread():
    program = (
        f"from engraphy.lm import train_tokenizer; import sys; "
        f"sys.stdout.write(train_tokenizer({TEXTS!r}, 300).to_str())"
    )
    environment = {**os.environ, "RAYON_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == TOKENIZER.to_str()


@given(st.lists(st.text(), max_size=5))
def test_decoding_gives_the_text_back(texts):
    found = encode(TOKENIZER, texts)
    assert [TOKENIZER.decode(ids.tolist(), skip_special_tokens=False) for ids in found] == texts
    assert all(ids.dtype == np.int32 for ids in found)


def test_the_name_of_a_special_token_in_a_text_is_plain_text():
    (ids,) = encode(TOKENIZER, [f"ka{END}lo{PAD}"])
    assert not {0, 1} & set(ids.tolist()) and TOKENIZER.decode(ids.tolist()) == f"ka{END}lo{PAD}"
    assert TOKENIZER.encode(END).ids == [0]  # outside of encode the tokenizer is as it was


def test_more_texts_than_one_batch_keep_their_order():
    texts = [f"ka {index}" for index in range(2500)]
    assert [TOKENIZER.decode(ids.tolist()) for ids in encode(TOKENIZER, texts)] == texts


def test_a_saved_tokenizer_is_read_back(tmp_path):
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "tokenizer.json").to_str() == TOKENIZER.to_str()


def test_what_is_no_tokenizer_is_said(tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    for name in ("bad.json", "none.json"):
        with pytest.raises(DataUnavailable, match=name):
            load_tokenizer(tmp_path / name)
    with pytest.raises(ConfigError, match="end tokens"):
        end_id(Tokenizer(models.BPE()))


def test_a_vocabulary_that_cannot_be_filled_is_refused():
    with pytest.raises(ConfigError, match="257"):
        train_tokenizer(TEXTS, 257)
    with pytest.raises(InputError, match="too short"):
        train_tokenizer(["ka lo"], 300)
