"""What follows the "?" of a store's URL, and how a file: store gets at its rows where nobody says
it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConfigError, StoreError
from ..system.machine import free_memory
from ..table.table import Table

READS = ("auto", "mmap", "pread")
THREADS, MAX_THREADS = 128, 1024
_SHARE_OF_MEMORY = 0.9  # the rest is for what else runs


@dataclass(frozen=True)
class FileOptions:
    """How a file: store reads.

    read: "mmap" (the page cache as memory), "pread" (blocking reads by threads), or "auto".
    threads: how many blocking threads at most, for pread alone. direct: pread past the page cache
    (O_DIRECT). populate: mmap, all rows brought into memory when it is opened.
    """

    read: str = "auto"
    threads: int = THREADS
    direct: bool = False
    populate: bool = False

    @classmethod
    def parse(cls, url: str, given: Mapping[str, str]) -> FileOptions:
        """From the options of a URL. Raises ConfigError naming what is expected, also for what
        excludes each other."""
        read = given.get("read", "auto")
        if read not in READS:
            raise ConfigError(
                f"store {url!r}, read: expected one of {', '.join(READS)}, found {read!r}"
            )
        options = cls(
            read,
            positive(url, "threads", given.get("threads", str(THREADS)), MAX_THREADS),
            flag(url, "direct", given.get("direct", "0")),
            flag(url, "populate", given.get("populate", "0")),
        )
        if options.direct and (options.populate or read == "mmap"):
            raise ConfigError(
                f"store {url!r}: expected direct=1 with read=pread, populate=1 with read=mmap"
            )
        if (
            options.populate
            and read == "pread"
            or "threads" in given
            and (read == "mmap" or options.populate)
        ):
            raise ConfigError(
                f"store {url!r}: expected populate=1 with read=mmap, threads= with read=pread"
            )
        return options

    def choose(self, table: Table) -> str:
        """ "mmap" or "pread".

        "auto" is pread with direct=1, mmap with populate=1 or for a table that is open for writing;
        else mmap where the rows of all layers fit into nine tenths of the memory that is free, and
        pread where they do not: a mapping reads a page at a time, many threads read many. Raises
        StoreError where populate=1 finds too little memory.
        """
        if self.read == "pread" or self.read == "auto" and self.direct:
            return "pread"
        if self.populate and not fits_in_memory(table):
            raise StoreError(
                f"{table.path}, populate=1: expected {table_bytes(table)} bytes to fit into "
                f"{_SHARE_OF_MEMORY:.0%} of the free memory, found {free_memory() or 0} bytes free"
            )
        if self.read == "mmap" or self.populate or table.mode == "w" or fits_in_memory(table):
            return "mmap"
        return "pread"


def split_options(url: str, text: str, names: Sequence[str]) -> dict[str, str]:
    """ "a=1&b=2" as {"a": "1", "b": "2"}. Raises ConfigError for a name that is not in `names`, or
    comes twice."""
    found: dict[str, str] = {}
    for part in text.split("&") if text else ():
        name, equals, value = part.partition("=")
        if name not in names or not equals:
            raise ConfigError(
                f"store {url!r}: expected options {', '.join(f'{known}=' for known in names)} "
                f"found {part!r}"
            )
        if name in found:
            raise ConfigError(f"store {url!r}: expected {name}= once, found it twice")
        found[name] = value
    return found


def flag(url: str, name: str, value: str) -> bool:
    """ "0" or "1". Raises ConfigError for anything else."""
    if value not in ("0", "1"):
        raise ConfigError(f"store {url!r}, {name}: expected 0 or 1, found {value!r}")
    return value == "1"


def positive(url: str, name: str, value: str, most: int) -> int:
    """An integer from 1 to `most`. Raises ConfigError for anything else."""
    if not (value.isascii() and value.isdigit() and 1 <= int(value) <= most):
        raise ConfigError(
            f"store {url!r}, {name}: expected an integer from 1 to {most}, found {value!r}"
        )
    return int(value)


def table_bytes(table: Table) -> int:
    """Bytes of the rows of all layers."""
    return sum(table.rows(layer) for layer in table.layers) * table.row_bytes


def fits_in_memory(table: Table) -> bool:
    """Whether the rows of all layers fit into nine tenths of the free memory; not if that is not
    known."""
    return table_bytes(table) <= _SHARE_OF_MEMORY * (free_memory() or 0)
