// The rows that a cache keeps: sets of 16, read without locks. The plain version, and what the
// fields mean, are in engraphy/store/sets.py.
#pragma once

#include <stdint.h>

namespace engraphy {

constexpr int cache_ways = 16, cache_ghosts = 12;

struct CacheSet {
    uint32_t version;  // odd: being changed
    uint8_t ghost_next, taken, unused[2];
    uint8_t order[cache_ways], reads[cache_ways];
    uint16_t ghosts[cache_ghosts];
    int32_t tags[cache_ways];
};
static_assert(sizeof(CacheSet) == 128, "as in sets.py");

// Each record is followed by its rows; the next record begins on a cache line.
struct CacheMemory {
    uint8_t *begin;
    uint64_t *changes;  // a version of all sets together, with a cache line of its own
    int64_t count, row_bytes;

    int64_t set_bytes() const {
        return ((int64_t)sizeof(CacheSet) + cache_ways * row_bytes + 63) / 64 * 64;
    }
};

// ids, rows and out may begin at any byte; ids have been checked.
struct CacheLook {
    CacheMemory memory;
    const int64_t *ids;    // [N]
    uint8_t *out;          // [N, row_bytes]
    int64_t first, last;   // which of the N to look for: several threads share a call
    bool stream;           // past the caches
    int64_t *missing;      // from `first` on: positions of the rows that are not here
    int64_t *versions;     // likewise: of their sets
};

// Any number at once, beside one of the functions below. Returns how many rows are missing.
using CacheLookFunction = int64_t(const CacheLook &);

struct CacheKeep {
    CacheMemory memory;
    const int64_t *ids;       // [M], distinct
    const int64_t *versions;  // [M]
    const int64_t *reads;     // [M]
    const uint8_t *rows;      // [M, row_bytes]
    int64_t count;
    bool *kept;               // [M], scratch
};

// One of these three at a time.
using CacheKeepFunction = void(const CacheKeep &);
using CacheHoldFunction = void(const CacheMemory &, const int64_t *ids, int64_t count);
using CacheWriteFunction = void(const CacheMemory &, const int64_t *ids, const uint8_t *rows,
                                int64_t count);

}  // namespace engraphy
