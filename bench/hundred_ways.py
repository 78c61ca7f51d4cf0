"""The ways to serve a model whose memory has a very large table. Part of bench/hundred_billion.py.

Each way has a copy of one model; the copies share all weights, also those of the memory's layers.
"""

from __future__ import annotations

import copy
import inspect
import mmap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hundred_table import TABLE, dense_rows
from hundred_workload import NoRows, Workload
from llama import llama_135m
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

import engraphy
from engraphy import EngramMemory
from engraphy.addresses.addresser import Addresser
from engraphy.errors import StoreError
from engraphy.hf.versions import cache_argument
from engraphy.memory.lookup import Lookup, TokenLookup, Trace
from engraphy.memory.prefetch import Prefetcher, Ticket
from engraphy.memory.state import SequenceState
from engraphy.memory.ticket import Request
from engraphy.store import open_store, warm
from engraphy.store.base import RowStore, StoreInfo
from engraphy.store.cache import CacheStore
from engraphy.store.mapped import MappedStore

CACHE = str(cache_argument(inspect.signature(LlamaForCausalLM.forward).parameters))
NONE, FIXED, RAM = "none", "fixed", "ram"
PERCENTS = (0.1, 1, 10)
VALUE = 0.01  # of the fixed row
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux; Python names it from 3.13 on
_CHUNK = 1 << 16  # rows


@dataclass(frozen=True)
class Way:
    """One way to serve, by name:

        none         the model without a memory
        fixed        its memory layers get one fixed row, without addresses and without a store
        ram          the touched rows in RAM
        sync-STATE   read from the file before the first block, without a cache
        STATE-P      read from the file ahead, with a cache of P % of the touched rows

    The states:

        cold   no row was read before: direct reads (O_DIRECT), and an empty cache
        disk   direct reads, and a cache that has seen the warm-up's text
        warm   the page cache has the touched rows, and the cache has seen the warm-up's text
    """

    name: str

    @property
    def parts(self) -> list[str]:
        return self.name.split("-")

    @property
    def in_file(self) -> bool:
        """Whether rows are read from the file."""
        return self.name not in (NONE, FIXED, RAM)

    @property
    def state(self) -> str:
        """cold, disk or warm."""
        return self.parts[1] if self.parts[0] == "sync" else self.parts[0]

    @property
    def percent(self) -> float | None:
        """Size of the cache; None without a cache."""
        return None if not self.in_file or self.parts[0] == "sync" else float(self.parts[1])

    @property
    def needs_pages(self) -> bool:
        """Whether the rows that are read have to be in the page cache."""
        return self.in_file and self.state == "warm"


WAYS = [
    *(NONE, FIXED, RAM, "sync-cold", "sync-warm"),
    *(f"{state}-{percent:g}" for state in ("cold", "disk", "warm") for percent in PERCENTS),
    "warm-100",
]


class FixedRows(EngramMemory):
    """A memory that gives the same rows to every token: what its layers cost by themselves."""

    @cached_property
    def _fixed(self) -> dict[tuple[int, ...], Any]:
        return {}

    def lookup_eagerly(
        self,
        ids_BT: Tensor,
        state: SequenceState | None = None,
        live: Tensor | None = None,
        starts: Tensor | None = None,
        trace: Trace | None = None,
        *,
        present: Tensor | None = None,
    ) -> Lookup:
        batch, tokens = ids_BT.shape
        cursor = None if state is None or tokens > 1 else state.cursor()
        if state is not None and cursor is not None:
            cursor.advance()
            return TokenLookup(self.layers, self._token(batch), state, cursor)
        if state is not None:
            state.extend_checked(ids_BT.numpy(), None, None, None)
        rows_BTE = self._chunk(batch, tokens)
        return Lookup(dict.fromkeys(self.layers, rows_BTE), None, None, state, None)

    def _token(self, batch: int) -> bytearray:
        if (batch,) not in self._fixed:
            values = np.full(batch * len(self.layers) * self.config.layer.width, VALUE, np.float32)
            self._fixed[(batch,)] = bytearray(values.tobytes())
        return self._fixed[(batch,)]

    def _chunk(self, batch: int, tokens: int) -> Tensor:
        shape = (batch, tokens, self.config.layer.width)
        if shape not in self._fixed:
            self._fixed[shape] = torch.full(shape, VALUE)
        return self._fixed[shape]


class Synchronous(Prefetcher):
    """Reads in the caller's thread, as if there were nothing to compute meanwhile."""

    def read(
        self, request: Request, *, device: torch.device | str | None = None, now: bool = False
    ) -> Ticket:
        return super().read(request, device=device, now=True)


