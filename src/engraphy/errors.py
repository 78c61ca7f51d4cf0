"""One error family. A message names the file or layer, what was expected and what was found.

Catch `EngraphyError` to catch them all. Each class also says what to do about the error.
"""


class EngraphyError(Exception):
    """Base of every error that Engraphy raises on purpose.

    What to do: catch it to handle all of them in one place. An error of another class that comes
    out of Engraphy is a bug: please report it.
    """


class ConfigError(EngraphyError, ValueError):
    """A specification, option, URL or environment variable is invalid.

    Examples are an unknown name, a size out of range, a layer that the model does not have, and two
    settings that contradict each other.

    What to do: change the field that the message names to a value that it expects.
    """


class InputError(EngraphyError, ValueError):
    """An argument of a call has a wrong shape, dtype or value: token ids, row ids, buffers.

    Nothing was read or written.

    What to do: pass what the message expects; convert the array's dtype, or reshape it.
    """


class RowOutOfRange(InputError, IndexError):
    """A row id is negative, or beyond the last row of a store. Nothing was read or written.

    What to do: compute row ids with the `Addresser` of the table's own configuration, and ask the
    store of the same layer.
    """


class DigestMismatch(EngraphyError):
    """Two parts do not mean the same addresses: the tokenizer, hash spec or row width differs.

    Rows that were read all the same would belong to other n-grams, so no row is read.

    What to do: use the table, the tokenizer and the model that were made for each other. If
    engram.json contradicts itself, it was edited: restore it from a copy.
    """


class TableError(EngraphyError):
    """A table or checkpoint on disk cannot be used as it is.

    The file is missing, unreadable, of another format, or inconsistent; or the path is taken, or
    another process writes to the table.

    What to do: check the path that the message names. Restore a damaged file from a copy, or wait
    for the other writer. The subclasses say which damage it is.
    """


class TableUnsealed(TableError):
    """The table was opened for writing and was not sealed since, so its rows may be unfinished.

    What to do: wait if a process still writes to it. If the writer died, `Table.open(path,
    "w").seal()` accepts the rows as they are; otherwise restore the table from a copy.
    """


class ShardMissing(TableError):
    """A shard that engram.json or an index lists is not there.

    What to do: copy or download the missing file into the table's folder.
    """


class ShardForeign(TableError):
    """A shard belongs to another table, to an earlier state of this one, or to another place in it.

    What to do: copy all shards and engram.json again from one source; do not mix files of two
    tables.
    """


class ShardTruncated(TableError):
    """The size of a shard differs from what its header or engram.json says.

    A copy or download may have been cut short, or the file was cut while it was read.

    What to do: copy or download the file again, then run `engraphy table verify`.
    """


class ShardCorrupt(TableError):
    """The header or the rows of a shard are not those that were sealed.

    What to do: restore the shard from a copy, then run `engraphy table verify`. If it happens
    again, check the disk.
    """


class StoreError(EngraphyError):
    """A store is closed or read-only, or does not support what was asked of it.

    What to do: open the store again, or open it with `mode="w"` to write. A store of your own has
    to derive from `engraphy.store.RowStore`.
    """


class WriteFailed(EngraphyError, OSError):
    """A file or folder cannot be written: a full disk, no permission, a read-only file system.

    The message says what is left on disk; a file that was there before stays as it was.

    What to do: free disk space, change the permissions, or choose another path; then try again.

    Attributes:
        errno: the system's error number, or None if there is none.
    """


class StateTooShort(EngraphyError):
    """A sequence state was asked to go back further than its margin allows.

    What to do: make the `SequenceState` with a larger `margin`, or start it anew and run the
    sequence again from its beginning.
    """


class DataUnavailable(EngraphyError):
    """Data, a model or an optional package that was asked for by name is not available here.

    There is no network, no such file, no text in it, or its content is not what was published.

    What to do: pass the local file or folder that the message asks for, or install the package that
    it names.
    """


class SandboxUnavailable(EngraphyError):
    """A protection that was demanded for running a model's code is missing on this machine.

    What to do: run it as root on Linux (x86_64), or in a virtual machine of its own with
    `--without` and the name of the protection.
    """


class NativeUnavailable(EngraphyError):
    """The native part was demanded, but it is not installed or lacks the instruction set.

    What to do: run `engraphy doctor` to see why. Unset ENGRAPHY_NATIVE to let Engraphy choose, or
    reinstall with ENGRAPHY_REQUIRE_NATIVE=true to see the compiler's errors.
    """
