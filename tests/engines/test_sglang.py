"""What of the plugin for SGLang needs no SGLang: its batches as chunks, the ids before them, what
is refused, and rows for its stager. `make test-engines` runs SGLang itself."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engraphy import EngramMemory
from engraphy.engines.served import ServedMemory
from engraphy.engines.sglang.batches import chunks_of, ids_before
from engraphy.engines.sglang.plugin import note_history
from engraphy.engines.sglang.refusals import SETTINGS, check_settings
from engraphy.engines.sglang.staging import read_from_stores
from engraphy.engines.slots import slot_width
from engraphy.errors import ConfigError, InputError
from engraphy.rows.format import RowFormat
from engraphy.store.opening import open_store
from tests.engines.test_served import VOCAB, expected, make_memory, run

PAST = 9


class Mode:
    """A ForwardMode."""

    def __init__(self, name: str) -> None:
        self.is_decode = lambda: name == "decode"
        self.is_idle = lambda: name == "idle"


@dataclass
class Batch:
    """Of a ForwardBatch, what is read."""

    forward_mode: Mode
    batch_size: int
    input_ids: torch.Tensor
    positions: torch.Tensor
    out_cache_loc: torch.Tensor
    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    extend_seq_lens_cpu: list[int] | None = None
    input_embeds: Any = None
    replace_embeds: Any = None
    engram_history: Any = None


@dataclass
class Request:
    """A request of SGLang's. text: prompt and output. done: how many of its tokens have slots."""

    text: list[int]
    row: int
    prompt: int
    done: int = 0
    rid: str = "r"
    outs: list[torch.Tensor] = field(default_factory=list)

    @property
    def origin_input_ids(self) -> list[int]:
        return self.text[: self.prompt]

    @property
    def output_ids(self) -> list[int]:
        return self.text[self.prompt : max(self.done + 1, self.prompt)]


class Scheduler:
    """Requests, their slots, and the forwards that SGLang would ask for."""

    def __init__(self, memory: EngramMemory, requests: list[Request]) -> None:
        self.free = np.random.default_rng(0).permutation(np.arange(1, 120)).tolist()
        self.table = torch.zeros(len(requests) + 1, 40, dtype=torch.int32)
        self.served = ServedMemory(memory, torch.device("cpu"), torch.float32)
        self.served.bind(torch.full((120, 1, slot_width(memory.config)), 7e4))
        self.runner = SimpleNamespace(model=SimpleNamespace(served_memory=self.served))
        self.hidden_VD = torch.randn(VOCAB, 16, generator=torch.Generator().manual_seed(1))

    def forward(self, mode: str, parts: list[tuple[Request, int]]) -> None:
        """Computes the next tokens of some requests, as many of each as its number says."""
        requests = [request for request, _ in parts]
        starts = [request.done for request in requests]
        lengths = [length for _, length in parts]
        ids, positions, slots = [], [], []
        for request, length in parts:
            at = list(range(request.done, request.done + length))
            taken = [self.free.pop() for _ in at]
            self.table[request.row, at] = torch.tensor(taken, dtype=torch.int32)
            ids += request.text[at[0] : at[-1] + 1]
            positions += at
            slots += taken
        batch = Batch(
            Mode(mode),
            len(parts),
            torch.tensor(ids),
            torch.tensor(positions),
            torch.tensor(slots),
            torch.tensor([request.row for request in requests]),
            torch.tensor([start + length for start, length in zip(starts, lengths, strict=True)]),
            None if mode == "decode" else lengths,
        )
        note_history(batch, Batch, SimpleNamespace(reqs=requests, prefix_lens=starts), self.runner)
        chunks = chunks_of(batch, self.table, self.served.past)
        assert chunks is not None
        step = self.served.begin(chunks, batch.engram_history.numpy())
        out_LND = run(step, self.served, self.hidden_VD, chunks)
        for request, out_LTD in zip(requests, out_LND.split(lengths, dim=1), strict=True):
            request.outs.append(out_LTD)
            request.done += out_LTD.shape[1]


def test_chunks_decoding_hits_and_both_in_one_batch_give_what_one_forward_gives():
    memory = make_memory()
    rng = np.random.default_rng(2)
    first = Request(rng.integers(3, VOCAB, 14).tolist(), 1, 11)
    second = Request(first.text[:8] + rng.integers(3, VOCAB, 7).tolist(), 2, 12)
    engine = Scheduler(memory, [first, second])
    engine.forward("extend", [(first, 6)])
    engine.forward("extend", [(first, 5)])
    engine.table[2, :8] = engine.table[1, :8]  # found in the radix cache
    second.done = 8
    engine.forward("extend", [(second, 4), (first, 1)])  # MIXED
    engine.forward("decode", [(first, 1), (second, 1)])
    engine.forward("decode", [(second, 1)])
    for request, skipped in ((first, 0), (second, 8)):
        wanted_LTD = expected(memory, request.text, engine.hidden_VD)
        got_LTD = torch.cat(request.outs, dim=1)
        torch.testing.assert_close(got_LTD, wanted_LTD[:, skipped : request.done])


