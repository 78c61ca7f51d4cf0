"""Options of a store's URL, and how a file: store reads if its URL does not say."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConfigError, StoreError
from ..system.machine import free_memory
from ..table.table import Table

READS = ("auto", "mmap", "pread")
THREADS = 128
MAX_THREADS = 1024
_SHARE_OF_MEMORY = 0.9  # the rest is for other processes
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)(|KiB|MiB|GiB)", re.ASCII)
_UNITS = ("", "KiB", "MiB", "GiB")


@dataclass(frozen=True)
class FileOptions:
    """How a file: store reads.

    Attributes:
        read: "mmap" (the page cache as memory), "pread" (blocking reads by threads), or "auto".
        threads: for pread: the largest number of blocking threads.
        direct: for pread: bypass the page cache (O_DIRECT).
        populate: for mmap: bring all rows into memory when the store is opened.
    """

    read: str = "auto"
    threads: int = THREADS
    direct: bool = False
    populate: bool = False

    @classmethod
    def parse(cls, url: object, values: Mapping[str, str]) -> FileOptions:
        """Reads the options of a URL.

        Args:
            url: the URL or path, for messages.
            values: the options by name, as `split_options` returns them.

        Raises:
            ConfigError: if a value is invalid, or two options exclude each other.
        """
        read = values.get("read", "auto")
        if read not in READS:
            raise ConfigError(
                f"store {url!r}, read: expected one of {', '.join(READS)}, found {read!r}"
            )
        threads = positive(url, "threads", values.get("threads", str(THREADS)), MAX_THREADS)
        direct = flag(url, "direct", values.get("direct", "0"))
        populate = flag(url, "populate", values.get("populate", "0"))
        is_mapped = read == "mmap" or populate
        if direct and is_mapped:
            raise ConfigError(
                f"store {url!r}: expected direct=1 with read=pread, populate=1 with read=mmap"
            )
        if (populate and read == "pread") or ("threads" in values and is_mapped):
            raise ConfigError(
                f"store {url!r}: expected populate=1 with read=mmap, threads= with read=pread"
            )
        return cls(read, threads, direct, populate)

    def choose(self, table: Table) -> str:
        """Decides between "mmap" and "pread" for a table.

        "auto" is pread with direct=1. It is mmap with populate=1 or for a table that is open for
        writing. Otherwise it is mmap if the rows of all layers fit into nine tenths of the free
        memory, and pread if they do not: a mapping reads one page at a time, while many threads
        read many.

        Returns:
            "mmap" or "pread".

        Raises:
            StoreError: if populate=1 and the rows do not fit into the free memory.
        """
        if self.read == "pread" or (self.read == "auto" and self.direct):
            return "pread"
        if self.populate and not fits_in_memory(table):
            raise StoreError(
                f"{table.path}, populate=1: expected {table_bytes(table)} bytes to fit into "
                f"{_SHARE_OF_MEMORY:.0%} of the free memory, found {free_memory() or 0} bytes free"
            )
        if self.read == "mmap" or self.populate or table.mode == "w" or fits_in_memory(table):
            return "mmap"
        return "pread"


def split_options(url: object, text: str, names: Sequence[str]) -> dict[str, str]:
    """Splits "a=1&b=2" into {"a": "1", "b": "2"}.

    Args:
        url: the URL or path, for messages.
        text: what follows the "?".
        names: the options that the scheme has.

    Raises:
        ConfigError: if a name is not in `names` or occurs twice.
    """
    values: dict[str, str] = {}
    for part in text.split("&") if text else ():
        name, equals, value = part.partition("=")
        if name not in names or not equals:
            known = ", ".join(f"{option}=" for option in names)
            raise ConfigError(f"store {url!r}: expected options {known}, found {part!r}")
        if name in values:
            raise ConfigError(f"store {url!r}: expected {name}= once, found it twice")
        values[name] = value
    return values


def flag(url: object, name: str, value: str) -> bool:
    """Reads "0" or "1". Raises ConfigError for any other value."""
    if value not in ("0", "1"):
        raise ConfigError(f"store {url!r}, {name}: expected 0 or 1, found {value!r}")
    return value == "1"


def positive(url: object, name: str, value: str, most: int) -> int:
    """Reads an integer from 1 to `most`. Raises ConfigError for any other value."""
    is_number = value.isascii() and value.isdigit()
    if not (is_number and 1 <= int(value) <= most):
        raise ConfigError(
            f"store {url!r}, {name}: expected an integer from 1 to {most}, found {value!r}"
        )
    return int(value)


def parse_size(url: object, text: str) -> int:
    """Reads "2GiB" as bytes; KiB, MiB, GiB, or no unit for bytes.

    Raises:
        ConfigError: if the text is not a size.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"store {url!r}, cache: expected a size such as 2GiB, 512MiB or 1000000, found {text!r}"
        )
    number, unit = match.groups()
    return int(float(number) * 1024 ** _UNITS.index(unit))


def table_bytes(table: Table) -> int:
    """Bytes of the rows of all layers."""
    return sum(table.rows(layer) for layer in table.layers) * table.row_bytes


def fits_in_memory(table: Table) -> bool:
    """Whether the rows of all layers fit into nine tenths of the free memory.

    False if the free memory is not known.
    """
    return table_bytes(table) <= _SHARE_OF_MEMORY * (free_memory() or 0)
