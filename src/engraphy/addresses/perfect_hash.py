"""A minimal perfect hash: N keys -> 0 to N-1, each to a number of its own, in 3.3 bits a key.

A key is an n-gram: n ids. Levels are arrays of bits. A key falls on one bit of the first level; if
no other key does, the bit is set, and is the key's. The keys that met others go to the next level,
which is smaller. A key's number is the number of set bits before its own (Limasset, Rizk, Chikhi,
Peterlongo: "Fast and scalable minimal perfect hashing for massive key sets", 2017).

Bits lie in blocks of one cache line: the number of set bits before the block, then 480 bits. So a
level costs a look-up one line.

The numpy code below is the specification; the native kernel gives the same bits and numbers.
"""

# pyright: reportPrivateUsage=false
# `_native` is private to the package, not to a folder.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .. import _native
from ..errors import ConfigError

WORDS = 16
"""32-bit words of a block: a count, then bits, the lowest of each word first."""
BITS = 32 * (WORDS - 1)
MOST_LEVELS = 48
MOST_SEEDS = 8

_ROOM = (7, 4)  # bits of a level for each key that comes to it
_KEY = np.uint64(0xD6E8FEB86659FD93)
_GAMMA = 0x9E3779B97F4A7C15
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_MASK = (1 << 64) - 1
_BIT_COUNTS = np.array([value.bit_count() for value in range(1 << 16)], dtype=np.uint8)


def key_hashes(ids_Nn: np.ndarray, seed: int) -> np.ndarray:
    """uint64 [N] of keys [N, n]. Other seeds give other hashes."""
    values_N = np.full(len(ids_Nn), (seed + 1) * _GAMMA & _MASK, dtype=np.uint64)
    for i in range(ids_Nn.shape[1]):
        values_N = (values_N ^ ids_Nn[:, i].astype(np.uint64)) * _KEY
        values_N ^= values_N >> np.uint64(32)
    return values_N


def level_hashes(hashes_N: np.ndarray, level: int) -> np.ndarray:
    """uint64 [N]: independent hashes for each level (splitmix64)."""
    z_N = hashes_N + np.uint64((level + 1) * _GAMMA & _MASK)
    z_N = (z_N ^ (z_N >> np.uint64(30))) * _MIX[0]
    z_N = (z_N ^ (z_N >> np.uint64(27))) * _MIX[1]
    return z_N ^ (z_N >> np.uint64(31))


