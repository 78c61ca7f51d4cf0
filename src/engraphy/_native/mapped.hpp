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

// A store to a line that is elsewhere waits until this core has the line to itself.
inline void prefetch_to_write(const void *to, int64_t size) {
    for (int64_t at = 0; at < size; at += line) __builtin_prefetch((const uint8_t *)to + at, 1);
}

// The rows of a call, in order, each on its way long before it is asked for.
//
// Lines go to the second level of the caches, where more of them can be awaited at a time than in
// the first. A prefetch also waits for the translation of its address, and little else goes on
// then. So the first lines of a few rows are asked for together, which brings their translations
// at the same time, and the other lines row by row.
template <class Call> class ComingRows {
  public:
    inline __attribute__((always_inline)) ComingRows(const Call &call, int64_t row_bytes)
        : call_(call), row_bytes_(row_bytes), asked_(call.first),
          begin_lines_((uintptr_t)call.shards[0] % line == 0 && row_bytes % line == 0) {
        ask(call.first + ahead + together);
        for (int64_t i = call.first; i < call.first + ahead && i < call.last; i++) fetch(i);
    }

    // Row i, which is the one after the row of the last call.
    inline __attribute__((always_inline)) const uint8_t *at(int64_t i) {
        const uint8_t *row = rows_[i % places];
        if (asked_ < i + ahead + together) ask(asked_ + together);
        if (i + ahead < call_.last) fetch(i + ahead);
        return row;
    }

  private:
    static constexpr int ahead = 32;    // rows that are on their way
    static constexpr int together = 4;  // rows whose first lines are asked for together
    static constexpr uint64_t places = 64;

    void ask(int64_t until) {
        for (; asked_ < until && asked_ < call_.last; asked_++) {
            const uint8_t *row = row_at(call_, asked_, row_bytes_);
            rows_[asked_ % places] = row;
            to_second_level(row);
        }
        asked_ = until;
    }

    void fetch(int64_t i) {
        const uint8_t *row = rows_[i % places];
        for (int64_t at = line; at < row_bytes_; at += line) to_second_level(row + at);
        if (!begin_lines_) to_second_level(row + row_bytes_ - 1);
    }

    static void to_second_level(const uint8_t *at) { __builtin_prefetch(at, 0, 2); }

    const Call &call_;
    const int64_t row_bytes_;
    int64_t asked_;  // rows before it
    const bool begin_lines_;
    const uint8_t *rows_[places];
};

}  // namespace
}  // namespace engraphy::ENGRAPHY_LEVEL
