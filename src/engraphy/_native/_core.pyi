"""The compiled module. Arrays are passed as addresses (0 = absent), C-contiguous; the caller checks shapes and dtypes
and keeps them alive during the call. The GIL is released while a kernel works, except where `Unlocked` (bind.hpp)
finds the work too little for that."""

from collections.abc import Sequence

def levels() -> tuple[str, ...]:
    """Instruction sets that are compiled in and that this CPU runs, weakest first."""

def level() -> str:
    """The one in use."""

def set_level(name: str) -> bool:
    """Use another one. False, and no change, when it is not among `levels()`."""

def address(array: object) -> int:
    """Where the memory of a C-contiguous array begins: a tenth of the time that numpy's own attributes take. Raises
    BufferError or ValueError for another one, TypeError for what has no buffer."""

def read_rows(
    kind: str,
    d: int,
    scale: float,
    shards: int,
    shard_rows: int,
    rows: int,
    ids: int,
    count: int,
    to_bf16: bool,
    out: int,
    waits: bool,
) -> int:
    """Writes rows `ids` (int64 [count]) as numbers to out: float32 [count, d], or bf16 bits (uint16). Arrays may begin
    at any byte.

    kind, d, scale: of the RowFormat, scale 1 where it has none. shards: u64 [S], the addresses of uint8
    [n, row_bytes] without gaps, `shard_rows` rows each but the last, `rows` together. waits: for a disk, perhaps, so
    that the GIL is released for few rows too. Returns -1. Otherwise nothing is written, and it is the position of the
    first id outside [0, rows). Raises ValueError for a kind or d that cannot be.
    """

def decode_rows(
    kind: str, d: int, scale: float, raw: int, count: int, to_bf16: bool, out: int
) -> None:
    """The same for the rows at raw, uint8 [count, row_bytes], in their order."""

def first_bad(ids: int, count: int, rows: int) -> int:
    """Position of the first of int64 [count] outside [0, rows); -1 if none is.

    Raises ValueError for negative sizes."""

def gather_rows(
    shards: int,
    shard_rows: int,
    rows: int,
    row_bytes: int,
    ids: int,
    count: int,
    out: int,
    waits: bool,
) -> None:
    """Writes rows `ids` as they are to out: uint8 [count, row_bytes]. Arguments as of `read_rows`; the caller has
    checked the ids. Raises ValueError for sizes that cannot be."""

def cache_look(
    memory: int,
    changes: int,
    set_count: int,
    row_bytes: int,
    ids: int,
    count: int,
    out: int,
    missing: int,
) -> int:
    """Writes those of the rows `ids` (int64 [count], checked by the caller) that a cache has to their places in out:
    uint8 [count, row_bytes]. Returns how many it has not, M.

    memory: of `Sets` in store/sets.py, which begins with a cache line; changes: of its `NativeSets`. missing: int64
    [2, count], of which M are written in each row: positions, ascending, and versions. May be called beside itself and
    one of the three below; of these only one may be under way. Raises ValueError for sizes that cannot be, as those do.
    """

def cache_keep(
    memory: int,
    changes: int,
    set_count: int,
    row_bytes: int,
    ids: int,
    versions: int,
    reads: int,
    from_rows: int,
    count: int,
) -> None:
    """Keeps rows that `cache_look` missed: `Sets.keep`. ids, versions, reads: int64 [count], ids distinct. from_rows:
    uint8 [count, row_bytes]."""

def cache_hold(
    memory: int, changes: int, set_count: int, row_bytes: int, ids: int, count: int
) -> None:
    """`Sets.hold`."""

def cache_write(
    memory: int, changes: int, set_count: int, row_bytes: int, ids: int, from_rows: int, count: int
) -> None:
    """`Sets.write`; from_rows: uint8 [count, row_bytes], or 0 where nobody knows what was written."""

def threads() -> int:
    """Threads that share one call of `read_rows`, `decode_rows`, `gather_rows` or `cache_look` on 4096 rows or more."""

def set_threads(count: int) -> None:
    """Raises ValueError unless count is positive."""

def guard(begin: int, size: int, writable: bool) -> int:
    """Watch over a mapping of a file: where a page of it cannot be had, all of it becomes zero pages instead of a
    SIGBUS that ends the process. Returns a number to know it by. Raises RuntimeError where there are too many."""

def unguard(slot: int) -> None:
    """To be called before the memory is unmapped."""

def damaged(slot: int) -> bool:
    """Whether that has happened to a mapping."""

def damage_count() -> int:
    """How often it has happened in this process, in all mappings."""

def arm_guard() -> None:
    """Put the handler of SIGBUS before one that was installed after it, to which it passes on what is not its own."""

