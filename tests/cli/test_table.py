"""`engraphy table`: it prints what the functions found, 0 means done, sound or equal, and an error
is one line."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from engraphy.addresses import Addresser, Ngrams, VocabMap
from engraphy.cli import terminal
from engraphy.cli.app import app
from engraphy.released import Checkpoint
from engraphy.released.sample import RELEASES
from engraphy.table import Table, inspection
from engraphy.table.sharing import shared_rows
from engraphy.table.usage import usage
from tests.tools.hot import some_ngrams
from tests.tools.releases import WORDS, tokenizer, write_qwen, write_v41


@pytest.fixture(autouse=True)
def quick_sync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def run(*arguments) -> Result:
    return CliRunner().invoke(app, ["table", *map(str, arguments)])


def said(*arguments) -> str:
    """What a command that succeeds prints."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def told(*arguments) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code in (0, 1), result.output
    return json.loads(result.stdout)


def refused(*arguments) -> str:
    """The one line of a command that fails."""
    result = run(*arguments)
    assert result.exit_code == 1 and not result.stdout and result.stderr.count("\n") == 1, (
        result.output
    )
    return result.stderr


@pytest.fixture
def deepseek(tmp_path) -> Path:
    said("convert", write_v41(tmp_path / "c"), tmp_path / "t")
    return tmp_path / "t"


@pytest.fixture
def qwen(tmp_path) -> Path:
    said("convert", write_qwen(tmp_path / "c"), tmp_path / "t")
    return tmp_path / "t"


def spoil(path: Path) -> None:
    """A row of NaN."""
    table = Table.open(path, "w")
    table.write_rows(1, 3, np.full((1, 64), 0xFF, np.uint8))
    table.seal()


def test_the_command_and_each_verb_explain_themselves():
    for arguments in (
        [],
        *([verb] for verb in ("convert", "quantize", "publish", "stat", "verify", "compare")),
    ):
        assert CliRunner().invoke(app, ["table", *arguments, "--help"]).exit_code == 0
    assert "table" in CliRunner().invoke(app, ["--help"]).output


def test_convert_makes_a_table_and_says_which(tmp_path):
    text = said("convert", write_v41(tmp_path / "c"), tmp_path / "t")
    table = Table.open(tmp_path / "t")
    for part in (table.table_id, table.parent, "546 of fp8", "36 kB", str(tmp_path / "t")):
        assert part in text
    VocabMap.from_tokenizer(tokenizer()).save(tmp_path / "v.json")
    (tmp_path / "c/tokenizer.json").unlink()
    made = told("convert", tmp_path / "c", tmp_path / "u", "--vocab", tmp_path / "v.json")
    assert made == {
        "path": str(tmp_path / "u"),
        "table_id": Table.open(tmp_path / "u").table_id,
        "source_id": table.parent,
        "kind": "fp8",
        "rows": 546,
        "bytes": 36036,
        "resumed_at": 0,
    }


def test_quantize_makes_a_table_and_says_what_it_costs(deepseek, tmp_path):
    text = said("quantize", deepseek, tmp_path / "q", "--kind", "int4")
    table = Table.open(tmp_path / "q")
    for part in (
        table.table_id,
        table.parent,
        "18.6 kB of int4, was 36 kB",
        "relative RMS",
        "240",
        "306",
    ):
        assert part in text
    made = told("quantize", deepseek, tmp_path / "q8", "--kind", "int8")
    assert made["kind"] == "int8" and set(made["difference"]) == {"1", "3"}
    assert 0 < made["difference"]["1"]["relative_rms"] < 0.02


def test_verify_says_whether_a_table_is_sound(qwen):
    text = said("verify", qwen)
    assert (
        "sound" in text and "1 of 1 shards" in text and "4 from 53 to 67" in text and "none" in text
    )
    found = told("verify", qwen, "--sample", "1")
    assert (
        found["sound"]
        and found["layers"][0]["rows"] == 256
        and found["layers"][0]["primes"] == [53, 67]
    )
    spoil(qwen)
    bad = run("verify", qwen)
    assert bad.exit_code == 1 and "not numbers" in bad.stdout
    assert (
        told("verify", qwen)["layers"][0]["not_finite"] == [3] and not told("verify", qwen)["sound"]
    )


def test_publish_makes_a_pool_and_verify_checks_it(qwen, tmp_path):
    pool = tmp_path / "pool"
    text = said("publish", qwen, pool)
    assert str(pool) in text.replace("\n", "") and "epoch" in text
    found = told("publish", qwen, pool)
    assert found["epoch"] == 2 and found["table_id"] == Table.open(qwen).table_id
    checked = told("verify", pool)
    assert checked["sound"] and checked["shards"] == checked["of"] == 1
    assert "1 of 1 shards" in said("verify", pool)
    assert "a folder" in refused("publish", qwen, tmp_path)


