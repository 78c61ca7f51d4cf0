"""The compiled module.

Arrays are passed as addresses (0 = absent), C-contiguous. The caller checks shapes and dtypes, and
keeps the arrays alive during the call. A kernel releases the GIL while it works, unless the work is
too little for that (`Unlocked` in bind.hpp). Functions raise ValueError if sizes are invalid.
"""

from collections.abc import Callable, Sequence
from typing import Any

def levels() -> tuple[str, ...]:
    """Instruction sets that are compiled in and that this CPU runs, weakest first."""

def level() -> str:
    """The instruction set in use."""

def set_level(name: str) -> bool:
    """Uses another instruction set. Returns False, without a change, if `levels()` lacks it."""

def address(array: object) -> int:
    """Address of a C-contiguous array. numpy's attributes take ten times longer.

    Raises BufferError or ValueError if it is not contiguous, TypeError if it has no buffer.
    """

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
    """Writes rows `ids` (int64 [count]) as numbers to out [count, d]: float32 or bf16 bits.

    Arrays may begin at any byte. kind, d, scale: of the RowFormat; scale is 1 if it has none.
    shards: u64 [S], the addresses of uint8 [n, row_bytes] without gaps, `shard_rows` rows each
    except the last, `rows` together. waits: reading may wait for a disk, so the GIL is released
    for few rows too.

    Returns -1. If an id is outside [0, rows), writes nothing and returns its position.
    Raises ValueError if kind or d is invalid.
    """

def decode_rows(
    kind: str, d: int, scale: float, raw: int, count: int, to_bf16: bool, out: int
) -> None:
    """`read_rows` for all rows of raw, uint8 [count, row_bytes], in order."""

def first_bad(ids: int, count: int, rows: int) -> int:
    """Position of the first id of int64 [count] outside [0, rows); -1 if all are inside."""

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
    """Copies the bytes of rows `ids` to out: uint8 [count, row_bytes].

    Arguments as for `read_rows`; the caller has checked the ids.
    """

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
    """`Sets.look`: copies those of the rows `ids` that a cache has to their places in out.

    memory, changes: of a `NativeSets` in store/sets.py; memory begins with a cache line. ids: int64
    [count], checked by the caller. out: uint8 [count, row_bytes]. missing: int64 [2, count], gets
    the positions of the M missing rows, ascending, and the versions of their sets. Any number of
    calls may run at once, together with at most one call of the three functions below.

    Returns M, the number of missing rows.
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
    """`Sets.keep`: keeps rows that `cache_look` missed.

    ids, versions, reads: int64 [count]; ids are distinct. from_rows: uint8 [count, row_bytes].
    """

def cache_hold(
    memory: int, changes: int, set_count: int, row_bytes: int, ids: int, count: int
) -> None:
    """`Sets.hold`."""

def cache_write(
    memory: int, changes: int, set_count: int, row_bytes: int, ids: int, from_rows: int, count: int
) -> None:
    """`Sets.write`. from_rows: uint8 [count, row_bytes], or 0 if the write failed."""

Runs = tuple[int, int, int, int, int, int, int]
"""Gradients of one layer in the order of their rows: (grads, firsts, entries, order, starts, count,
d).

grads: u64 [E], the addresses of float32 [n, d]. firsts: int64 [E], the position of the first
gradient of each. order: int64 [N], positions; starts: int64 [count + 1], where the gradients of
each row begin in it. Both are 0 if each row has one gradient, in the order of the positions.
"""

Place = tuple[int, int, int, bool, bool]
"""Where rows or moments lie: (shards, shard_rows, rows, bf16, compact).

