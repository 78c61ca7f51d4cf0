"""engram.json, the description of a table, as a frozen value that is read and written as a whole.

Rows, shards, sizes and digest follow from the configuration. They are written for readers without
this library, and compared when the file is read, which finds fields that were edited. A checksum of
all fields also protects those that follow from no other field.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ..addresses.hot import HotIndex
from ..errors import ConfigError, DigestMismatch, TableError
from ..rows.format import RowFormat
from ..spec.config import EngramConfig
from ..system.files import write_file
from ..system.lfs import refuse_pointer
from .hot import check_file, read_index
from .shards import Shard, shards_of

FILE_NAME = "engram.json"
FORMAT = "engraphy-table"
VERSION = 1
_FIELDS = {
    "table_id": str,
    "parent": (str, type(None)),
    "next_id": (str, type(None)),
    "vocab_digest": str,
    "address_digest": str,
    "config": dict,
    "row_format": dict,
    "shard_rows": int,
    "layers": list,
}


@dataclass(frozen=True)
class Manifest:
    """One state of a table.

    Attributes:
        directory: The table's folder.
        config: The memory that the table belongs to.
        fmt: Format of the rows.
        vocab_digest: Identity of the vocabulary map.
        shard_rows: Rows of every shard except a layer's last.
        table_id: Identity of the rows, 32 hex digits.
        parent: The previous table_id, or that of the table this one was made from; None = neither.
        next_id: The table_id that the next seal gives if rows have changed; None = sealed.
        sha256: File name of each shard -> SHA-256 of its rows at the last seal; None = never
            sealed.
    """

    directory: Path
    config: EngramConfig
    fmt: RowFormat
    vocab_digest: str
    shard_rows: int
    table_id: str
    parent: str | None
    next_id: str | None
    sha256: Mapping[str, str | None]

    @property
    def address_digest(self) -> str:
        """Identity of the addresses (`EngramConfig.address_digest`)."""
        return self.config.address_digest(self.vocab_digest)

    @property
    def table_ids(self) -> tuple[str, ...]:
        """The ids that a shard may have: the table_id, and while open also the next one."""
        if self.next_id is None:
            return (self.table_id,)
        return (self.table_id, self.next_id)

    def shards(self, layer: int) -> list[Shard]:
        """Shards of a layer.

        Raises:
            ConfigError: The layer has no memory.
        """
        rows = self.config.row_count(layer)
        return shards_of(self.directory, layer, rows, self.shard_rows, self.fmt.row_bytes)

    def all_shards(self) -> list[Shard]:
        """Shards of all layers."""
        return [shard for layer in self.config.hash.layer_ids for shard in self.shards(layer)]

    def check_shards(self) -> None:
        """Checks presence, size and header of every shard and of the hot index.

        Raises:
            TableError: A shard or the index is missing, foreign, truncated or damaged.
        """
        for shard in self.all_shards():
            shard.check(self.table_ids)
        check_file(self.directory, self.config, self.vocab_digest)

    def index(self) -> HotIndex | None:
        """The table's hot index, read and hashed; None if it has none.

        Raises:
            TableError: It is missing, foreign, or damaged.
        """
        return read_index(self.directory, self.config, self.vocab_digest)

    def _check_count(self, path: Path, listed: int) -> None:
        """Checks the number of shards before a list of them is made.

        With an invalid shard_rows, such as 1, the list might not fit in memory.
        """
        rows = [self.config.row_count(layer) for layer in self.config.hash.layer_ids]
        count = sum(-(-layer_rows // self.shard_rows) for layer_rows in rows)
        if count != listed:
            raise TableError(
                f"{path}: layers: expected {count} shards of {self.shard_rows} rows, found {listed}"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: see docs/guide/table-format.md."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "state": "sealed" if self.next_id is None else "open",
            "table_id": self.table_id,
            "parent": self.parent,
            "next_id": self.next_id,
            "address_digest": self.address_digest,
            "vocab_digest": self.vocab_digest,
            "config": self.config.to_json(),
            "row_format": self.fmt.to_json(),
            "row_bytes": self.fmt.row_bytes,
            "shard_rows": self.shard_rows,
            "hot_rows": self.config.hot_rows,
            "layers": [self._layer_to_json(layer) for layer in self.config.hash.layer_ids],
        }

    def _layer_to_json(self, layer: int) -> dict[str, Any]:
        rows = self.config.row_count(layer)
        shards = [self._shard_to_json(shard) for shard in self.shards(layer)]
        return {"layer": layer, "rows": rows, "shards": shards}

    def _shard_to_json(self, shard: Shard) -> dict[str, Any]:
        return {
            "name": shard.name,
            "rows": shard.rows,
            "bytes": shard.size,
            "sha256": self.sha256.get(shard.name),
        }

    def write(self) -> None:
        """Replaces engram.json in one step that survives a crash.

        Raises:
            WriteFailed: The system refuses.
        """
        data = self.to_json()
        data["checksum"] = _checksum(data)
        write_file(self.directory / FILE_NAME, json.dumps(data, indent=1))

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Reads engram.json of a directory.

        Raises:
            TableError: There is no file, or a field is invalid; names the field.
            DigestMismatch: Its address_digest does not follow from its own configuration.
        """
        path = directory / FILE_NAME
        try:
            text = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise TableError(f"{path}: expected a table's {FILE_NAME}, found no file") from None
        except OSError as error:
            raise TableError(f"{path}: it cannot be read ({error})") from error
        return cls.of_text(text, directory)

    @classmethod
    def of_text(cls, text: bytes, directory: Path) -> Manifest:
        """The manifest that the text of an engram.json gives.

        Args:
            text: the content of the file.
            directory: the table's folder, for messages and the paths of shards.

        Raises:
            TableError, DigestMismatch: As `read` does.
        """
        path = directory / FILE_NAME
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            refuse_pointer(path, TableError)
            raise TableError(f"{path}: expected JSON, found something else ({error})") from error
        try:
            return cls._of(directory, path, data)
        except (ValueError, RecursionError) as error:
            # Numbers too long to be printed, or values nested too deep.
            raise TableError(f"{path}: {error}") from error

    @classmethod
    def _of(cls, directory: Path, path: Path, data: Any) -> Manifest:
        _check_fields(path, data)
        checksum = data.pop("checksum", None)  # old tables have none
        hashes = _hashes(path, data["layers"])
        try:
            config = EngramConfig.from_json(data["config"])
            fmt = RowFormat.from_json(data["row_format"])
        except (ConfigError, TypeError, OverflowError) as error:
            raise TableError(f"{path}: {error}") from error
        if fmt.d != config.dim:
            raise TableError(
                f"{path}: row_format.d: expected the config's dim {config.dim}, found {fmt.d}"
            )
        manifest = cls(
            directory,
            config,
            fmt,
            vocab_digest=data["vocab_digest"],
            shard_rows=data["shard_rows"],
            table_id=data["table_id"],
            parent=data["parent"],
            next_id=data["next_id"],
            sha256=hashes,
        )
        if data["address_digest"] != manifest.address_digest:
            raise DigestMismatch(
                f"{path}: address_digest: expected {manifest.address_digest}, which its config and "
                f"vocab_digest give, found {data['address_digest']}"
            )
        manifest._check_count(path, sum(len(layer["shards"]) for layer in data["layers"]))
        difference = _first_difference(manifest.to_json(), data)
        if difference:
            raise TableError(f"{path}: {difference}")
        if manifest.next_id is None and None in hashes.values():
            raise TableError(
                f"{path}: sha256: expected one for each shard of a sealed table, found null"
            )
        # Protects fields that follow from no other field, such as the row format.
        expected = _checksum(data)
        if checksum is not None and checksum != expected:
            raise TableError(
                f"{path}: checksum: expected {expected} of its other fields, found {checksum!r}"
            )
        return manifest