def test_compare_says_where_tables_differ(deepseek, tmp_path):
    said("quantize", deepseek, tmp_path / "f32", "--kind", "f32")
    said("quantize", deepseek, tmp_path / "int4", "--kind", "int4")
    assert "0.000000" not in said("compare", deepseek, tmp_path / "f32")
    assert told("compare", deepseek, tmp_path / "f32")["equal"]
    differ = run("compare", deepseek, tmp_path / "int4")
    assert (
        differ.exit_code == 1
        and Table.open(deepseek).table_id in differ.stdout
        and "int4" in differ.stdout
    )
    found = told("compare", deepseek, tmp_path / "int4")
    assert not found["equal"] and found["difference"]["1"]["different"] > 0
    assert run("compare", deepseek, tmp_path / "int4", "--json").exit_code == 1
    said("convert", write_qwen(tmp_path / "qc"), tmp_path / "qt")
    other = run("compare", deepseek, tmp_path / "qt")
    assert other.exit_code == 1 and "the addresses differ" in other.stdout
    assert told("compare", deepseek, tmp_path / "qt")["difference"] is None


def test_stat_tells_the_statistics_of_the_rows(deepseek):
    text = said("stat", deepseek)
    for part in ("240", "306", "15.8 kB", "0.00%", "norm, 50%"):
        assert part in text
    expected = [dataclasses.asdict(layer) for layer in inspection.statistics(deepseek, 50, 7)]
    assert told("stat", deepseek, "--sample", "50", "--seed", "7") == json.loads(
        json.dumps({"layers": expected, "usage": []})
    )
    assert told("stat", deepseek, "--sample", "0")["layers"][0]["scanned"] == 240


def test_stat_tells_what_a_text_touches(deepseek, tmp_path):
    ids_T = np.arange(500) % len(WORDS)
    tokenizer().save(str(tmp_path / "tok.json"))
    np.save(tmp_path / "ids.npy", ids_T)
    (tmp_path / "ids.txt").write_text(
        " ".join(map(str, ids_T)), encoding="utf-8-sig"
    )  # with a byte order mark
    model = ("--tokenizer", tmp_path / "tok.json")
    found = [
        told("stat", deepseek, "--ids", tmp_path / name, *model)["usage"]
        for name in ("ids.npy", "ids.txt")
    ]
    expected = usage(Table.open(deepseek), VocabMap.from_tokenizer(tokenizer()), ids_T)
    assert (
        found[0]
        == found[1]
        == json.loads(json.dumps([dataclasses.asdict(layer) for layer in expected]))
    )
    text = said("stat", deepseek, "--ids", tmp_path / "ids.npy", *model)
    assert f"500 tokens touch {expected[0].used} of 240 rows" in text and "hottest row" in text


def test_stat_reads_text_through_the_tokenizer(deepseek, tmp_path):
    tokenizer().save(str(tmp_path / "tok.json"))
    (tmp_path / "text").write_text("w3")
    found = told(
        "stat", deepseek, "--text", tmp_path / "text", "--tokenizer", tmp_path / "tok.json"
    )["usage"]
    assert found[0]["tokens"] == 1 and found[0]["used"] == 4


def test_stat_takes_raw_ids_where_a_table_hashes_them(qwen, tmp_path):
    (tmp_path / "ids").write_text("1 2 3")
    assert told("stat", qwen, "--ids", tmp_path / "ids")["usage"][0]["tokens"] == 3


def test_stat_tells_which_frequent_ngrams_share_rows(deepseek, tmp_path):
    tokenizer().save(str(tmp_path / "tok.json"))
    vocab = VocabMap.from_tokenizer(tokenizer())
    addresser = Addresser(Table.open(deepseek).config.hash, vocab)
    some_ngrams(addresser, 90).save(tmp_path / "counts")
    given = ("--ngrams", tmp_path / "counts", "--top", "80")
    model = ("--tokenizer", tmp_path / "tok.json")
    expected = shared_rows(addresser, Ngrams.load(tmp_path / "counts").top(80))
    of_table = told("stat", deepseek, *given, *model)
    assert of_table == json.loads(
        json.dumps({"sharing": [dataclasses.asdict(part) for part in expected]})
    )
    # The layout is all it needs: of a checkpoint, or of its config.json alone.
    assert told("stat", tmp_path / "c", *given) == of_table
    config = tmp_path / "alone" / "config.json"
    config.parent.mkdir()
    config.write_bytes((tmp_path / "c" / "config.json").read_bytes())
    assert told("stat", config, *given, *model) == of_table
    vocab.save(tmp_path / "vocab.json")
    saved = said("stat", config, *given, "--vocab", tmp_path / "vocab.json")
    first = expected[0].examples[0].ngrams[0]
    assert f"{' '.join(map(str, first.ids))} ({first.count:,})" in saved
    words = " ".join(WORDS[int(np.argmax(vocab.table == i))] for i in first.ids)
    assert f"'{words}' ({first.count:,})" in said("stat", deepseek, *given, *model)
    said("convert", write_qwen(tmp_path / "qc"), tmp_path / "qt")
    raw = Addresser(Table.open(tmp_path / "qt").config.hash, VocabMap.identity(60))
    some_ngrams(raw, 50).save(tmp_path / "raw")
    assert told("stat", tmp_path / "qt", "--ngrams", tmp_path / "raw")["sharing"][0]["ngrams"] == 50
    for arguments, name in (
        ((config,), "ConfigError: .*config.json: expected --ngrams"),
        ((config, *given), "ConfigError: .*config.json: expected --tokenizer or --vocab"),
        ((deepseek, *given, *model, "--text", tmp_path / "c"), "ConfigError: expected --ngrams"),
        ((deepseek, "--ngrams", tmp_path / "none", *model), "ConfigError: .*none"),
        ((deepseek, "--ngrams", tmp_path / "raw", *model), "DigestMismatch: n-grams"),
    ):
        assert re.match(name, refused("stat", *arguments))


