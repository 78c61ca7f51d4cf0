"""What a memory costs is said before anything is made."""

from __future__ import annotations

import pytest

import engraphy
from engraphy import EngramConfig
from engraphy.errors import ConfigError


def test_the_cost_is_told_before_anything_is_allocated(model, config, caplog):
    with caplog.at_level("INFO", logger="engraphy"):
        memory = engraphy.attach(model, config)
    told = engraphy.hf.cost(config)
    first, then = (record.getMessage() for record in caplog.records)
    assert str(told) in first and "MB of RAM are free" in first and then.startswith("serving")
    assert told.table_bytes == sum(store.info.bytes for store in memory.stores.values())
    assert told.dense_parameters == sum(parameter.numel() for parameter in memory.parameters())


def test_a_table_beyond_the_ram_is_refused_and_the_model_is_as_it_was(model):
    huge = EngramConfig.for_model(model.config, layers=(1,), rows_per_head=10**12, dim=64)
    with pytest.raises(ConfigError, match="of RAM are free"):
        engraphy.attach(model, huge)
    assert not hasattr(model, "engraphy")


def test_a_table_beyond_what_a_control_group_leaves_is_refused(model, config, monkeypatch):
    takes = engraphy.hf.cost(config)
    monkeypatch.setenv("ENGRAPHY_FREE_MEMORY", str(takes.table_bytes))  # but not the dense layers
    with pytest.raises(ConfigError, match="of RAM are free.*ENGRAPHY_FREE_MEMORY says otherwise"):
        engraphy.attach(model, config)
    monkeypatch.setenv("ENGRAPHY_FREE_MEMORY", str(takes.table_bytes + takes.dense_bytes))
    engraphy.attach(model, config)