def _check_fields(path: Path, data: Any) -> None:
    found = data
    if _is_object(data):
        found = (data.get("format"), data.get("version"))
    if found != (FORMAT, VERSION):
        raise TableError(f"{path}: expected format {FORMAT}, version {VERSION}; found {found!r}")
    for name, kind in _FIELDS.items():
        if name not in data or not isinstance(data[name], kind) or isinstance(data[name], bool):
            raise TableError(
                f"{path}: {name}: expected {kind}, found {data.get(name, 'no such field')!r}"
            )
    for name in ("table_id", "parent", "next_id"):
        if data[name] is not None and not re.fullmatch("[0-9a-f]{32}", data[name]):
            raise TableError(f"{path}: {name}: expected 32 hex digits, found {data[name]!r}")
    if data["shard_rows"] < 1:
        raise TableError(f"{path}: shard_rows: expected at least 1, found {data['shard_rows']}")


def _checksum(data: dict[str, Any]) -> str:
    """SHA-256 of the fields as JSON with sorted keys and no spaces, as hex."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _hashes(path: Path, layers: list[Any]) -> dict[str, str | None]:
    hashes: dict[str, Any] = {}
    try:
        for layer in layers:
            hashes |= {shard["name"]: shard["sha256"] for shard in layer["shards"]}
    except (TypeError, KeyError) as error:
        raise TableError(
            f"{path}: layers: expected shards with name and sha256 ({error!r})"
        ) from error
    for name, sha256 in hashes.items():
        is_digest = isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)
        if sha256 is not None and not is_digest:
            raise TableError(
                f"{path}: sha256 of {name}: expected 64 hex digits or null, found {sha256!r}"
            )
    return hashes


def _is_object(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)


def _is_list(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def _first_difference(expected: Any, found: Any, name: str = "") -> str | None:
    """The first difference between two JSON values, for an error message; None if equal."""
    if _is_object(expected) and _is_object(found):
        return _first_different_field(expected, found, f"{name}." if name else "")
    if _is_list(expected) and _is_list(found) and len(expected) == len(found):
        for index, pair in enumerate(zip(expected, found, strict=True)):
            difference = _first_difference(*pair, f"{name}[{index}]")
            if difference:
                return difference
        return None
    if type(expected) is type(found) and expected == found:
        return None
    return f"{name}: expected {expected!r}, found {found!r}"


def _first_different_field(
    expected: dict[str, Any], found: dict[str, Any], prefix: str
) -> str | None:
    for key in sorted(expected.keys() | found.keys()):
        if key not in expected:
            return f"{prefix}{key}: unknown field"
        if key not in found:
            return f"{prefix}{key}: the field is missing"
    for key, value in expected.items():
        difference = _first_difference(value, found[key], f"{prefix}{key}")
        if difference:
            return difference
    return None
