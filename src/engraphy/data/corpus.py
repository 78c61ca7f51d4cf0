"""Text prepared for the arms of a comparison: tokenizer, vocabulary map and token ids, on disk for
all processes, each document with the name of its source."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from ..addresses.vocab import VocabMap
from ..errors import ConfigError
from ..system.files import publish_folder
from .documents import load_documents
from .encoded import Encoded, encode_documents
from .mix import Part, is_mix, open_mix
from .packing import Batches
from .sources import LabelledText
from .tokens import end_id, load_tokenizer, train_tokenizer


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
        parts: What a mix is made of; empty for a text of one source.
        tokenizer: The tokenizer that gave the ids.
        vocab: The tokenizer's vocabulary map.
        training: Documents to train on, each with the name of its source.
        heldout: Documents held out, likewise.
    """

    config: CorpusConfig
    name: str
    licence: str
    parts: tuple[Part, ...]
    tokenizer: Tokenizer
    vocab: VocabMap
    training: Encoded
    heldout: Encoded

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
        self.training.save(folder, "training")
        self.heldout.save(folder, "heldout")
        description = {
            "config": asdict(self.config),
            "name": self.name,
            "licence": self.licence,
            "parts": [asdict(part) for part in self.parts],
        }
        (folder / "corpus.json").write_text(json.dumps(description, indent=1))

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
            parts = tuple(Part(**part) for part in data["parts"])
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
            parts,
            load_tokenizer(folder / "tokenizer.json"),
            VocabMap.load(folder / "vocab.json"),
            Encoded.load(folder, "training"),
            Encoded.load(folder, "heldout"),
        )


def prepare(config: CorpusConfig) -> Corpus:
    """Reads the documents, splits them, trains a tokenizer on the training part, and encodes both.

    Ids of a large text lie in temporary files until `Corpus.save` writes them. Of a mix nothing
    else is kept
    either: its texts are read once to choose documents, once to train the tokenizer on them, and
    twice to encode them.

    Raises:
        DataUnavailable: The text or the tokenizer does not exist.
        InputError: The text is too short, or not UTF-8.
        ConfigError: A setting is invalid.
    """
    text: _Text
    text = _of_mix(config) if is_mix(config.data) else _of_documents(config)
    if config.tokenizer is None:
        tokenizer = train_tokenizer((each.text for each in text.training()), config.vocab_size)
    else:
        tokenizer = load_tokenizer(config.tokenizer)
    return Corpus(
        config,
        text.name,
        text.licence,
        text.parts,
        tokenizer,
        VocabMap.from_tokenizer(tokenizer),
        encode_documents(tokenizer, text.training(), text.sources),
        encode_documents(tokenizer, text.heldout(), text.sources),
    )


class _Text(NamedTuple):
    """A split text that can be read more than once."""

    name: str
    licence: str
    parts: tuple[Part, ...]
    sources: tuple[str, ...]
    training: Callable[[], Iterator[LabelledText]]
    heldout: Callable[[], Iterator[LabelledText]]


def _of_mix(config: CorpusConfig) -> _Text:
    mix = open_mix(config.data, config.heldout, config.seed)
    licences = dict.fromkeys(part.licence for part in mix.parts)
    sources = tuple(part.source for part in mix.parts)
    return _Text(config.data, "; ".join(licences), mix.parts, sources, mix.training, mix.heldout)


def _of_documents(config: CorpusConfig) -> _Text:
    documents = load_documents(config.data)
    training, heldout = documents.split(config.heldout, config.seed)
    name = documents.name

    def labelled(texts: list[str]) -> Iterator[LabelledText]:
        return (LabelledText(name, text, index) for index, text in enumerate(texts))

    return _Text(
        name,
        documents.licence,
        (),
        (name,),
        lambda: labelled(training),
        lambda: labelled(heldout),
    )
