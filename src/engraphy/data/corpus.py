"""Text made ready for the arms of a comparison: tokenizer, vocabulary map and token ids, on disk
for all processes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ..addresses.vocab import VocabMap
from ..errors import ConfigError
from ..system.files import publish_folder
from .documents import load_documents, split_documents
from .packing import Batches
from .tokens import encode, end_id, load_tokenizer, train_tokenizer


@dataclass(frozen=True)
class CorpusConfig:
    """What is read and how. data: as `lm.load_documents` takes it. tokenizer: a tokenizer.json, or
    None = train a BPE of vocab_size on the training documents. heldout: share of the documents that
    no arm sees. batch, length: of a step."""

    data: str = "wiki"
    tokenizer: str | None = None
    vocab_size: int = 2048
    heldout: float = 0.05
    batch: int = 16
    length: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed: expected 0 or more, found {self.seed}")


@dataclass(frozen=True)
class Corpus:
    """Documents as token ids (int32 each), their tokenizer and its vocabulary map."""

    config: CorpusConfig
    name: str
    licence: str
    tokenizer: Tokenizer
    vocab: VocabMap
    training: list[np.ndarray]
    heldout: list[np.ndarray]

    @property
    def end_id(self) -> int:
        """Raw id of the token that ends a document; also the filler of the hash."""
        return end_id(self.tokenizer)

    @property
    def vocab_size(self) -> int:
        """Raw ids of the tokenizer."""
        return self.tokenizer.get_vocab_size()

    def batches(self) -> Batches:
        """Training batches: the same for every arm of one seed."""
        return Batches(
            self.training,
            self.end_id,
            batch=self.config.batch,
            tokens=self.config.length,
            seed=self.config.seed,
        )

    def heldout_batches(self) -> Batches:
        """All held-out documents, in order."""
        return Batches(self.heldout, self.end_id, batch=64, tokens=self.config.length, seed=None)

    def save(self, folder: Path) -> None:
        """Write everything to `folder`, which appears whole. Raises WriteFailed if it cannot."""
        with publish_folder(folder, replace=True, last="corpus.json") as made:
            self._write(made)

    def _write(self, folder: Path) -> None:
        self.tokenizer.save(str(folder / "tokenizer.json"))
        self.vocab.save(folder / "vocab.json")
        for part in ("training", "heldout"):
            documents = getattr(self, part)
            np.savez(
                folder / part,
                ids=np.concatenate(documents),
                lengths=[len(ids) for ids in documents],
            )
        (folder / "corpus.json").write_text(
            json.dumps(
                {"config": asdict(self.config), "name": self.name, "licence": self.licence},
                indent=1,
            )
        )

    @classmethod
    def load(cls, folder: Path, expected: CorpusConfig | None = None) -> Corpus:
        """Read what `save` wrote. Raises ConfigError where there is none, or one of another config
        than `expected`."""
        path = folder / "corpus.json"
        try:
            data = json.loads(path.read_text())
            config, name, licence = CorpusConfig(**data["config"]), data["name"], data["licence"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}: expected the description of a prepared corpus, "
                f"found {type(error).__name__}: {error}"
            ) from None
        if expected is not None and config != expected:
            raise ConfigError(
                f"{folder} was made from {config}, expected {expected}; choose another folder"
            )
        return cls(
            config,
            name,
            licence,
            load_tokenizer(folder / "tokenizer.json"),
            VocabMap.load(folder / "vocab.json"),
            _documents(folder / "training.npz"),
            _documents(folder / "heldout.npz"),
        )


def prepare(config: CorpusConfig) -> Corpus:
    """Read, split, train the tokenizer on the training part, encode."""
    documents = load_documents(config.data)
    training, heldout = split_documents(documents.texts, config.heldout, config.seed)
    tokenizer = (
        train_tokenizer(training, config.vocab_size)
        if config.tokenizer is None
        else load_tokenizer(config.tokenizer)
    )
    return Corpus(
        config,
        documents.name,
        documents.licence,
        tokenizer,
        VocabMap.from_tokenizer(tokenizer),
        _kept(encode(tokenizer, training)),
        _kept(encode(tokenizer, heldout)),
    )


def _kept(documents: list[np.ndarray]) -> list[np.ndarray]:
    return [ids for ids in documents if len(ids)]


def _documents(path: Path) -> list[np.ndarray]:
    with np.load(path) as data:
        return np.split(data["ids"], np.cumsum(data["lengths"])[:-1])
