"""engram.json: what a table says of itself, as a frozen value that is written and read as a whole.

Everything that follows from the configuration (rows, shards, sizes, digest) is written for readers
without this library, and on reading has to be what follows from it: a field that was changed by
hand is found. What follows from nothing else is under a checksum of all fields.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DigestMismatch, TableError
from ..rows.format import RowFormat
from ..spec.config import EngramConfig
from ..system.files import write_file
from ..system.lfs import refuse_pointer
from .shards import Shard, shards_of

FILE_NAME = "engram.json"
FORMAT, VERSION = "engraphy-table", 1
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

    next_id: the table_id that the next seal gives if rows have changed; None = sealed. parent: the
    table_id before the present one. sha256: of the rows of each shard, by file name, as last
    sealed; None = never sealed.
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
        """What may stand in a shard: the table_id, and while open also the next one."""
        return (self.table_id,) if self.next_id is None else (self.table_id, self.next_id)

    def shards(self, layer: int) -> list[Shard]:
        """Shards of a layer. Raises ConfigError for a layer without memory."""
        rows = self.config.hash.row_count(layer)
        return shards_of(self.directory, layer, rows, self.shard_rows, self.fmt.row_bytes)

    def all_shards(self) -> list[Shard]:
        """Shards of all layers."""
        return [shard for layer in self.config.hash.layer_ids for shard in self.shards(layer)]

    def check_shards(self) -> None:
        """Checks presence, size and header of every shard.

        Raises:
            TableError: A shard is missing, foreign, truncated or damaged.
        """
        for shard in self.all_shards():
            shard.check(self.table_ids)

    def _check_count(self, path: Path, listed: int) -> None:
        """Before a list is made of them: shards of a row each are as many as memory holds, and
        more."""
        count = sum(
            -(-self.config.hash.row_count(layer) // self.shard_rows)
            for layer in self.config.hash.layer_ids
        )
        if count != listed:
            raise TableError(
                f"{path}: layers: expected {count} shards of {self.shard_rows} rows, found {listed}"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: see docs/table-format.md."""
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
            "hot_rows": 0,
            "layers": [
                {
                    "layer": layer,
                    "rows": self.config.hash.row_count(layer),
                    "shards": [
                        {
                            "name": shard.name,
                            "rows": shard.rows,
                            "bytes": shard.size,
                            "sha256": self.sha256.get(shard.name),
                        }
                        for shard in self.shards(layer)
                    ],
                }
                for layer in self.config.hash.layer_ids
            ],
        }

    def write(self) -> None:
        """Replace engram.json in one step that survives a crash. Raises WriteFailed."""
        data = self.to_json()
        write_file(
            self.directory / FILE_NAME, json.dumps(data | {"checksum": _checksum(data)}, indent=1)
        )

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """engram.json of a directory. Raises TableError naming the field, DigestMismatch for a
        digest not its own."""
        path = directory / FILE_NAME
        try:
            data = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise TableError(f"{path}: expected a table's {FILE_NAME}, found no file") from None
        except OSError as error:
            raise TableError(f"{path}: it cannot be read ({error})") from error
        except (ValueError, RecursionError) as error:
            refuse_pointer(path, TableError)
            raise TableError(f"{path}: expected JSON, found something else ({error})") from error
        try:
            return cls._of(directory, path, data)
        except (
            ValueError,
            RecursionError,
        ) as error:  # numbers too long to be told, values nested too deep
            raise TableError(f"{path}: {error}") from error

    @classmethod
    def _of(cls, directory: Path, path: Path, data: Any) -> Manifest:
        _check_fields(path, data)
        checksum = data.pop("checksum", None)  # tables of before there was one have none
        hashes = _hashes(path, data["layers"])
        try:
            config, fmt = (
                EngramConfig.from_json(data["config"]),
                RowFormat.from_json(data["row_format"]),
            )
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
            data["vocab_digest"],
            data["shard_rows"],
            data["table_id"],
            data["parent"],
            data["next_id"],
            hashes,
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
        if checksum not in (
            None,
            _checksum(data),
        ):  # the row format, say, follows from nothing else
            raise TableError(
                f"{path}: checksum: expected {_checksum(data)} of its other fields, found {checksum!r}"
            )
        return manifest


def _check_fields(path: Path, data: Any) -> None:
    found = (data.get("format"), data.get("version")) if isinstance(data, dict) else data
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
    return hashlib.sha256(
        json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def _hashes(path: Path, layers: list[Any]) -> dict[str, str | None]:
    try:
        hashes = {shard["name"]: shard["sha256"] for layer in layers for shard in layer["shards"]}
    except (TypeError, KeyError) as error:
        raise TableError(
            f"{path}: layers: expected shards with name and sha256 ({error!r})"
        ) from error
    for name, sha256 in hashes.items():
        if sha256 is not None and not (
            isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)
        ):
            raise TableError(
                f"{path}: sha256 of {name}: expected 64 hex digits or null, found {sha256!r}"
            )
    return hashes


def _first_difference(expected: Any, found: Any, where: str = "") -> str | None:
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(expected.keys() | found.keys()):
            if key not in expected or key not in found:
                return (
                    f"{where}{key}: {'unknown field' if key in found else 'the field is missing'}"
                )
        pairs = [(f"{where}{key}", expected[key], found[key]) for key in expected]
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = [(f"{where}[{i}]", expected[i], found[i]) for i in range(len(expected))]
    elif type(expected) is type(found) and expected == found:
        return None
    else:
        return f"{where}: expected {expected!r}, found {found!r}"
    differences = (
        _first_difference(a, b, name)
        if not isinstance(a, dict)
        else _first_difference(a, b, name + ".")
        for name, a, b in pairs
    )
    return next((difference for difference in differences if difference), None)