def test_errors_are_one_line_that_names_them(deepseek, tmp_path):
    (tmp_path / "bad").write_text("1 x")
    (tmp_path / "far").write_text("1 60")
    (tmp_path / "bad.npy").write_text("no array")
    tokenizer().save(str(tmp_path / "tok.json"))
    model = ("--tokenizer", tmp_path / "tok.json")
    none = tmp_path / "none"
    for arguments, name in (
        (("convert", none, tmp_path / "x"), "ConfigError"),
        (("convert", tmp_path / "c", deepseek), "TableError"),
        (("quantize", deepseek, tmp_path / "x", "--kind", "int3"), "ConfigError"),
        (("quantize", none, tmp_path / "x", "--kind", "int8"), "TableError"),
        (("verify", none), "TableError"),
        (("verify", deepseek, "--sample", "99"), "ConfigError"),
        (("compare", deepseek, none), "TableError"),
        (("stat", none), "TableError"),
        (("stat", deepseek, "--sample", "-1"), "ConfigError"),
        (("stat", deepseek, "--ids", none, *model), "ConfigError"),
        (("stat", deepseek, "--ids", tmp_path / "bad", *model), "ConfigError"),
        (("stat", deepseek, "--ids", tmp_path / "bad.npy", *model), "ConfigError"),
        (("stat", deepseek, "--ids", tmp_path / "far", *model), "InputError"),
        (("stat", deepseek, "--ids", tmp_path / "far"), "DigestMismatch"),
        (("stat", deepseek, "--text", tmp_path / "bad"), "ConfigError"),
        (
            ("stat", deepseek, "--text", tmp_path / "bad", "--ids", tmp_path / "bad", *model),
            "ConfigError",
        ),
        (
            ("stat", deepseek, "--text", tmp_path / "bad", "--tokenizer", tmp_path / "bad"),
            "ConfigError",
        ),
        (("stat", deepseek, "--ids", tmp_path / "far", "--vocab", none), "ConfigError"),
    ):
        assert refused(*arguments).startswith(f"{name}: "), arguments
    assert not (tmp_path / "x").exists()


def test_a_long_run_in_a_log_says_how_far_it_is(monkeypatch, capsys):
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: float(next(clock)))
    with terminal.progress() as step:
        for done in range(0, 10):
            step("converting", done * 10**9, 9 * 10**9)
    captured = capsys.readouterr()
    assert captured.err.splitlines()[:2] == ["converting 1.0 of 9.0 GB", "converting 3.0 of 9.0 GB"]
    assert not captured.out


@pytest.mark.parametrize("release", RELEASES)
def test_a_sample_converts_and_is_sound(release, tmp_path):
    checkpoint = tmp_path / "sample"
    assert run("sample", checkpoint, "--release", release, "--rows-per-head", "100").exit_code == 0
    text = ["--ids", tmp_path / "ids.txt", "--tokenizer", checkpoint / "tokenizer.json"]
    if release.endswith("_gguf"):  # which has a token map, and no tokenizer.json
        checkpoint /= "model-00001-of-00002.gguf"
        Checkpoint.open(checkpoint).vocab().save(tmp_path / "vocab.json")
        text[2:] = ["--vocab", tmp_path / "vocab.json"]
    told("convert", checkpoint, tmp_path / "table")
    assert told("verify", tmp_path / "table")["sound"]
    (tmp_path / "ids.txt").write_text("1 2 3 4 5 1 2 3")
    usage = told("stat", tmp_path / "table", *text)["usage"]
    assert [layer["tokens"] for layer in usage] == [8] * (2 if "deepseek" in release else 1)


def test_a_sample_is_refused_for_what_is_no_release_and_where_something_is(tmp_path):
    (tmp_path / "taken").touch()
    for arguments, expected in (
        ((tmp_path / "new", "--release", "x"), "release: expected one of deepseek_v41, qwen4"),
        ((tmp_path / "new", "--rows-per-head", "0"), "expected"),
        ((tmp_path / "taken",), "expected a new folder|taken"),
    ):
        result = run("sample", *arguments)
        assert result.exit_code == 1 and re.search(expected, result.output), result.output
    assert not (tmp_path / "new").exists()
