"""`engraphy machine plan` and `engraphy machine probe` print what the library computes."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from engraphy.cli.app import app
from engraphy.plan import layout, plan, tier
from engraphy.plan import probe as probe_module


def run(*words: str):
    return CliRunner().invoke(app, ["machine", *words], env={"COLUMNS": "200"})


def in_words(text: str) -> str:
    """Without the line breaks of a table's cells."""
    return " ".join(text.split())


def test_a_plan_says_bytes_reads_windows_and_what_is_exposed():
    printed = run("plan", "V4.1", "--tokens-per-second", "5000", "--tokens", "4096")
    assert printed.exit_code == 0, printed.output
    planned = plan(layout("V4.1"), tier("nvme"), tokens_per_second=5000, tokens=4096)
    for words in (
        "48 rows of 264 bytes, 12.7 KB; at least 196.6 KB in 4 KiB pages, 208.9 KB on average",
        "1 x 4096 tokens in 819.2 ms, 5,000 tokens/s, 20.480 ms a block",
        f"{planned.exposed * 1e3:,.1f} ms exposed of a forward",
        f"{planned.synchronous * 1e3:,.1f} ms exposed, {planned.synchronous_loss:.1%} lost",
        f"from a hit rate of {planned.hit_rate_to_hide:.1%} on",
        "98,304",
        "266.2",
    ):
        assert words in printed.output


def test_json_has_the_plan_s_numbers():
    printed = run("plan", "qwen3.8", "--tier", "cxl", "--block-ms", "0.5", "--batch", "8", "--json")
    values = json.loads(printed.output)
    planned = plan(layout("Qwen3.8"), tier("cxl"), block_seconds=0.5e-3, batch=8)
    assert values["layers"][0]["rows"] == planned.layers[0].rows == 8 * 16
    assert values["exposed_seconds"] == planned.exposed
    assert values["synchronous_seconds"] == pytest.approx(planned.synchronous)
    assert values["forward_seconds"] == pytest.approx(48 * 0.5e-3)


def test_a_cache_is_proposed_from_a_table_of_hit_rates(tmp_path):
    rates = tmp_path / "rates.json"
    rates.write_text('{"1000000000": 0.5, "4000000000": 0.99}')
    words = ("plan", "V4.1", "--tokens-per-second", "5000", "--tokens", "4096")
    printed = in_words(run(*words, "--cache", str(rates)).output)
    assert "4.0 GB in all, 14,705,872 rows, cache=1907MiB in the URL of each layer: hits" in printed
    printed = in_words(run(*words, "--cache", "code").output)
    assert "no cache of code hits so often: 1.1 GB has 68.3%" in printed
    assert json.loads(run(*words, "--cache", str(rates), "--json").output)["cache_bytes"] == 4e9


@pytest.mark.parametrize(
    "words, message",
    [
        (("plan", "V5", "--block-ms", "1"), "layout: expected one of 27B, 40B, V4.1, Qwen3.8"),
        (("plan", "V4.1", "--block-ms", "1", "--tier", "tape"), "tier: expected one of cxl, rdma"),
        (("plan", "V4.1"), "expected either tokens_per_second or block_seconds"),
        (("plan", "V4.1", "--block-ms", "1", "--row-kind", "q9"), "row format: expected one of"),
        (("probe", "none"), "expected a file or a folder, found neither"),
        (("probe", ".", "--gib", "0"), "size: expected"),
    ],
)
def test_what_cannot_be_is_one_line(words, message):
    printed = run(*words)
    assert printed.exit_code == 1
    assert message in in_words(printed.stderr)
    assert "Traceback" not in printed.output


def test_a_probe_prints_a_table_and_writes_a_file_that_a_plan_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(probe_module, "_SECONDS", 0.0)
    file = tmp_path / "disk.json"
    words = ("probe", str(tmp_path), "--gib", "0.00390625", "--threads", "4", "--json", str(file))
    printed = run(*words)
    assert printed.exit_code == 0, printed.output
    assert "a scratch file of 0.00 GiB" in printed.stdout
    assert "writing a scratch file" in printed.stderr and "are free there" in printed.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["disk.json"]
    planned = run("plan", "V4.1", "--block-ms", "100", "--tier", str(file), "--json")
    assert json.loads(planned.output)["tier"] == str(file)


def test_simulate_says_what_a_rack_loses_and_what_gives_way():
    words = ("simulate", "V4.1", "--servers", "8", "--tokens-per-second", "5684")
    printed = run(*words, "--parts", "16", "--part-rate", "5e8", "--hit-rate", "0.5")
    assert printed.exit_code == 0, printed.output
    assert "V4.1, 8 servers on cxl: 64 x 1 tokens a forward of 11.260 ms" in printed.output
    assert "0.0% of the tokens/s lost" in printed.output
    assert "gives way first: the window of block 1" in printed.output
    found = json.loads(run(*words, "--tier", "nvme", "--layers", "0,20", "--json").output)
    assert [layer["layer"] for layer in found["layers"]] == [0, 20] and found["loss"] > 0.3
    words = (*words, "--tier", "rdma", "--parts", "4")
    assert "expected copies" in run(*words, "--failed", "1").output
    assert run(*words, "--failed", "1", "--standby", "nvme").exit_code == 0
    cached = run(*words, "--cache", "code", "--cache-gib", "1", "--in-flight", "8")
    assert "hit rate 68.3%" in cached.output
    for wrong in (("--cache", "code"), ("--layers", "one")):
        assert run(*words, *wrong).exit_code == 1
