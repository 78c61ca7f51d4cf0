"""Text prepared for the arms of a comparison: tokenizer, vocabulary map and token ids, on disk for
all processes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ..addresses.vocab import VocabMap
from ..errors import ConfigError
from ..system.files import publish_folder
from .documents import load_documents
from .packing import Batches
from .tokens import encode, end_id, load_tokenizer, train_tokenizer


@dataclass(frozen=True)
class CorpusConfig:
    """What text to read, and how to split and encode it.

    Attributes:
        data: As `load_documents` takes it.
        tokenizer: Path of a tokenizer.json. None = train a BPE of vocab_size on the training
            documents.
        vocab_size: Size of the tokenizer, if it is trained here.
        heldout: Share of the documents that no arm sees. Books have a split of their own.
        batch: Rows of a step.
        length: Tokens of a row.
        seed: Seed of the split, and of the order of the text.

    Raises:
        ConfigError: The seed is negative.
    """

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
    """Documents as token ids, their tokenizer and its vocabulary map.

    Attributes:
        config: What it was made from.
        name: Name of the text.
        licence: Licence of the text.
        tokenizer: The tokenizer that gave the ids.
        vocab: The tokenizer's vocabulary map.
        training: Documents to train on, int32 each.
        heldout: Documents held out, int32 each.
    """

    config: CorpusConfig
    name: str
    licence: str
    tokenizer: Tokenizer
    vocab: VocabMap
    training: list[np.ndarray]
    heldout: list[np.ndarray]

    @property
    def end_id(self) -> int:
        """Raw id of the token that ends a document. It is the filler of the hash too."""
        return end_id(self.tokenizer)

    @property
    def vocab_size(self) -> int:
        """Number of raw ids of the tokenizer."""
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
        """Writes everything to `folder`, which appears whole.

        Raises:
            WriteFailed: The system refuses to write.
        """
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
        """Reads what `save` wrote.

        Args:
            folder: The folder that `save` wrote.
            expected: The config that the corpus must have; None = any.

        Raises:
            ConfigError: The folder has no corpus, or one of another config.
        """
        path = folder / "corpus.json"
        try:
            data = json.loads(path.read_text())
            config = CorpusConfig(**data["config"])
            name = data["name"]
            licence = data["licence"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}: expected the description of a prepared corpus, "
                f"found {type(error).__name__}: {error}"
            ) from None
        if expected is not None and config != expected:
            raise ConfigError(
                f"{folder}: expected a corpus of {expected}, found one of {config}; "
                "choose another folder"
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
    """Reads the documents, splits them, trains a tokenizer on the training part, and encodes both.

    Raises:
        DataUnavailable: The text or the tokenizer does not exist.
        InputError: The text is too short, or not UTF-8.
        ConfigError: A setting is invalid.
    """
    documents = load_documents(config.data)
    training, heldout = documents.split(config.heldout, config.seed)
    if config.tokenizer is None:
        tokenizer = train_tokenizer(training, config.vocab_size)
    else:
        tokenizer = load_tokenizer(config.tokenizer)
    return Corpus(
        config,
        documents.name,
        documents.licence,
        tokenizer,
        VocabMap.from_tokenizer(tokenizer),
        _without_empty(encode(tokenizer, training)),
        _without_empty(encode(tokenizer, heldout)),
    )


def _without_empty(documents: list[np.ndarray]) -> list[np.ndarray]:
    return [ids for ids in documents if len(ids)]


def _documents(path: Path) -> list[np.ndarray]:
    with np.load(path) as data:
        return np.split(data["ids"], np.cumsum(data["lengths"])[:-1])
