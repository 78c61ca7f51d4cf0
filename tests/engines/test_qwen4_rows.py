"""A store in the place of the table that vLLM's Qwen4-Exp reads, over a stand-in for the class that
needs a GPU: it asks for the same three methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engraphy import EngramConfig, HashSpec
from engraphy.addresses.vocab import VocabMap
from engraphy.engines.vllm.qwen4 import store_embedding
from engraphy.errors import ConfigError, StoreError
from engraphy.rows.format import RowFormat
from engraphy.spec.layer import LayerSpec
from engraphy.store import RamStore, open_store
from engraphy.store.file import FileStore
from engraphy.table.table import Table

DIM, LAYER = 16, 1


class StandIn(nn.Module, ABC):
    """Calls its methods as Qwen4ExpPLEEmbedding and the model around it do."""

    supports_prefetch = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        params_dtype: torch.dtype,
        padding_size: int,
        prefix: str,
    ) -> None:
        super().__init__()
        padded = -(-num_embeddings // padding_size) * padding_size
        weight = self.allocate_embedding_weight(padded, embedding_dim, params_dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)

    @abstractmethod
    def allocate_embedding_weight(self, rows: int, dim: int, dtype: torch.dtype) -> Tensor: ...
    @abstractmethod
    def start_prefetch(self, ngram_ids: Tensor) -> None: ...
    @abstractmethod
    def finalize_prefetch(self, total_tokens: int) -> Tensor: ...


@pytest.fixture
def table(tmp_path) -> tuple[Any, np.ndarray, EngramConfig]:
    """URL of a table of Qwen4-Exp's dialect, its values, and the config."""
    spec = HashSpec.qwen4((LAYER,), (2, 3), 2, 31, 50, eos_id=2)
    config = EngramConfig(spec, LayerSpec.qwen4(32, spec.columns * DIM), DIM)
    fmt = RowFormat("bf16", DIM)
    values_Nd = np.random.default_rng(0).standard_normal((spec.row_count(LAYER), DIM), np.float32)
    rows = fmt.encode(values_Nd)
    table = Table.create(tmp_path / "table", config, fmt, VocabMap.identity(50))
    FileStore(table, LAYER).scatter(np.arange(len(rows)), rows)
    table.seal()
    table.close()
    return f"file:{tmp_path / 'table'}", fmt.decode(rows), config


def embedding(url: str, rows: int, **changes: Any) -> Any:
    kind = store_embedding(StandIn, lambda layer: open_store(url, layer))
    options = dict(
        params_dtype=torch.bfloat16,
        padding_size=64,
        prefix="model.layers.1.ple.ple_embedding.ngram_embedding",
    )
    return kind(rows, DIM, **(options | changes))


def test_rows_are_those_that_an_embedding_of_the_whole_table_gives(table):
    url, values_Nd, config = table
    module = embedding(url, len(values_Nd))
    assert module.supports_prefetch and module.weight.numel() == 0
    weight_Nd = torch.from_numpy(values_Nd).bfloat16()
    for tokens in (1, 7):
        ids_TC = torch.randint(0, len(values_Nd), (tokens, config.hash.columns))
        module.start_prefetch(ids_TC.int())
        out_TE = module.finalize_prefetch(tokens)
        expected_TE = torch.nn.functional.embedding(ids_TC, weight_Nd).flatten(-2)
        assert torch.equal(out_TE, expected_TE)
        assert torch.equal(module.dequantize(out_TE, torch.float32), expected_TE.float())


def test_padding_behind_the_last_token_is_cut(table):
    url, values_Nd, config = table
    module = embedding(url, len(values_Nd))
    module.start_prefetch(torch.zeros(8, config.hash.columns, dtype=torch.int64))
    assert module.finalize_prefetch(3).shape == (3, config.hash.columns * DIM)


def test_rows_that_were_not_requested_are_named(table):
    url, values_Nd, _ = table
    with pytest.raises(StoreError, match="expected start_prefetch before"):
        embedding(url, len(values_Nd)).finalize_prefetch(1)


def test_another_table_is_named(table):
    url, values_Nd, _ = table
    with pytest.raises(ConfigError, match="layer 1: expected rows of 16 values, at most 3"):
        embedding(url, 3)
    with pytest.raises(ConfigError, match="expected the name of a module in a layer"):
        embedding(url, len(values_Nd), prefix="model.embed_tokens")
    kind = store_embedding(StandIn, lambda layer: RamStore(4, 32, layer))
    with pytest.raises(ConfigError, match="expected a store that knows its row format"):
        kind(4, DIM, params_dtype=torch.bfloat16, padding_size=64, prefix="layers.1.ple")
