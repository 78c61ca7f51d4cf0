"""How soon rows are read again: hit rates of LRU caches of every size at once, and Zipf's law."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..addresses.counts import Counts
from ..errors import InputError

_BLOCK = 2**20  # elements of one step, so that temporary arrays stay small
_CACHED_BITS = 15  # arrays of 2**15 elements stay in the caches of a core
_MOST_READS = 2**31 - 1
_PER_DECADE = 8  # bins of the fit of Zipf's law


def stack_distances(keys_N: np.ndarray) -> np.ndarray:
    """LRU stack distances (Mattson et al., 1970).

    A cache of S rows that evicts the least recently used row hits exactly if the distance is below
    S. So the distances of one pass give the hit rates of all sizes.

    Args:
        keys_N: Integers from 0 on, in the order in which they are read.

    Returns:
        int32 [N]: how many distinct other keys were read since the last read of the same key; -1 =
        it was not read before.

    Raises:
        InputError: A key is negative, or there are too many reads for keys as large as these.
    """
    last_N = _last_reads(keys_N)
    again_M = np.flatnonzero(last_N >= 0)
    last_M = last_N[again_M]
    # Between the last read p of a key and its read i there are i - p - 1 reads. Not the first of
    # their keys there are those reads j whose own last read lies behind p: j < i, last[j] > p.
    is_last_N = np.zeros(len(keys_N), dtype=bool)
    is_last_N[last_M] = True
    rank_N = np.cumsum(is_last_N, dtype=np.int32)
    repeats_M = _larger_before(rank_N[last_M] - 1)
    distances_N = np.full(len(keys_N), -1, dtype=np.int32)
    distances_N[again_M] = again_M - last_M - 1 - repeats_M
    return distances_N


def hit_rates(distances_N: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Hit rates of LRU caches.

    Args:
        distances_N: What `stack_distances` gave, or the part of the reads that counts.
        sizes: Rows of each cache.

    Returns:
        float64 [len(sizes)], shares of the reads.
    """
    again_M = distances_N[distances_N >= 0]
    hits = [np.count_nonzero(again_M < size) for size in sizes]
    return np.array(hits) / max(1, len(distances_N))


def zipf_exponent(ranked: Counts, measured: Counts, first: int = 10, least: int = 10) -> float:
    """The exponent s of Zipf's law: the key of rank r is read in proportion to r**-s.

    Ranks come from one text and frequencies from another. With both from the same text, chance
    alone would make frequencies fall with rank. The exponent is the slope of a least-squares line
    through the logarithms of mean frequencies, over bins of equal width in log rank.

    Args:
        ranked: Counts of the text that orders the keys.
        measured: Counts of another text.
        first: The first rank of the fit.
        least: The fit ends with the last rank that has at least so many reads in `ranked`.

    Returns:
        s, positive. NaN if fewer than three bins have reads.
    """
    keys_K = ranked.by_count()
    last = int(np.count_nonzero(ranked.counts_K >= least))
    decades = np.log10(max(last, first) / first)
    edges = np.geomspace(first - 1, max(last, first), int(decades * _PER_DECADE) + 2)
    edges = np.unique(edges.astype(np.int64))
    reads = np.concatenate([[0], np.cumsum(measured.of(keys_K[:last]))])
    width = np.diff(edges)
    mean = np.diff(reads[np.minimum(edges, last)]) / width
    middle = np.sqrt((edges[:-1] + 1.0) * edges[1:])
    used = mean > 0
    if np.count_nonzero(used) < 3:
        return float("nan")
    slope = np.polyfit(np.log(middle[used]), np.log(mean[used]), 1)[0]
    return float(-slope)


def _last_reads(keys_N: np.ndarray) -> np.ndarray:
    """The position of the last read of the same key, int32 [N]; -1 = there was none."""
    count = len(keys_N)
    last_N = np.full(count, -1, dtype=np.int32)
    if not count:
        return last_N
    bits = max(1, (count - 1).bit_length())
    lowest, highest = int(keys_N.min()), int(keys_N.max())
    if lowest < 0 or highest.bit_length() + bits > 63 or count > _MOST_READS:
        raise InputError(
            "keys: expected integers from 0 on, so that key and position take 63 bits, "
            f"found {lowest} to {highest} in {count} reads"
        )
    # Sorting the pairs (key, position) as one number is several times as fast as argsort.
    pairs_N = keys_N.astype(np.int64)
    pairs_N <<= bits
    pairs_N |= np.arange(count)
    pairs_N.sort()
    changed = pairs_N[1:] ^ pairs_N[:-1]
    changed >>= bits
    same = changed == 0
    pairs_N &= (1 << bits) - 1
    position_N = pairs_N.astype(np.int32)
    last_N[position_N[1:][same]] = position_N[:-1][same]
    return last_N


def _larger_before(ranks_M: np.ndarray) -> np.ndarray:
    """For each element of a permutation of 0..M-1, how many elements before it are larger.

    int32 [M]. The elements are sorted bit by bit, the highest first. The groups of the last bits
    are so small that all their passes stay in the caches.
    """
    count = len(ranks_M)
    values = ranks_M.astype(np.int32)
    larger = np.zeros(count, dtype=np.int32)
    for bit in reversed(range(_CACHED_BITS, max(1, (count - 1).bit_length()))):
        values, larger = _sorted_by(bit, values, larger)
    for first in range(0, count, 1 << _CACHED_BITS):
        group = slice(first, first + (1 << _CACHED_BITS))
        value = values[group] - first
        more = larger[group]
        for bit in reversed(range(_CACHED_BITS)):
            value, more = _sorted_by(bit, value, more)
        larger[group] = more
    return larger[ranks_M]


def _sorted_by(bit: int, values: np.ndarray, larger: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One stable pass: sorts a permutation by a bit, within groups that agree in all higher bits.

    A group stands together already, and begins at the place of its smallest value, since each value
    occurs once. An element with a 0 is passed by those before it in its group that have a 1: they
    are larger.

    Args:
        bit: The bit; passes go from the highest to the lowest.
        values: int32 [M], a permutation of 0..M-1.
        larger: int32 [M], how many larger elements before it each element has passed so far.

    Returns:
        Both arrays in the new order.
    """
    count = len(values)
    ones_before = np.zeros(count + 1, dtype=np.int32)
    np.cumsum(values >> bit & 1, out=ones_before[1:])
    sorted_values = np.empty_like(values)
    sorted_larger = np.empty_like(larger)
    for first in range(0, count, _BLOCK):
        value = values[first : first + _BLOCK]
        group = value >> bit + 1 << bit + 1
        passed = ones_before[first : first + len(value)] - ones_before[group]
        is_one = (value >> bit & 1).astype(bool)
        place = np.arange(first, first + len(value), dtype=np.int32) - passed
        place = np.where(is_one, group + (1 << bit) + passed, place)
        sorted_values[place] = value
        sorted_larger[place] = larger[first : first + _BLOCK] + np.where(is_one, 0, passed)
    return sorted_values, sorted_larger