@dataclass(frozen=True, eq=False)
class PerfectHash:
    """The levels of one set of keys.

    Attributes:
        seed: Of `key_hashes`.
        sizes: Blocks of each level.
        blocks_BW: uint32 [B, 16], the blocks of all levels.
    """

    seed: int
    sizes: tuple[int, ...]
    blocks_BW: np.ndarray

    @classmethod
    def build(cls, ids_Nn: np.ndarray) -> PerfectHash:
        """The levels of distinct keys. They depend on the set of keys alone, not on its order.

        Args:
            ids_Nn: int32 [N, n].

        Raises:
            ConfigError: Two keys are equal; it is named.
        """
        for seed in range(MOST_SEEDS):
            sizes, blocks_BW, left = _built(ids_Nn, seed)
            if not len(left):
                return cls(seed, sizes, blocks_BW)
            _refuse_equal(ids_Nn[left])
        raise ConfigError(f"n-grams: expected distinct ones, found {len(ids_Nn)} that have no hash")

    def ranks(self, ids_Nn: np.ndarray) -> np.ndarray:
        """int64 [N]: the numbers of keys. Anything else has the number of some key, or -1."""
        hashes_N = key_hashes(ids_Nn, self.seed)
        ranks_N = np.full(len(ids_Nn), -1, dtype=np.int64)
        left = np.arange(len(ids_Nn))
        first = 0
        for level, size in enumerate(self.sizes):
            block, bit = _places(hashes_N[left], level, size)
            block += first
            word = self.blocks_BW[block, 1 + bit // 32]
            hit = (word >> (bit % 32).astype(np.uint32) & np.uint32(1)).astype(bool)
            ranks_N[left[hit]] = self._before(block[hit], bit[hit])
            left = left[~hit]
            first += size
        return ranks_N

    def _before(self, block_N: np.ndarray, bit_N: np.ndarray) -> np.ndarray:
        """Set bits before a bit."""
        lines_NW = self.blocks_BW[block_N]
        kept = bit_N[:, None] - 32 * np.arange(WORDS - 1)  # bits of each word that lie before it
        mask_NW = (np.uint64(1) << kept.clip(0, 32).astype(np.uint64)) - np.uint64(1)
        words_NW = lines_NW[:, 1:] & mask_NW.astype(np.uint32)
        counts_N = _BIT_COUNTS[words_NW.view(np.uint16)].sum(axis=1, dtype=np.int64)
        return lines_NW[:, 0] + counts_N


def _built(ids_Nn: np.ndarray, seed: int) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
    """Blocks of each level, all blocks, and the places of keys that found no bit."""
    core = _native.core
    if core is None:
        levels, left = _levels(key_hashes(ids_Nn, seed))
        return tuple(len(level) for level in levels), _counted(levels), left
    ids_Nn = np.ascontiguousarray(ids_Nn, dtype=np.int32)
    sizes, blocks, hashes = core.hot_levels(
        core.address(ids_Nn) if len(ids_Nn) else 0, *ids_Nn.shape, seed, *_ROOM
    )
    left = np.zeros(0, dtype=np.int64)
    if hashes:
        left_hashes = np.frombuffer(hashes, np.uint64)
        left = np.flatnonzero(np.isin(key_hashes(ids_Nn, seed), left_hashes))
    return tuple(sizes), _in_lines(np.frombuffer(blocks, np.uint32)), left


def _in_lines(words: np.ndarray) -> np.ndarray:
    """A copy, uint32 [B, 16], whose blocks are cache lines: elsewhere each would lie in two."""
    line = 4 * WORDS
    memory = np.empty(words.nbytes + line, np.uint8)
    begin = -memory.ctypes.data % line
    blocks_BW = memory[begin : begin + words.nbytes].view(np.uint32).reshape(-1, WORDS)
    blocks_BW[...] = words.reshape(-1, WORDS)
    return blocks_BW


def _places(hashes_N: np.ndarray, level: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Block, from 0 to size - 1, and bit of each key in a level, int64."""
    z_N = level_hashes(hashes_N, level)
    block_N = (z_N >> np.uint64(32)) * np.uint64(size) >> np.uint64(32)
    bit_N = (z_N & np.uint64(0xFFFFFFFF)) * np.uint64(BITS) >> np.uint64(32)
    return block_N.astype(np.int64), bit_N.astype(np.int64)


def _levels(hashes_N: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Bits of each level, bool [size, 480], and the places of keys that found no bit."""
    left = np.arange(len(hashes_N))
    levels: list[np.ndarray] = []
    while len(left) and len(levels) < MOST_LEVELS:
        size = -(-_ROOM[0] * len(left) // (_ROOM[1] * BITS))
        block, bit = _places(hashes_N[left], len(levels), size)
        place = block * BITS + bit
        counts = np.bincount(place, minlength=size * BITS)
        levels.append((counts == 1).reshape(size, BITS))
        left = left[counts[place] > 1]
    return levels, left


def _counted(levels: list[np.ndarray]) -> np.ndarray:
    """Blocks of all levels."""
    bits = np.concatenate([np.zeros((0, BITS), dtype=bool), *levels])
    blocks_BW = np.zeros((len(bits), WORDS), dtype=np.uint32)
    blocks_BW[:, 1:] = np.packbits(bits, axis=1, bitorder="little").view("<u4")
    counts_B = bits.sum(axis=1)
    blocks_BW[:, 0] = np.cumsum(counts_B) - counts_B
    return blocks_BW


def _refuse_equal(ids_Nn: np.ndarray) -> None:
    distinct, counts = np.unique(ids_Nn, axis=0, return_counts=True)
    if len(distinct) < len(ids_Nn):
        twice = distinct[counts > 1][0].tolist()
        raise ConfigError(f"n-grams: expected distinct ones, found {twice} more than once")