class SparseRam(MappedStore):
    """As many rows as a layer has, in anonymous memory, which takes space for written rows alone.

    A written row takes its page of 4 KiB. So ids, code and random cache lines are those of a table
    that is in RAM as a whole.
    """

    in_memory = True

    def __init__(self, rows: int, row_bytes: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
        memory = mmap.mmap(-1, rows * row_bytes, flags=flags)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        self._info = StoreInfo("ram", rows, row_bytes, writable=True)
        super().__init__([np.frombuffer(memory, np.uint8).reshape(rows, row_bytes)])

    @property
    def info(self) -> StoreInfo:
        return self._info


class DenseRows(RowStore):
    """Some rows of a layer, close together: RAM and caches are filled from here.

    Args:
        info: of the layer.
        ids_N: the rows that there are, ascending.
        rows_NR: the rows.
    """

    def __init__(self, info: StoreInfo, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        super().__init__()
        self._info = info
        self._ids_N = ids_N
        self._rows_NR = rows_NR

    @property
    def info(self) -> StoreInfo:
        return self._info

    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None:
        np.take(self._rows_NR, np.searchsorted(self._ids_N, ids_N), axis=0, out=out_NR)

    def _scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        raise StoreError("dense: expected reads alone, found a write")


@dataclass
class Clocks:
    """Seconds within the memory's hooks, since they were last set to zero.

    Attributes:
        lookup: Before the decoder.
        layers: Before the layers with a memory: waiting and fusion.
    """

    lookup: float = 0.0
    layers: float = 0.0


class Served:
    """A model served in one way.

    Attributes:
        way: The way.
        memory: Its memory; None for the model alone.
        clocks: Of its memory's hooks.
    """

    def __init__(self, way: Way, model: Any, memory: EngramMemory | None) -> None:
        self.way = way
        self.memory = memory
        self.clocks = Clocks()
        shared = {id(parameter): parameter for parameter in model.parameters()}
        self._model = copy.deepcopy(model, dict(shared))
        self._cache: Any = None
        if memory is not None:
            engraphy.attach(self._model, memory)
            self._clock(memory)

    def _clock(self, memory: EngramMemory) -> None:
        """Clocks around the memory's hooks."""
        clocks = self.clocks
        begun = 0.0

        def start(*_: Any) -> None:
            nonlocal begun
            begun = time.perf_counter()

        def stop_lookup(*_: Any) -> None:
            clocks.lookup += time.perf_counter() - begun

        def stop_layer(*_: Any) -> None:
            clocks.layers += time.perf_counter() - begun

        decoder = self._model.model
        stops = [(decoder, stop_lookup)]
        stops += [(decoder.layers[layer], stop_layer) for layer in memory.layers]
        for module, stop in stops:
            module.register_forward_pre_hook(start, prepend=True)
            module.register_forward_pre_hook(stop)

    def restart(self) -> None:
        """Forgets the tokens so far."""
        self._cache = DynamicCache(config=self._model.config)

    def forward(self, ids_BT: Tensor) -> tuple[dict[str, float], Tensor]:
        """Seconds by part, and the logits of the last token.

        The parts: all of it, the look-up, the memory's layers, and how long these waited for rows.
        """
        waited = self._waited()
        self.clocks.lookup = self.clocks.layers = 0.0
        begun = time.perf_counter()
        logits = self._model(ids_BT, **{CACHE: self._cache}, logits_to_keep=1).logits
        total = time.perf_counter() - begun
        parts = {
            "total": total,
            "lookup": self.clocks.lookup,
            "layers": self.clocks.layers,
            "wait": self._waited() - waited,
        }
        return parts, logits

    def _waited(self) -> float:
        return 0.0 if self.memory is None else self.memory.prefetcher.stats.waited.seconds

    def counters(self) -> dict[str, float]:
        """What the stores of all layers have counted: rows, hits, and seconds of reading."""
        stores = [] if self.memory is None else list(self.memory.stores.values())
        stats = [store.stats for store in stores]
        return {
            "rows": sum(s.rows for s in stats),
            "hits": sum(s.hits or 0 for s in stats),
            "seconds": sum(s.latency.seconds for s in stats),
        }

    def close(self) -> None:
        """Closes the memory and its stores."""
        if self.memory is not None:
            engraphy.detach(self._model)
            self.memory.close()
            for store in self.memory.stores.values():
                if self.way.name != RAM:  # rows in RAM are made once
                    store.close()


class Ways:
    """Makes the ways to serve one workload. Rows in RAM and warm caches are made once."""

    def __init__(self, folder: Path, workload: Workload) -> None:
        self._folder = folder
        self._url = f"file:{folder / TABLE}?read=pread"
        self._workload = workload
        self._model = llama_135m(vocab_size=workload.sizes.vocab_size, **workload.sizes.model)[0]
        self._model.eval()
        self._first: EngramMemory | None = None
        self._ram: dict[int, RowStore] = {}
        self._dense: dict[int, RowStore] = {}
        self._kept: dict[tuple[int, float], np.ndarray] = {}

    def serve(self, names: Sequence[str]) -> dict[str, Served]:
        """The ways by name, opened anew: caches of cold ways are empty."""
        ways = [Way(name) for name in names]
        served = {}
        for way in ways:
            memory = None if way.name == NONE else self._memory(way)
            served[way.name] = Served(way, self._model, memory)
        self._dense.clear()
        return served

    def keep_awake(self, served: dict[str, Served], prompts: Sequence[Tensor]) -> None:
        """Brings the rows of some ids [B, T] into the page cache, and reads all rows in RAM.

        Rows in RAM come last, all of them: they are more than the caches of a processor hold, so
        none of the rows that are timed next is left there.
        """
        if any(way.way.needs_pages for way in served.values()):
            self._bring_pages(prompts)
        if RAM in served:
            for layer, rows_N in self._workload.touched.items():
                for first in range(0, len(rows_N), _CHUNK):
                    self._ram[layer].gather(rows_N[first : first + _CHUNK])

    def _bring_pages(self, prompts: Sequence[Tensor]) -> None:
        workload = self._workload
        addresser = Addresser(workload.config.hash, workload.vocab)
        for layer in workload.touched:
            rows = [addresser.rows(ids_BT.numpy(), layer=layer) for ids_BT in prompts]
            rows_N = np.unique(np.concatenate([rows_BTC.reshape(-1) for rows_BTC in rows]))
            store = open_store(self._url, layer=layer)
            for first in range(0, len(rows_N), _CHUNK):
                store.gather(rows_N[first : first + _CHUNK])
            store.close()

    def _memory(self, way: Way) -> EngramMemory:
        workload = self._workload
        kind = FixedRows if way.name == FIXED else EngramMemory
        stores = {layer: self._store(way, layer) for layer in workload.touched}
        memory = kind(workload.config, workload.vocab, stores, workload.format).eval()
        if way.parts[0] == "sync":
            memory.prefetcher = Synchronous(memory.stores)
        if self._first is None:
            torch.manual_seed(1)
            for parameter in memory.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
            self._first = memory
        memory.blocks = self._first.blocks
        return memory

    def _store(self, way: Way, layer: int) -> RowStore:
        workload = self._workload
        if way.name == FIXED:
            return NoRows(*self._sizes(layer))
        if way.name == RAM:
            if layer not in self._ram:
                self._ram[layer] = SparseRam(*self._sizes(layer))
                rows_N = workload.touched[layer]
                self._ram[layer].scatter(rows_N, self._rows(layer).gather(rows_N))
            return self._ram[layer]
        direct = f"{self._url}&direct=1"
        if way.percent is None:
            return open_store(self._url if way.state == "warm" else direct, layer=layer)
        file = open_store(self._url if way.state == "warm" else direct, layer=layer)
        budget = workload.budget(layer, way.percent)
        if way.state == "cold":
            return CacheStore(file, budget)
        cache = CacheStore(self._rows(layer), budget)
        warm(cache, self._kept_rows(layer, way.percent))
        cache.inner = file
        return cache

    def _rows(self, layer: int) -> RowStore:
        """The touched rows, to fill RAM and caches."""
        if layer not in self._dense:
            rows_NR = dense_rows(self._folder, self._workload, layer)
            info = StoreInfo("dense", *self._sizes(layer), writable=False)
            self._dense[layer] = DenseRows(info, self._workload.touched[layer], rows_NR)
        return self._dense[layer]

    def _sizes(self, layer: int) -> tuple[int, int]:
        """Rows of a layer, and bytes of a row."""
        return self._workload.config.hash.row_count(layer), self._workload.format.row_bytes

    def _kept_rows(self, layer: int, percent: float) -> np.ndarray:
        if (layer, percent) not in self._kept:
            rows_N = self._workload.touched[layer]
            if percent < 100:
                rows_N = self._workload.kept(layer, percent)
            self._kept[layer, percent] = rows_N
        return self._kept[layer, percent]
