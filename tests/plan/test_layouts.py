"""Published models by name have the sizes that were published; configs and tables say their own."""

from __future__ import annotations

import json

import numpy as np
import pytest

from engraphy import EngramConfig, HashSpec, LayerSpec, RowFormat, Table, VocabMap
from engraphy.errors import ConfigError
from engraphy.plan import LAYOUTS, layout, layout_of_config
from engraphy.released.sample import write_sample


def test_a_token_of_v41_reads_48_rows_of_264_bytes():
    v41 = layout("V4.1")
    assert (v41.rows_per_token, v41.row_bytes, v41.layers, v41.blocks) == (48, 264, (1, 14), 40)
    assert v41.rows_per_token * v41.row_bytes == 12_672
    assert v41.rows_per_token * 4096 == 196_608
    assert v41.config.table_parameters() == (384_006_168 + 384_016_682) * 256
    assert v41.table_bytes == (384_006_168 + 384_016_682) * 264


@pytest.mark.parametrize(
    "name, blocks, hidden, rows, row_bytes, parameters",
    [
        ("27B", 30, 2560, 32, 160, 5.79e9),
        ("40B", 30, 2560, 32, 160, 18.53e9),
        ("V4.1", 40, 5120, 48, 264, 196.6e9),
        ("Qwen3.8", 48, 2560, 16, 320, 51.2e9),
    ],
)
def test_named_layouts_have_their_published_sizes(
    name, blocks, hidden, rows, row_bytes, parameters
):
    found = layout(name.upper())
    assert found.name == name in LAYOUTS
    assert found.blocks == blocks
    assert found.config.layer.hidden_size == hidden
    assert (found.rows_per_token, found.row_bytes) == (rows, row_bytes)
    assert found.config.table_parameters() == pytest.approx(parameters, rel=1e-3)
    assert found.source


def test_the_table_of_qwen_takes_95_gib():
    assert round(layout("qwen3.8").table_bytes / 2**30, 1) == 95.4


def test_rows_of_another_kind_take_their_bytes():
    assert layout("V4.1", row_kind="int4").row_bytes == 130
    assert layout("Qwen3.8", row_kind="fp8_scaled").row_bytes == 160


@pytest.mark.parametrize("release, kind", [("deepseek_v41", "fp8"), ("qwen4", "bf16")])
def test_a_release_s_folder_and_its_config_say_the_same(release, kind, tmp_path):
    folder = write_sample(tmp_path / "release", release)
    found = layout(folder)
    assert found.row_format.kind == kind
    config = json.loads((folder / "config.json").read_text())["text_config"]
    assert found.config == EngramConfig.from_hf(config) == layout_of_config(config).config
    assert found.blocks == config["num_hidden_layers"]
    assert layout(folder / "config.json") == layout(folder / "config.json")


def test_a_config_without_a_memory_gets_the_defaults():
    fields = {
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "vocab_size": 49_152,
        "eos_token_id": 2,
    }
    found = layout_of_config(fields)
    assert found.config == EngramConfig.for_model(fields)
    assert found.layers == (1, 14) and "defaults" in found.source


def test_a_table_needs_the_number_of_blocks(tmp_path):
    spec = HashSpec.demo((1, 3), (2, 3), 2, 50, vocab_size=20, pad_id=0)
    config = EngramConfig(spec, LayerSpec(16, spec.columns * 8), 8)
    vocab = VocabMap.identity(20)
    table = Table.create(tmp_path / "table", config, RowFormat("int8", 8), vocab)
    for number in config.hash.layer_ids:
        table.write_rows(number, 0, np.zeros((spec.row_count(number), 10), np.uint8))
    table.seal()
    table.close()
    with pytest.raises(ConfigError, match="expected the number of the model's blocks"):
        layout(tmp_path / "table")
    found = layout(tmp_path / "table", blocks=6)
    assert (found.layers, found.row_bytes, found.blocks) == ((1, 3), 10, 6)
    with pytest.raises(ConfigError, match="blocks: expected more than 3"):
        layout(tmp_path / "table", blocks=3)


def test_what_is_neither_a_name_nor_a_path_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected one of 27B, 40B, V4.1, Qwen3.8, a config.json"):
        layout("V5")
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ConfigError, match="layout: expected one of"):
        layout(tmp_path)