The first three as for `read_rows`. bf16: else float32. compact: they are those of the call, in its
order, not those of a store.
"""

def sort_rows(ids: int, count: int, order: int, rows: int, starts: int) -> tuple[int, int]:
    """Sorts gradients by row; those of a row stay in the order of their positions.

    ids: int64 [count], count > 0. Writes order: int64 [count], the positions; the first U values of
    rows: int64 [count], the distinct ids; and the first U + 1 of starts: int64 [count + 1].

    Returns U and how many rows have several gradients. U is -1 if an id is negative or too large;
    the arrays are invalid then.
    """

def survey(runs: Runs, sums: int, squares: bool) -> tuple[bool, float]:
    """Sums gradients before they are used.

    Writes the sums of rows that have several gradients to sums: float32 [M, d].

    Returns whether all sums are finite, and, if `squares`, the sum of their squares in float64, as
    memory/summed.py defines it (else 0).
    """

def update_rows(
    rule: str,
    factors: tuple[float, float, float, float],
    runs: Runs,
    sums: int,
    scale: float,
    ids: int,
    rows: Place,
    moments: Place,
    stochastic: bool,
    key: int,
) -> int:
    """Updates rows and their moments in place.

    rule: "adam", "adagrad" or "nesterov". factors: of the rule, as its class in engraphy/train has
    them. sums: from `survey`. scale: multiplies the sums. ids: int64 [count], distinct. stochastic:
    how bf16 is rounded. key: of the random bits.

    Returns -1. If an id is outside of a store, writes nothing and returns its position.
    """

def threads() -> int:
    """How many threads share one call of `read_rows`, `decode_rows`, `gather_rows` or `cache_look`
    on 4096 rows or more."""

def set_threads(count: int) -> None:
    """Sets the number of `threads`. Raises ValueError unless count is positive."""

def guard(begin: int, size: int, writable: bool) -> int:
    """Watches a mapping of a file. If one of its pages cannot be read, the whole mapping becomes
    zero pages; otherwise a SIGBUS would end the process.

    Returns the slot of the watch. Raises RuntimeError if all slots are taken.
    """

def unguard(slot: int) -> None:
    """Ends the watch. Call it before the memory is unmapped."""

def damaged(slot: int) -> bool:
    """Whether a mapping became zero pages."""

def damage_count() -> int:
    """How often a mapping of this process became zero pages."""

def arm_guard() -> None:
    """Puts the guard's SIGBUS handler before any handler that was installed later. Faults outside
    of guarded mappings are passed on to that handler."""

class FileEnds:
    """The last bytes of guarded files, looked at by one call."""

    def __init__(self, slots: Sequence[int], last_bytes: Sequence[int]) -> None:
        """For each file the slot of its guard, and the address of its last byte."""

    def whole(self, damages: int) -> bool:
        """Whether no file was cut, as far as its memory shows: no last byte is zero, and
        `damage_count` still is `damages`. Files that were unguarded since do not count.
        """

class RowReader:
    """Reads rows of files with its own blocking threads.

    It keeps file descriptors as numbers. The caller closes them after the reader is gone.
    """

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
        """Row r is row r % file_rows of file r // file_rows. The first row of a file begins at byte
        `offset`; file i has sizes[i] bytes. threads: reads that run at a time. whole_pages: read
        whole pages, as O_DIRECT needs it.
        """

    def read(self, ids: int, count: int, out: int) -> tuple[int, int, int, int]:
        """Writes rows `ids` (int64 [count], checked by the caller) to out: uint8
        [count, row_bytes].

        Returns the number of reads, their bytes, -1 and 0. If a read failed, the last two are the
        number of the file and errno (0 if the file ended too early), and `out` is invalid.
        """

def hot_levels(
    ids: int, count: int, order: int, seed: int, room: int, of: int
) -> tuple[list[int], bytearray, bytearray]:
    """`PerfectHash.build` of int32 ids [count, order], for one seed.

    room, of: a level has room / of bits for each key. Returns the lines of each level, all lines,
    uint32 [B, 16], and the hashes of the keys that found no bit, uint64.
    """

class HotOrder:
    """The hot n-grams of one order: `engraphy.addresses.hot.HotOrder`."""

    def __init__(
        self,
        order: int,
        seed: int,
        sizes: Sequence[int],
        lines: int,
        records: int,
        keys: int,
        fingerprint_bits: int,
        slots: int,
        owner: object,
    ) -> None:
        """lines: uint32 [sum(sizes), 16]. records: uint32 [keys, 1 + order], or [keys, 2] with
        fingerprint_bits, else 0. slots: the index's. owner: keeps both arrays alive.
        """

    def find(self, ids: int, count: int, slots: int) -> None:
        """Writes slots: int64 [count], of int32 ids [count, order], the oldest first."""

    def fill(self, ids: int, slots: int, records: int) -> None:
        """Writes the records of all keys: int32 ids [keys, order], int64 slots [keys]."""

class HashPlan:
    """The part of an addresser that is the same in all calls.

    It copies its arrays and never changes; deepcopy shares it.
    """

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
        hot: Sequence[HotOrder | None] = ...,
        hot_first: Sequence[int] = ...,
    ) -> None:
        """map: int32 [vocab], raw -> compressed id, negative = dead; 0 = identity. vocab: raw ids
        lie in [0, vocab). filler: compressed id. stop: raw id that ends the look-back of later
        ids, -1 = none. orders: 1 to 32 each, N the largest. multipliers: int64 [layers, N];
        their products with compressed ids stay in [0, 2**63). primes, offsets: int64 [layers, C],
        C = len(orders) * heads, order-major. hot: hot n-grams of each order, None = there are
        none; empty = no order has any. hot_first: of each layer the first of their rows.
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
        alive: int = 0,
    ) -> int:
        """Writes out: int64 [layers, batch, tokens, C], or [batch, tokens, C] of the layer with
        index `layer`; 0 = it is not wanted. Writes alive, bool [batch, tokens], unless it is 0:
        True where a position is live and its id has a token.

        ids: int64 [batch, tokens], raw. history: int64 [batch, N - 1], raw, -1 = nothing there; 0 =
        nothing at all. live, starts: bool [batch, tokens]; 0 = all live, no starts.

        Returns -1. If an id is outside [0, vocab), nothing is written and p is returned: p >= 0 is
        its flat position in ids, p <= -2 means position -2 - p in history.
        """

