"""Qwen4-Exp's table inside vLLM, served from a store: written, not yet run on a GPU.

vLLM 0.32 has an implementation of Qwen4-Exp of its own, with the table on the GPU or in page-locked
memory. Both are subclasses of its Qwen4ExpPLEEmbedding, which asks for three methods: allocate the
weight, start to read the rows of a forward, and hand them out. `store_embedding` makes a third
subclass, which reads them from any store, through a Prefetcher:

    from vllm.models.qwen4_exp.common import ngram_embedding as module

    module.Qwen4ExpPLEPinnedHostEmbedding = store_embedding(
        module.Qwen4ExpPLEEmbedding, lambda layer: open_store("checkpoint:FOLDER", layer)
    )

before vLLM builds the model, with its CPU offload of the table switched on (`config/engram.py`).
That module needs a GPU and Triton. So the methods were run over a stand-in for the base class, and
nothing else was: not the model, not ranks that share the table, not the copy to the GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, StoreError
from ...memory.prefetch import Prefetcher, Ticket
from ...store.base import RowStore


def store_embedding(base: Any, open_layer: Callable[[int], RowStore]) -> Any:
    """A subclass of vLLM's Qwen4ExpPLEEmbedding whose rows lie in stores.

    Args:
        base: The class Qwen4ExpPLEEmbedding.
        open_layer: Layer of the model (0-based) -> the store of its rows, in a known format.

    Returns:
        The class, with the constructor of the base.
    """

    class StoreEmbedding(base):
        """Rows are read while the blocks before the layer compute."""

        supports_prefetch = True

        def __init__(self, num_embeddings: int, embedding_dim: int, **options: Any) -> None:
            layer = _layer_of(options["prefix"])
            store = open_layer(layer)
            rows = _Rows(layer, store, num_embeddings, embedding_dim)
            super().__init__(num_embeddings, embedding_dim, **options)
            self._rows = rows
            self._dtype = options["params_dtype"]

        def allocate_embedding_weight(
            self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype
        ) -> Tensor:
            """An empty weight: the rows stay in the store."""
            return torch.empty(0, embedding_dim, dtype=dtype)

        def start_prefetch(self, ngram_ids: Tensor) -> None:
            """Requests rows. ngram_ids: int [tokens, heads], row ids of the layer."""
            self._rows.start(ngram_ids)

        def finalize_prefetch(self, total_tokens: int) -> Tensor:
            """The rows [total_tokens, heads * embedding_dim] of the first tokens."""
            return self._rows.finish(total_tokens).to(self._dtype)

        def dequantize(self, embeddings: Tensor, output_dtype: torch.dtype) -> Tensor:
            """The store has decoded the rows already."""
            return embeddings.to(output_dtype)

    return StoreEmbedding


class _Rows:
    """The rows of a layer, of one forward at a time."""

    def __init__(self, layer: int, store: RowStore, rows: int, dim: int) -> None:
        info = store.info
        if info.format is None:
            raise ConfigError(f"layer {layer}: expected a store that knows its row format")
        # vLLM pads the number of rows; ids beyond the table's own do not occur.
        if info.format.d != dim or info.rows > rows:
            raise ConfigError(
                f"layer {layer}: expected rows of {dim} values, at most {rows}, "
                f"found {info.rows} of {info.format.d}"
            )
        self._layer = layer
        self._prefetcher = Prefetcher({layer: (store, info.format)})
        self._ticket: Ticket | None = None
        self._device = torch.device("cpu")

    def start(self, ids_TC: Tensor) -> None:
        ids_1TC = ids_TC.numpy(force=True).astype("int64")[None]
        self._device = ids_TC.device
        self._ticket = self._prefetcher.submit(
            {self._layer: ids_1TC}, device=self._device, owned=True
        )

    def finish(self, tokens: int) -> Tensor:
        if self._ticket is None:
            raise StoreError("rows: expected start_prefetch before finalize_prefetch, found none")
        ticket = self._ticket
        self._ticket = None
        return ticket.wait()[self._layer][0, :tokens]


def _layer_of(prefix: str) -> int:
    """The layer in a module's name, such as model.layers.3.ple. Raises ConfigError."""
    found = re.search(r"(?:^|\.)layers\.(\d+)(?:\.|$)", prefix)
    if found is None:
        raise ConfigError(f"prefix: expected the name of a module in a layer, found {prefix!r}")
    return int(found[1])
