"""The text that a model reads from a large table, and the rows that this text addresses.

Part of bench/hundred_billion.py. All of it follows from the sizes and the text, so it is known
before the table is made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engraphy import EngramConfig, HashSpec, LayerSpec, RowFormat, VocabMap
from engraphy.addresses.addresser import Addresser
from engraphy.data.documents import load_documents
from engraphy.data.tokens import encode, end_id, train_tokenizer
from engraphy.errors import StoreError
from engraphy.store.base import RowStore, StoreInfo
from engraphy.store.cache import CacheStore
from engraphy.store.sets import WAYS, set_bytes
from engraphy.system.files import write_file

DIM = 256
STREAM = 512  # tokens of a call that warms a cache


@dataclass(frozen=True)
class Cell:
    """What is timed at once: prompts, or tokens after a prompt.

    Attributes:
        phase: "prefill" or "decode".
        batch: Sequences side by side.
        prompt: Tokens of each sequence's prompt.
        rounds: Timed turns: prompts of a prefill, tokens of a decode. A prefill has one more
            prompt, which comes first and is not counted.
    """

    phase: str
    batch: int
    prompt: int
    rounds: int

    @property
    def name(self) -> str:
        """As in --cells."""
        return f"{self.phase}-{self.batch}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of its token ids: prompts, sequences, tokens."""
        if self.phase == "prefill":
            return self.rounds + 1, self.batch, self.prompt
        return 1, self.batch, self.prompt + self.rounds

    @property
    def tokens(self) -> int:
        """Tokens of a timed forward."""
        return self.batch * (self.prompt if self.phase == "prefill" else 1)


@dataclass(frozen=True)
class Sizes:
    """What the benchmark makes and measures.

    Attributes:
        rows_per_head: Of the table.
        vocab_size: Ids of tokenizer and model.
        warm_tokens: Tokens of the text that caches have seen before anything is timed.
        cells: What is timed.
        shard_rows: Rows of a shard; None = 1 GiB.
        model: Fields of the Llama that differ from SmolLM2-135M.
    """

    rows_per_head: int
    vocab_size: int
    warm_tokens: int
    cells: tuple[Cell, ...]
    shard_rows: int | None
    model: dict[str, int]

    def cell(self, name: str) -> Cell:
        """The cell of a name."""
        return next(cell for cell in self.cells if cell.name == name)


SIZES = {
    "full": Sizes(
        rows_per_head=8_200_000,
        vocab_size=49_152,
        warm_tokens=20_480,
        cells=(
            Cell("prefill", 1, 256, 12),
            Cell("prefill", 8, 64, 12),
            Cell("decode", 1, 32, 96),
            Cell("decode", 8, 32, 64),
        ),
        shard_rows=None,
        model={},
    ),
    "small": Sizes(
        rows_per_head=2_000,
        vocab_size=512,
        warm_tokens=256,
        cells=(Cell("prefill", 1, 8, 2), Cell("decode", 2, 4, 2)),
        shard_rows=30_000,
        model={
            "hidden_size": 64,
            "num_hidden_layers": 15,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 64,
        },
    ),
}


