"""What a client and a server of rows say to each other, in terms of Arrow Flight.

    GetFlightInfo (table, layer) -> endpoints: ranges of rows, each with its locations
    DoExchange    (table, layer) -> a stream: batches of row ids out, batches of rows back

A descriptor's path is (table_id, layer); ANY_TABLE stands for the table that is served. Schemas
carry a `Served` as metadata, so a client knows table_id and address digest before the first row.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .. import errors
from ..errors import EngraphyError, StoreError
from ..rows.format import RowFormat
from .info import StoreInfo
from .remote_arrow import flight, pa

PROTOCOL = 1
ANY_TABLE = "any"
MOST_BYTES = 2 << 20  # of the rows of one request
MOST_IDS = 8192  # of one request: 64 KiB of ids, which fit into the window of a new stream
DRAINING = b"draining"  # metadata of the answers of a server that is about to stop
_KEY = b"engraphy"

_INT64 = pa.int64()
IDS = pa.schema([pa.field("id", pa.int64(), nullable=False)])


@dataclass(frozen=True)
class Served:
    """One layer of a server, as it describes it.

    Attributes:
        table_id: identity of the table; None if the rows have none.
        address_digest: identity of the addresses, or None.
        layer: the model's layer, 0-based.
        rows: rows of the layer, those of other servers included.
        row_bytes: bytes of a row.
        format: format of the rows, as `RowFormat.to_json` gives it, or None.
        most_rows: most rows of one request.
    """

    table_id: str | None
    address_digest: str | None
    layer: int
    rows: int
    row_bytes: int
    format: dict[str, Any] | None
    most_rows: int
    protocol: int = PROTOCOL

    @classmethod
    def of(cls, layer: int, info: StoreInfo) -> Served:
        """The description of a store's rows."""
        return cls(
            info.table_id,
            info.address_digest,
            layer,
            info.rows,
            info.row_bytes,
            None if info.format is None else info.format.to_json(),
            max(1, min(MOST_IDS, MOST_BYTES // info.row_bytes)),
        )

    @classmethod
    def read(cls, schema: Any, where: str) -> Served:
        """Reads the metadata of a schema. Raises StoreError if it is not that of a row server."""
        try:
            served = cls(**json.loads(schema.metadata[_KEY]))
        except (KeyError, TypeError, ValueError):
            raise StoreError(
                f"{where}: expected a server of rows, found another Flight service"
            ) from None
        if served.protocol != PROTOCOL:
            raise StoreError(f"{where}: expected protocol {PROTOCOL}, found {served.protocol}")
        return served

    def schema(self) -> Any:
        """The schema of the rows, with this description as metadata."""
        rows = pa.field("row", pa.binary(self.row_bytes), nullable=False)
        return pa.schema([rows], {_KEY: json.dumps(asdict(self)).encode()})

    @property
    def row_format(self) -> RowFormat | None:
        """The format of the rows."""
        return None if self.format is None else RowFormat.from_json(self.format)


def descriptor(table_id: str | None, layer: int) -> Any:
    """The Flight descriptor of a layer; table_id None: of whichever table is served."""
    return flight.FlightDescriptor.for_path(table_id or ANY_TABLE, str(layer))


def ticket(table_id: str | None, layer: int, first: int, last: int) -> bytes:
    """What an endpoint says about its rows [first, last)."""
    place = {"table_id": table_id, "layer": layer, "first": first, "last": last}
    return json.dumps(place).encode()


def range_of(endpoint: Any, rows: int, where: str) -> tuple[int, int]:
    """The rows [first, last) of an endpoint. Raises StoreError if there are no such rows."""
    try:
        place = json.loads(endpoint.ticket.ticket)
        first, last = int(place["first"]), int(place["last"])
    except (TypeError, ValueError, KeyError):
        raise StoreError(f"{where}: expected a range of rows, found another ticket") from None
    if not 0 <= first < last <= rows:
        raise StoreError(f"{where}: expected rows of 0 to {rows}, found {first} to {last}")
    return first, last


def id_batch(ids_N: np.ndarray) -> Any:
    """A batch of row ids (contiguous int64) over the same memory."""
    ids = pa.Array.from_buffers(_INT64, len(ids_N), [None, pa.py_buffer(ids_N)])
    return pa.RecordBatch.from_arrays([ids], schema=IDS)


def ids_of(batch: Any) -> np.ndarray:
    """The row ids of a batch, int64 [N]. Raises StoreError if it has something else."""
    ids = batch.column(0) if batch.num_columns == 1 else None
    if ids is None or ids.type != _INT64 or ids.null_count:
        raise StoreError(f"request: expected row ids of int64, found {batch.schema.types}")
    return ids.to_numpy(zero_copy_only=True)


def row_batch(buffer: Any, count: int, schema: Any) -> Any:
    """A batch of rows over a buffer of pyarrow."""
    rows = pa.FixedSizeBinaryArray.from_buffers(schema.field(0).type, count, [None, buffer])
    return pa.RecordBatch.from_arrays([rows], schema=schema)


def rows_of(batch: Any, count: int, row_bytes: int) -> np.ndarray:
    """The rows of a batch, uint8 [count, row_bytes]. Raises StoreError if it has others."""
    rows = batch.column(0)
    if len(rows) != count or rows.type.byte_width != row_bytes or rows.null_count:
        raise StoreError(
            f"answer: expected {count} rows of {row_bytes} bytes, found {len(rows)} of {rows.type}"
        )
    first = rows.offset * row_bytes
    bytes_ = np.frombuffer(rows.buffers()[1], np.uint8, count * row_bytes, first)
    return bytes_.reshape(count, row_bytes)


def to_flight(error: EngraphyError) -> Exception:
    """An error of ours as one that Flight carries to the client."""
    return flight.FlightServerError(str(error), type(error).__name__.encode())


def from_flight(error: Exception, where: str) -> EngraphyError:
    """The error of ours that a server sent, or a StoreError that names the server and the cause."""
    if isinstance(error, EngraphyError):
        return error
    name = bytes(getattr(error, "extra_info", None) or b"").decode("ascii", "replace")
    kind = getattr(errors, name, None)
    message = str(error).split(". Detail:")[0].split(" gRPC client debug context")[0]
    message = message.partition("with message: ")[2] or message
    if isinstance(kind, type) and issubclass(kind, EngraphyError):
        return kind(f"{where}: {message}")
    return StoreError(f"{where}: {type(error).__name__}: {message}")