class BatchReader:
    """Rows of a chunk of tokens, for several layers.

    It keeps its plan and the stores of `pins` alive, not the tables.
    """

    def __init__(
        self,
        plan: HashPlan,
        first_layer: int,
        kind: str,
        d: int,
        scale: float,
        shards: Sequence[int],
        shard_rows: Sequence[int],
        rows: Sequence[int],
    ) -> None:
        """first_layer: the plan's index of the first of these layers. The last three: of each of
        them, as for `read_rows`, like kind, d and scale.

        Raises ValueError if a layer has fewer rows than its addresses name.
        """

    def read(
        self,
        ids: int,
        batch: int,
        tokens: int,
        history: int,
        live: int,
        starts: int,
        outs: Sequence[int],
        to_bf16: bool,
        row_ids: int,
        waits: bool,
    ) -> None:
        """Writes the rows of each layer to one of outs: [batch, tokens, C * d], float32 or bf16
        bits.

        ids, history, live, starts: as for `HashPlan.rows`, which has checked them. row_ids: gets
        the row ids, int64 [layers, batch, tokens, C], unless it is 0. waits: as for `read_rows`.
        """

    def resident(
        self,
        ids: int,
        batch: int,
        tokens: int,
        history: int,
        live: int,
        starts: int,
        row_bytes: int,
    ) -> bool:
        """Whether the rows that `read` would read are in memory, as far as the system tells.

        It asks for each row, and keeps the GIL: for few tokens.
        """

class PagedFusion:
    """The fusion layer over a paged cache of conv inputs, from the projections on:
    `paged.fuse_plainly`.

    It keeps addresses: the caller keeps the arrays alive, and C-contiguous.
    """

    def __init__(
        self,
        *,
        bf16: bool,
        streams: int,
        hidden: int,
        taps: int,
        eps: float,
        conv_eps: float,
        scale: int,
        conv_norm: int,
        conv: int,
    ) -> None:
        """N, S, D, K = tokens, streams, hidden, taps (at most 16).

        bf16: hidden states and projections are bfloat16, else float32. scale: float32 [S, D], the
        factors of query norm times those of key norm. conv_norm: float32 [S, D], factors. conv:
        float32 [K, S, D].
        """

    def fuse(
        self,
        *,
        tokens: int,
        x: int,
        key: int,
        value: int,
        stride: int,
        live: int,
        offsets: int,
        cache: int,
        cache_values: int,
        out: int,
        threads: int,
    ) -> None:
        """Writes x + update to out [N, S, D], and conv inputs to the cache.

        x: [N, S, D]. key, value: [N, S, D] and [N, D], `stride` values from a token to the next.
        live: bool [N]. offsets: int64 [N, K], where the line of each tap begins in the cache,
        float32 [cache_values]; -1 = zeros; the last one of a token gets its conv inputs.
        """