@dataclass(frozen=True)
class Workload:
    """Token ids, and the rows that they address.

    Attributes:
        sizes: What it was made from.
        text: Name and licence of the text.
        vocab: The map of the tokenizer, which was trained on the text.
        ids: int64, the warm-up's tokens, then those of each cell.
        touched: Layer -> the rows that the ids address, int64, ascending.
    """

    sizes: Sizes
    text: str
    vocab: VocabMap
    ids: np.ndarray
    touched: dict[int, np.ndarray]

    @property
    def config(self) -> EngramConfig:
        """The memory: hash, layers and rows of DeepSeek-V4.1, for a model of one stream."""
        return memory_config(self.sizes, len(self.vocab))

    @property
    def format(self) -> RowFormat:
        """fp8 and scales: 264 bytes a row."""
        return RowFormat("fp8", DIM)

    @property
    def rows(self) -> int:
        """How many rows the text addresses."""
        return sum(map(len, self.touched.values()))

    def tokens(self, cell: Cell) -> np.ndarray:
        """The ids of a cell, int64 [prompts, batch, tokens]."""
        return _parts(self.sizes, self.ids)[cell.name]

    def budget(self, layer: int, percent: float) -> int:
        """Bytes of a cache that has room for a share of the touched rows of a layer."""
        rows = len(self.touched[layer]) * percent / 100
        return max(1, round(rows / WAYS)) * set_bytes(self.format.row_bytes)

    def kept(self, layer: int, percent: float) -> np.ndarray:
        """The rows that such a cache holds after the warm-up's tokens."""
        rows = self.config.hash.row_count(layer)
        cache = CacheStore(NoRows(rows, self.format.row_bytes), self.budget(layer, percent))
        addresser = Addresser(self.config.hash, self.vocab)
        warm = self.ids[: self.sizes.warm_tokens]
        ids_C = addresser.rows(warm[None], layer=layer)[0]
        for first in range(0, len(ids_C), STREAM):
            cache.gather(np.ascontiguousarray(ids_C[first : first + STREAM]).reshape(-1))
        return cache.kept()

    def digest(self) -> str:
        """Identity of the rows that the table needs."""
        sha256 = hashlib.sha256(json.dumps(self.config.to_json(), sort_keys=True).encode())
        for rows_N in self.touched.values():
            sha256.update(rows_N.tobytes())
        return sha256.hexdigest()

    def save(self, folder: Path) -> None:
        """Writes it to a folder; workload.json comes last."""
        self.vocab.save(folder / "vocab.json")
        arrays: dict[str, Any] = {f"layer_{layer}": rows for layer, rows in self.touched.items()}
        np.savez(folder / "workload.npz", ids=self.ids, **arrays)
        facts = {"sizes": dataclasses.asdict(self.sizes), "text": self.text}
        write_file(folder / "workload.json", json.dumps(facts, indent=1))

    @classmethod
    def load(cls, folder: Path) -> Workload:
        """Reads what `save` wrote."""
        facts = json.loads((folder / "workload.json").read_text())
        sizes = facts["sizes"]
        sizes["cells"] = tuple(Cell(**cell) for cell in sizes["cells"])
        with np.load(folder / "workload.npz") as arrays:
            touched = {
                int(name.removeprefix("layer_")): arrays[name] for name in arrays if name != "ids"
            }
            ids = arrays["ids"]
        vocab = VocabMap.load(folder / "vocab.json")
        return cls(Sizes(**sizes), facts["text"], vocab, ids, touched)


def make_workload(sizes: Sizes, data: str) -> Workload:
    """Reads a text, trains a tokenizer on it and computes the rows that it addresses.

    Raises SystemExit if the text is too short.
    """
    documents = load_documents(data)
    tokenizer = train_tokenizer(documents.texts, sizes.vocab_size)
    end = [end_id(tokenizer)]
    ids = np.concatenate(
        [part for ids in encode(tokenizer, documents.texts) for part in (ids, end)]
    )
    needed = _needed(sizes)
    if len(ids) < needed:
        raise SystemExit(f"{data}: expected a text of {needed} tokens, found {len(ids)}")
    ids = ids[:needed].astype(np.int64)
    vocab = VocabMap.from_tokenizer(tokenizer)
    text = f"{documents.name} ({documents.licence})"
    return Workload(sizes, text, vocab, ids, _touched(sizes, vocab, ids))


def memory_config(sizes: Sizes, vocab_size: int) -> EngramConfig:
    """The memory of a model of one stream, with the hash and the layer of DeepSeek-V4.1."""
    spec = HashSpec.deepseek_v41(rows_per_head=sizes.rows_per_head, vocab_size=vocab_size)
    hidden = sizes.model.get("hidden_size", 576)
    layer = LayerSpec.deepseek_v41(hidden, spec.columns * DIM, streams=1, order=spec.order)
    return EngramConfig(spec, layer, DIM)


def _touched(sizes: Sizes, vocab: VocabMap, ids: np.ndarray) -> dict[int, np.ndarray]:
    config = memory_config(sizes, len(vocab))
    addresser = Addresser(config.hash, vocab)
    warm = ids[: sizes.warm_tokens].reshape(1, 1, -1)
    prompts = [prompt for part in (warm, *_parts(sizes, ids).values()) for prompt in part]
    rows = [addresser.all_rows(ids_BT) for ids_BT in prompts]
    return {
        layer: np.unique(np.concatenate([part[i].reshape(-1) for part in rows]))
        for i, layer in enumerate(config.hash.layer_ids)
    }


def _needed(sizes: Sizes) -> int:
    return sizes.warm_tokens + sum(int(np.prod(cell.shape)) for cell in sizes.cells)


def _parts(sizes: Sizes, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The ids of each cell."""
    parts: dict[str, np.ndarray] = {}
    first = sizes.warm_tokens
    for cell in sizes.cells:
        count = int(np.prod(cell.shape))
        parts[cell.name] = ids[first : first + count].reshape(cell.shape)
        first += count
    return parts


class NoRows(RowStore):
    """A store without rows: reading gives whatever lies in memory."""

    def __init__(self, rows: int, row_bytes: int) -> None:
        super().__init__()
        self._info = StoreInfo("none", rows, row_bytes, writable=False)

    @property
    def info(self) -> StoreInfo:
        return self._info

    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None:
        return

    def _scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        raise StoreError("none: expected reads alone, found a write")
