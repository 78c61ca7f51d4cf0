"""One error family. A message names the file or layer, what was expected and what was found."""


class EngraphyError(Exception):
    """Base of every error that Engraphy raises on purpose."""


class ConfigError(EngraphyError, ValueError):
    """A specification, option or URL that cannot be meant: unknown names, sizes out of range,
    missing layers."""


class InputError(EngraphyError, ValueError):
    """An argument of a call with the wrong shape, dtype or value: token ids, row ids, buffers."""


class RowOutOfRange(InputError, IndexError):
    """A row id below zero or beyond the last row of a store."""


class DigestMismatch(EngraphyError):
    """Two things that must mean the same addresses do not: another tokenizer, hash specification or
    row width."""


class TableError(EngraphyError):
    """A table on disk that cannot be used as it is."""


class TableUnsealed(TableError):
    """The table was opened for writing and not sealed since."""


class ShardMissing(TableError):
    """A shard that engram.json lists is not there."""


class ShardForeign(TableError):
    """A shard that belongs to another table (its table_id differs)."""


class ShardTruncated(TableError):
    """A shard whose size differs from what its header or engram.json says."""


class ShardCorrupt(TableError):
    """A shard whose header or content is not what was sealed."""


class StoreError(EngraphyError):
    """A store that is closed, read-only, or asked for something that it cannot do."""


class WriteFailed(EngraphyError, OSError):
    """A file or folder that cannot be written: a full disk, no permission, a read-only file system.

    `errno` is the system's number where there is one.
    """


class StateTooShort(EngraphyError):
    """A sequence state was asked to go back further than its margin."""


class DataUnavailable(EngraphyError):
    """Data that was asked for by name and cannot be had here; the message says what to give
    instead."""


class NativeUnavailable(EngraphyError):
    """The native part was demanded and is not there, or not at the demanded instruction set."""
