// Where rows of mapped shards lie, and bringing them near. For kernel files: each instruction set
// has its own copy.
#pragma once

#include <stdint.h>

namespace engraphy::ENGRAPHY_LEVEL {
namespace {

typedef int64_t I64 __attribute__((aligned(1), may_alias));  // ids may begin at any byte

constexpr int line = 64;  // bytes that one prefetch brings

// Row number i of a call. A call without ids asks for rows 0, 1, 2, ...
template <class Call> inline const uint8_t *row_at(const Call &call, int64_t i, int64_t row_bytes) {
    const uint64_t id = (uint64_t)(call.ids ? ((const I64 *)call.ids)[i] : i),
                   per_shard = (uint64_t)call.shard_rows;
    if (call.rows <= call.shard_rows) return call.shards[0] + id * row_bytes;
    // A division of 32 bits is the faster one, by much on older machines.
    const uint64_t shard =
        (id | per_shard) >> 32 ? id / per_shard : (uint32_t)id / (uint32_t)per_shard;
    return call.shards[shard] + (id - shard * per_shard) * row_bytes;
}

inline const uint8_t *prefetched(const uint8_t *row, int64_t row_bytes) {
    for (int64_t at = 0; at < row_bytes; at += line) __builtin_prefetch(row + at);
    __builtin_prefetch(row + row_bytes - 1);
    return row;
}

}  // namespace
}  // namespace engraphy::ENGRAPHY_LEVEL
