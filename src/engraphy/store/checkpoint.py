"""One layer of a released checkpoint, served from its own files: nothing is copied or written.

If a tensor holds whole records (Qwen4-Exp, and GGUF files), its parts are mapped memory like a
table's shards. The release of DeepSeek-V4.1 keeps the scales in a tensor of their own: a gather
reads both and joins them to the records that a converted table has.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..addresses.vocab import VocabMap
from ..errors import EngraphyError, ShardForeign, ShardMissing, StoreError
from ..released.checkpoint import Checkpoint
from ..rows.read import take
from ..table.safetensors import StoredTensor
from .base import RowStore, StoreInfo
from .mapped import MappedStore
from .mapping import MappedFile, Watch


class MappedCheckpoint(MappedStore):
    """A layer whose tensors hold whole records.

    Args:
        checkpoint: the open checkpoint.
        layer: the model's layer, 0-based.
        vocab: the checkpoint's vocabulary map (`Checkpoint.vocab`).
    """

    def __init__(self, checkpoint: Checkpoint, layer: int, vocab: VocabMap) -> None:
        files = _map_files(checkpoint.weights[layer])
        watch = Watch(list(files.values()), _Unchanged(checkpoint, list(files)).check)
        super().__init__(_map(files, checkpoint.weights[layer]), watch)
        self._info = _info(checkpoint, layer, vocab)

    @property
    def info(self) -> StoreInfo:
        return self._info

    def count_token(self, rows: int, taken: int) -> None:
        """Also checks, now and then, that the files are the same. If not, the next read raises."""
        super().count_token(rows, taken)
        if self._watch is not None:
            try:
                self._watch.before()
            except EngraphyError:
                self.pinned = ()  # raised now, it would come after the sequence's state has changed


class InterleavedCheckpoint(RowStore):
    """A layer of weights and scales in two tensors, joined to records as they are read.

    Takes the arguments of `MappedCheckpoint`.
    """

    def __init__(self, checkpoint: Checkpoint, layer: int, vocab: VocabMap) -> None:
        super().__init__()
        weights = checkpoint.weights[layer]
        scales = checkpoint.scales[layer]
        files = _map_files([*weights, *scales])
        # One attribute, so that a reader takes both at once while another thread closes the store.
        self._tensors = (_map(files, weights), _map(files, scales))
        self._watch = Watch(list(files.values()), _Unchanged(checkpoint, list(files)).check)
        self._info = _info(checkpoint, layer, vocab)

    @property
    def info(self) -> StoreInfo:
        return self._info

    def close(self) -> None:
        super().close()
        # The files are unmapped when the last gather that is under way lets go of the arrays.
        self._tensors = (list[np.ndarray](), list[np.ndarray]())

    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None:
        weights, scales = self._tensors
        self._check_open()
        self._watch.before()
        width = weights[0].shape[1]
        take(weights, ids_N, out_NR[:, :width])
        take(scales, ids_N, out_NR[:, width:])
        self._watch.after()

    def _scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        raise StoreError(f"{self._info.path}: a checkpoint is read-only")


class _Unchanged:
    """Checks that the files of a checkpoint are still those that were opened.

    A file that another one was renamed to, or that was written to, may hold other rows. A file that
    is gone stays mapped, and is served on.
    """

    def __init__(self, checkpoint: Checkpoint, files: Sequence[Path]) -> None:
        self._path = checkpoint.path
        self._source_id = checkpoint.source_id
        self._files = files
        self._known = self._marks()

    def _marks(self) -> list[tuple[int, ...]] | None:
        """What tells a file from another one, or from its earlier state; None if one is gone."""
        try:
            stats = [os.stat(file) for file in self._files]
        except OSError:
            return None
        return [(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats]

    def check(self) -> None:
        """Raises ShardForeign if the files hold other rows now, TableError if they are broken."""
        marks = self._marks()
        if marks is None or marks == self._known:
            return
        found = Checkpoint.open(self._path).source_id  # the same after a mere `touch`
        if found != self._source_id:
            raise ShardForeign(
                f"{self._path}: expected source {self._source_id}, found {found}: the files were "
                "replaced while they were served; open the store again"
            )
        self._known = marks


def open_checkpoint(
    path: str | os.PathLike[str], layer: int, vocab: str | os.PathLike[str] | None = None
) -> RowStore:
    """Opens the store of one layer of a checkpoint.

    Args:
        path: the folder of the checkpoint, or its GGUF file.
        layer: the model's layer, 0-based.
        vocab: the file of a saved vocabulary map; None for the map of the checkpoint's tokenizer,
            or of its GGUF file.

    Raises:
        ConfigError: if the layer has no memory.
        EngraphyError: as `Checkpoint.open` and `Checkpoint.vocab` raise it.
    """
    checkpoint = Checkpoint.open(path)
    checkpoint.config.hash.layer_index(layer)
    kind = InterleavedCheckpoint if checkpoint.scales[layer] else MappedCheckpoint
    return kind(checkpoint, layer, checkpoint.vocab(vocab))


def _info(checkpoint: Checkpoint, layer: int, vocab: VocabMap) -> StoreInfo:
    config = checkpoint.config
    return StoreInfo(
        "checkpoint",
        config.hash.row_count(layer),
        checkpoint.fmt.row_bytes,
        False,
        checkpoint.source_id,
        layer,
        str(checkpoint.path),
        checkpoint.fmt,
        config.address_digest(vocab.digest),
        "mmap",
    )


def _map_files(tensors: Sequence[StoredTensor]) -> dict[Path, MappedFile]:
    """Maps each file once, however many of the tensors it holds."""
    files: dict[Path, MappedFile] = {}
    for tensor in tensors:
        path = tensor.path
        if path in files:
            continue
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ShardMissing(
                f"{path}: expected a shard of the checkpoint, found no file"
            ) from None
        try:
            files[path] = MappedFile(fd, str(path), os.fstat(fd).st_size)
        finally:
            os.close(fd)
    return files


def _map(files: dict[Path, MappedFile], tensors: Sequence[StoredTensor]) -> list[np.ndarray]:
    return [
        files[tensor.path].records(tensor.offset, tensor.rows, tensor.row_bytes)
        for tensor in tensors
    ]