class RowReader:
    """Rows of files, read by blocking threads of its own. It keeps file descriptors as numbers: the caller closes them,
    and not before."""

    def __init__(
        self,
        files: Sequence[int],
        sizes: Sequence[int],
        file_rows: int,
        row_bytes: int,
        offset: int,
        threads: int,
        whole_pages: bool,
    ) -> None:
        """Row r is row r % file_rows of file r // file_rows, whose first row begins at byte `offset` and which has
        sizes[...] bytes. threads: reads under way at a time. whole_pages: as direct reads need them. Raises ValueError
        for sizes that cannot be meant.
        """

    def read(self, ids: int, count: int, out: int) -> tuple[int, int, int, int]:
        """Writes rows `ids` (int64 [count], checked by the caller) to out: uint8 [count, row_bytes].

        Returns what the system was asked for, in reads and in bytes, then -1 and 0; or where a read failed the number
        of the file and errno, 0 for a file that ended too early. Then `out` is not to be used.
        """

class HashPlan:
    """What does not change between calls of an addresser: it copies its arrays, is immutable, is shared by deepcopy."""

    def __init__(
        self,
        map: int,
        vocab: int,
        filler: int,
        stop: int,
        orders: Sequence[int],
        heads: int,
        layers: int,
        multipliers: int,
        primes: int,
        offsets: int,
    ) -> None:
        """map: int32 [vocab], raw -> compressed id, negative = dead; 0 = identity. vocab: raw ids lie in [0, vocab).
        filler: compressed id. stop: raw id that ends the look-back of what follows it, -1 = none. orders: 1 to 32 each,
        N the largest. multipliers: int64 [layers, N], whose products with compressed ids stay in [0, 2**63).
        primes, offsets: int64 [layers, C], C = len(orders) * heads, order-major. Raises ValueError for sizes that
        cannot be meant.
        """

    def rows(
        self,
        ids: int,
        batch: int,
        tokens: int,
        history: int,
        live: int,
        starts: int,
        out: int,
        layer: int = -1,
    ) -> int:
        """Writes out: int64 [layers, batch, tokens, C], or [batch, tokens, C] of the layer with index `layer`.

        ids: int64 [batch, tokens] raw. history: int64 [batch, N - 1] raw, -1 = nothing there; 0 = all of it. live,
        starts: bool [batch, tokens]; 0 = all live, no starts. Returns -1. Otherwise nothing is written and an id is
        outside [0, vocab): p >= 0 is its flat position in ids, p <= -2 means position -2 - p in history.
        """

class FusePlan:
    """What does not change between the tokens of a fusion layer. It keeps addresses: the caller
    keeps the weights alive, and makes another plan if they move."""

    def __init__(
        self,
        kind: int,
        streams: int,
        hidden: int,
        width: int,
        taps: int,
        dilation: int,
        eps: float,
        conv_eps: float,
        unit_offset: bool,
        key: int,
        key_bias: int,
        value: int,
        value_bias: int,
        query_norm: int,
        key_norm: int,
        conv_norm: int,
        conv: int,
    ) -> None:
        """S, D, E, K = streams, hidden, width, taps.

        kind: 0 float32, 1 float64, 2 bfloat16, of weights, x, rows and out. Weights: as EngramLayer
        has them; biases may be 0; conv_norm and conv are 0 if taps is 0. Raises ValueError if sizes
        are invalid or a weight is missing.
        """

    def fuse(
        self,
        batch: int,
        x: int,
        rows: int,
        window: int,
        inputs: int,
        stride: int,
        live: int,
        out: int,
        gate: int,
    ) -> None:
        """One token of each of `batch` (B) sequences. Of kind 2, window, inputs and gate are
        float32.

        x: [B, S, D]. rows: [B, E]. window: the first sequence's oldest conv input [S, D], (taps -
        1) * dilation columns before the present; the next sequence's lies `stride` values further.
        live: bool [B]; 0 = all. Writes x and what the layer adds to out [B, S, D]; the gate to gate
        [B, S] unless it is 0; the present conv inputs to inputs, [S, D] for each sequence, as far
        apart as the windows. Raises ValueError if batch is not positive or an array is missing.
        """

class TokenReader:
    """Rows of all layers for one token of each of a few sequences. It keeps its plan, not the tables."""

    def __init__(
        self,
        plan: HashPlan,
        kind: str,
        d: int,
        scale: float,
        row_bytes: int,
        shards: Sequence[int],
        shard_rows: Sequence[int],
        rows: Sequence[int],
        on_disk: Sequence[int],
    ) -> None:
        """kind, d, scale, and of each layer shards, shard_rows and rows: as for `read_rows`. on_disk: layers whose rows
        may not be in memory; each row that is asked for is asked after with mincore. Raises ValueError for sizes that
        cannot be."""

    def read(self, ids: int, batch: int, oldest: int, next: int, stride: int, out: int) -> bool:
        """Writes rows as numbers to out: float32 [layers, batch, C * d], and the ids to the column `next`.

        ids: int64 [batch] raw. oldest: where the first sequence's N - 1 ids before it begin, int64, -1 = nothing there;
        `stride` ids further begin the next sequence's. Returns whether it was done: not for an id without a token or
        outside the vocabulary, in the past too; `next` is as it was then.
        """