class ChunkFusion:
    """The fusion layer for a chunk, from the projections on: `plain.fuse`, and its gradients.

    It keeps addresses: the caller keeps the arrays alive, and C-contiguous.
    """

    def __init__(
        self,
        *,
        kind: int,
        batch: int,
        tokens: int,
        streams: int,
        hidden: int,
        taps: int,
        dilation: int,
        eps: float,
        conv_eps: float,
        residual: bool,
        columns: int,
        masked: bool,
        scale: int,
        conv_norm: int,
        conv: int,
        normed_conv: int,
        x: int,
        key: int,
        value: int,
        window: int,
        live: int,
        starts: int,
        gate: int,
        stats: int,
        threads: int,
    ) -> None:
        """B, T, S, D, K = batch, tokens, streams, hidden, taps (at most 16); W = (K - 1) *
        dilation. F is float64 of kind 4, else float32.

        kind: of x and out, and of key and value: 0 float32 and float32, 1 float32 and bfloat16, 2
        bfloat16 and bfloat16, 3 bfloat16 and float32, 4 float64 and float64. residual: out is x +
        update, else update. columns: conv inputs that are returned. masked: those before the last
        start are zero.

        scale: F [S, D], the factors of the query norm times those of the key norm. conv_norm: F
        [S, D], factors. conv: F [K, S, D]. normed_conv: conv times conv_norm. x: [B, T, S, D]. key:
        [B, T, S, D]. value: [B, T, D]. window: F [B, W, S, D]; 0 = zeros. live, starts: bool [B,
        T]; 0 = all live, no starts; starts are not read later.

        gate, F [B, T, S], and stats, F [B, T, S, 4]: `forward` writes them, `backward` reads them.
        threads: share the work. Raises ValueError if a size is invalid or an array is missing.
        """

    def forward(self, *, out: int, inputs: int) -> None:
        """Writes out [B, T, S, D]; gate; stats; inputs, F [B, columns, S, D], the last conv inputs
        of window and chunk.
        """

    def backward(
        self,
        *,
        out_grad: int,
        gate_grad: int,
        inputs_grad: int,
        x_grad: int,
        key_grad: int,
        value_grad: int,
        window_grad: int,
        sums: int,
    ) -> None:
        """Gradients of `forward`; the same for any `threads`.

        out_grad, gate_grad, inputs_grad: of the outputs, in their dtypes; the last two may be 0.

        Writes the gradients of x, key, value and window, in their dtypes; that of x and of window
        unless they are 0. sums, F [R, S, D]: the gradient of scale, the K of normed_conv, with a
        window the K of conv that come from it, and with inputs_grad the one of conv_norm that comes
        from it.
        """

def know_tensors(
    tensor: type, dtypes: list[Any], is_grad_enabled: Callable[[], bool], exchange: Any
) -> bool:
    """Says how native calls may ask tensors where they lie.

    tensor: torch.Tensor. dtypes: float32, float64, bfloat16, int64. exchange: the capsule with
    DLPack's functions of the type, or None. Returns whether they are used; else the tensors' Python
    methods are called.
    """

