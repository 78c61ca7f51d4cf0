// Whether the rows of a mapped table are in memory.
#pragma once

#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include "rows.hpp"

namespace engraphy {

// Whether these bytes of a mapped file are in memory, as far as the system tells.
inline bool is_resident(const uint8_t *bytes, int64_t size) {
    static const uintptr_t page = sysconf(_SC_PAGESIZE);
    const uintptr_t end = (uintptr_t)bytes + size;
    for (uintptr_t at = (uintptr_t)bytes & ~(page - 1); at < end; at += page) {
        unsigned char there;
        if (mincore((void *)at, page, &there) || !(there & 1)) return false;
    }
    return true;
}

inline const uint8_t *row_of(const RowsCall &table, int64_t row, int64_t row_bytes) {
    return table.shards[row / table.shard_rows] + row % table.shard_rows * row_bytes;
}

}  // namespace engraphy
