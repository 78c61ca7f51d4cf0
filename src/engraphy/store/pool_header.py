"""The header of a pool in one region: what the region holds, and whether it is complete.

    byte    0  "ENGRPOOL"
            8  u32: version
           12  u32: bytes of the description
           16  u64: epoch, 1 for what is published first
           24  u64: sealed: 0 while the region is written, then the epoch; written last
           32  SHA-256 of bytes 0 to 24 and the description
           64  the description, JSON: table_id, address_digest, row_format, layers and their offsets
         4096  rows of the layers, each from a multiple of 4096 on; then the table's engram.json
    size - 1   the end mark: 1 when all else is written

Numbers are little-endian. A reader that has mapped the region looks at the end mark after each
read (mapping.py does so for any file), so it notices a region that is written anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, ShardCorrupt, TableError
from ..rows.format import RowFormat
from ..table.manifest import Manifest

BYTES = 4096
MAGIC = b"ENGRPOOL"
VERSION = 1
SEALED_AT = 24
_FIXED = struct.Struct("<8sIIQQ32s")
_DIGESTED = 24  # bytes of the fixed part that the digest covers


@dataclass(frozen=True)
class LayerPlace:
    """Where the rows of a layer lie: `rows` rows, from byte `offset` of the region on."""

    rows: int
    offset: int


@dataclass(frozen=True)
class PoolHeader:
    """What a region holds.

    Attributes:
        epoch: how often the pool was published, this time included.
        table_id: identity of the rows.
        address_digest: identity of their addresses.
        row_format: format of the rows.
        layers: the model's layer, 0-based -> where its rows lie.
        manifest: offset and bytes of the table's engram.json.
        size: bytes of the region; the last one is the end mark.
        publisher: process and host that wrote it.
        sealed: whether the region is complete.
    """

    epoch: int
    table_id: str
    address_digest: str
    row_format: RowFormat
    layers: Mapping[int, LayerPlace]
    manifest: tuple[int, int]
    size: int
    publisher: str
    sealed: bool

    @classmethod
    def plan(cls, table: Manifest, epoch: int, manifest_bytes: int, granule: int) -> PoolHeader:
        """The header of a region for a table, not sealed yet.

        Args:
            table: the sealed table.
            epoch: the epoch that it is published as.
            manifest_bytes: bytes of its engram.json.
            granule: the region's size becomes a multiple of so many bytes, itself one of 4096.
        """
        spec = table.config.hash
        layers: dict[int, LayerPlace] = {}
        end = BYTES
        for layer in spec.layer_ids:
            rows = spec.row_count(layer)
            layers[layer] = LayerPlace(rows, end)
            end = _up(end + rows * table.fmt.row_bytes, BYTES)
        return cls(
            epoch,
            table.table_id,
            table.address_digest,
            table.fmt,
            layers,
            (end, manifest_bytes),
            _up(end + manifest_bytes + 1, granule),
            f"process {os.getpid()} on {os.uname().nodename}",
            False,
        )

    def to_bytes(self) -> bytes:
        """The 4096 bytes. Raises ConfigError if the layers are too many to be described in them."""
        text = json.dumps(self._description(), separators=(",", ":")).encode()
        if len(text) > BYTES - _FIXED.size:
            raise ConfigError(
                f"pool: expected a description of {BYTES - _FIXED.size} bytes at most, found "
                f"{len(text)} bytes for {len(self.layers)} layers"
            )
        start = _FIXED.pack(MAGIC, VERSION, len(text), self.epoch, 0, bytes(32))[:_DIGESTED]
        digest = hashlib.sha256(start + text).digest()
        sealed = self.epoch if self.sealed else 0
        fixed = _FIXED.pack(MAGIC, VERSION, len(text), self.epoch, sealed, digest)
        return (fixed + text).ljust(BYTES, b"\0")

    @classmethod
    def of(cls, data: bytes, name: str) -> PoolHeader:
        """Reads a header.

        Args:
            data: the first 4096 bytes of a region; fewer if it is shorter.
            name: the region's name, for messages.

        Raises:
            TableError: if the region holds no pool, or one of another version.
            ShardCorrupt: if the header is damaged.
        """
        if len(data) < BYTES or data[: len(MAGIC)] != MAGIC:
            raise TableError(
                f"{name}: expected a pool, which begins with {MAGIC!r}, found {data[:8]!r}; "
                "engraphy table publish makes one of a table"
            )
        _, version, length, epoch, sealed, digest = _FIXED.unpack_from(data)
        if version != VERSION:
            raise TableError(f"{name}: expected a pool of version {VERSION}, found {version}")
        text = data[_FIXED.size : _FIXED.size + length]
        if hashlib.sha256(data[:_DIGESTED] + text).digest() != digest:
            raise ShardCorrupt(f"{name}: the pool's header is damaged: its checksum differs")
        return cls._described(json.loads(text), epoch, sealed == epoch)

    def _description(self) -> dict[str, Any]:
        return {
            "table_id": self.table_id,
            "address_digest": self.address_digest,
            "row_format": self.row_format.to_json(),
            "layers": [[layer, *_numbers(place)] for layer, place in self.layers.items()],
            "manifest": list(self.manifest),
            "size": self.size,
            "publisher": self.publisher,
        }

    @classmethod
    def _described(cls, fields: Any, epoch: int, sealed: bool) -> PoolHeader:
        first, length = fields["manifest"]
        return cls(
            epoch,
            fields["table_id"],
            fields["address_digest"],
            RowFormat.from_json(fields["row_format"]),
            {layer: LayerPlace(rows, offset) for layer, rows, offset in fields["layers"]},
            (first, length),
            fields["size"],
            fields["publisher"],
            sealed,
        )


def _numbers(place: LayerPlace) -> tuple[int, int]:
    return place.rows, place.offset


def _up(number: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-number // step) * step