class FusePlan:
    """The part of a fusion layer that is the same for all tokens.

    It keeps addresses, and the weights alive if `stand_on` was called.
    """

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
        has them; biases may be 0; conv_norm and conv are 0 if taps is 0. Raises ValueError if a
        weight is missing.
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

        x: [B, S, D]. rows: float32 [B, E], whatever the kind. window: the first sequence's oldest
        conv input [S, D], (taps - 1) * dilation columns before the present; the next sequence's
        lies `stride` values further.
        live: bool [B]; 0 = all. Writes x and what the layer adds to out [B, S, D]; the gate to gate
        [B, S] unless it is 0; the present conv inputs to inputs, [S, D] for each sequence, as far
        apart as the windows. Raises ValueError if batch is not positive or an array is missing.
        """

    kind: int  # read-only

    def stand_on(
        self,
        empty: list[dict[Any, Any]],
        entries: list[tuple[dict[str, Any], str, Any]],
        weights: list[Any],
    ) -> None:
        """Says what the plan was made for.

        empty: dictionaries that have nothing in them. entries: dictionaries, keys, and what they
        have there or None. weights: tensors, which are now where the plan has them.
        """

    def holds(self) -> bool:
        """Whether nothing has changed of what the plan was made for."""
    def fuse_token(self, layer: int, x: Any, rows: bytearray, cursor: Cursor) -> Any:
        """`fuse` for the oldest token of a cursor that this layer has not seen: all are live, and
        no gate is wanted.

        layer: index of the layer, in the cursor too. x: tensor [B, 1, S, D]; with one stream also
        [B, 1, D]. rows: float32 [layers, B, E]. Returns a new tensor. Returns None, without a
        change, if the plan does not hold, gradients are enabled, x, the layer and the cursor's
        columns do not fit each other, or there is no such token, or no column for it.
        """

class Cursor:
    """Where B sequences go on by one token each: columns of buffers, of ids and of each layer's
    conv inputs.

    It keeps addresses. Whoever made it keeps the buffers, and touches them in no other way until
    it has given up the cursor.
    """

    def __init__(self, batch: int, ids: Sequence[int], windows: Sequence[Sequence[int]]) -> None:
        """Columns are seven numbers: the addresses of the first sequence's oldest column that is
        read and of its next column, which is written; values from one sequence's columns to the
        next one's; bytes from one column to the next; columns that may be written; values of a
        column; 1 if they are float64, else 0.

        ids: int64. windows: of each layer, or none at all. Raises ValueError if batch or columns
        are invalid.
        """

    batch: int  # read-only

    def ready(self) -> bool:
        """Whether there is a column for one more token, of ids and in each window, and the cursor
        has not been given up."""
    def tokens(self) -> int:
        """Ids that were written for each sequence, since the last `take`."""
    def has_windows(self) -> bool:
        """Whether there are columns for conv inputs, too."""
    def advance(self) -> None:
        """Counts the next id of each sequence, which `TokenReader.read_scoped` has written."""
    def end(self) -> None:
        """Gives the cursor up: no native call takes it any more."""
    def take(self) -> list[int]:
        """How many columns were written since the last call: of ids, then of each window."""

class TokenReader:
    """Rows of all layers for one token of each of a few sequences.

    It keeps its plan and the stores of `pins` alive, not the tables.
    """

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
        ends: Sequence[Sequence[int]],
        pins: list[tuple[Any, Any]],
    ) -> None:
        """kind, d, scale, and for each layer shards, shard_rows and rows: as for `read_rows`.
        on_disk: for each layer, 1 if its rows may not be in memory. Then mincore is asked for each
        row. ends: for each layer, the addresses of the last bytes of the files behind its shards;
        none if there are no files. pins: for each layer, its store and a weak reference to the
        first of the shards; none if `read_pinned` is not used.
        """

    def read_pinned(self, ids: Any, cursor: Cursor) -> bytearray | None:
        """Rows as numbers, float32 [layers, B, C * d]. Writes the ids to the cursor's next column,
        and advances it. ids: tensor int64 [B, 1], raw.

        Returns None, without a change, if a store has other shards (`MappedStore.pinned`), an id,
        in the past too, has no token or is outside the vocabulary, a row is not in memory, the
        cursor is not ready, or ids are no such tensor. Checks after the read that the files that
        rows were read from are whole. If it is not sure, since the last byte of one of them is
        zero, or a mapping of the process was damaged (see `trust`), the stores find out
        (`MappedStore.check_memory`); raises what they raise.
        """

    def read_scoped(self, ids: Any, cursor: Cursor) -> bytearray | None:
        """The same without a look at the stores or their files. The caller has checked them, checks
        them again, and then advances the cursor."""

    def trust(self, damages: int) -> None:
        """Says that `damage_count` was `damages`, and none of it met the files of this reader."""