def test_slots_that_hold_other_tokens_are_noticed():
    request = Request(list(range(3, 15)), 1, 12)
    engine = Scheduler(make_memory(), [request])
    engine.forward("extend", [(request, 6)])
    engine.table[1, 4] = engine.table[1, 3]  # something moved the KV cache
    with pytest.raises(InputError, match=r"expected .*\[\[7, 8\]\], found .*\[\[6, 8\]\]"):
        engine.forward("extend", [(request, 2)])


def test_ids_before_a_chunk_come_from_prompt_and_output():
    request = Request([5, 6, 7, 8, 9], 1, prompt=3, done=4)
    for start, ids in ((0, [-1, -1]), (1, [-1, 5]), (3, [6, 7]), (4, [7, 8]), (5, [8, 9])):
        assert ids_before([request], [start], 2).tolist() == [ids]
    with pytest.raises(InputError, match="request r: expected 6 ids on the host, found 5"):
        ids_before([request], [6], 2)


def test_embeddings_in_place_of_ids_are_refused_and_idle_batches_have_no_chunks():
    one = torch.tensor([0])
    batch = Batch(Mode("idle"), 0, one[:0], one[:0], one[:0], one[:0], one[:0])
    assert chunks_of(batch, torch.zeros(1, 1), 3) is None
    with pytest.raises(InputError, match="expected token ids, found input_embeds"):
        chunks_of(replace(batch, input_embeds=one), torch.zeros(1, 1), 3)


def test_models_without_a_memory_get_no_history():
    batch = SimpleNamespace(engram_history=None)
    note_history(batch, Batch, None, SimpleNamespace(model=SimpleNamespace()))
    assert batch.engram_history is None


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_each_setting_is_refused_by_name(setting):
    accepted = {each.name: each.expected for each in SETTINGS}
    check_settings(accepted, graphs=False)
    with pytest.raises(ConfigError, match=f"{setting.name}: expected .*, found 'other'"):
        check_settings(accepted | {setting.name: "other"}, graphs=False)


def test_captured_graphs_are_refused_by_name():
    accepted = {each.name: each.expected for each in SETTINGS}
    with pytest.raises(ConfigError, match="--disable-cuda-graph"):
        check_settings(accepted, graphs=True)


class Stager:
    """Of SGLang's EngramRowStager, what is replaced."""

    def __init__(self, tables: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.tables = tables

    def _gather(self, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.index_select(table, 0, ids)

    def stage(self, ids_NLC: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        staged = []
        for layer, (weight, scale) in enumerate(self.tables):
            layer_ids = ids_NLC[:, layer].reshape(-1)
            staged.append((self._gather(weight, layer_ids), self._gather(scale, layer_ids)))
        return staged


def test_a_stager_gets_the_same_rows_from_stores_and_each_record_once():
    fmt, generator = RowFormat("fp8", 64), np.random.default_rng(0)
    stores, tables = [], []
    for rows in (40, 30):
        raw_NR = fmt.encode(generator.standard_normal((rows, 64)).astype(np.float32))
        store = open_store("ram:", rows=rows, row_bytes=fmt.row_bytes)
        store.scatter(np.arange(rows), raw_NR)
        stores.append(store)
        tables.append((torch.from_numpy(raw_NR[:, :64]), torch.from_numpy(raw_NR[:, 64:])))
    ids_NLC = torch.from_numpy(generator.integers(0, 30, (5, 2, 3)))
    stager = Stager(tables)
    wanted = stager.stage(ids_NLC)
    read_from_stores(stager, stores, pin_memory=False)
    for parts, others in zip(stager.stage(ids_NLC), wanted, strict=True):
        for part, other in zip(parts, others, strict=True):
            assert part.is_contiguous() and torch.equal(part, other)
    assert [(store.stats.gathers, store.stats.rows) for store in stores] == [(1, 15), (1, 15)]


def test_stores_of_another_size_are_named():
    tables = [(torch.zeros(40, 64), torch.zeros(40, 2))]
    store = open_store("ram:", rows=39, row_bytes=66)
    with pytest.raises(ConfigError, match=r"\(40, 66\), found \(39, 66\)"):
        read_from_stores(Stager(tables), [store])
    with pytest.raises(ConfigError, match="expected 1 stores, found 0"):
        read_from_stores(Stager(tables), [])
