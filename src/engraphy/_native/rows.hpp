// Rows of mapped memory as numbers: what the kernel reads. The plain versions in engraphy/rows are
// its specification, bit for bit.
#pragma once

#include <stdint.h>

namespace engraphy {

enum class RowKind {
    f32,
    f16,
    bf16,
    fp8,
    fp8_scaled,
    int8,
    int4,
    q8_0,
    q4_0,
    iq4_nl,
    mxfp4,
    q2_k,
    q3_k,
    q4_k,
    q5_k
};

constexpr int fp8_block = 32;  // values under one ue8m0 scale

struct RowsCall {
    RowKind kind;
    int64_t d;      // values of a row; a multiple of what kind.hpp has for the kind
    float scale;    // of the whole table, for fp8_scaled alone
    bool to_bf16;   // else to float32
    const uint8_t *const
        *shards;  // addresses of their first rows; rows follow each other without a gap
    int64_t shard_rows;            // rows of every shard but the last
    int64_t rows;                  // of all shards
    const int64_t *ids;            // [N]; null = 0, 1, 2, ...
    uint8_t *out;  // float32 or bf16 bits [N, d]; like records and ids it may begin at any byte
    int64_t first, last;           // which of the N to write: several threads share a call
    bool stream = false;           // past the caches
};

// The position of the first of `count` ids outside [0, rows), -1 if there is none.
using FirstBadFunction = int64_t(const int64_t *ids, int64_t count, int64_t rows);

// Writes `out`. Ids have been checked.
using RowsFunction = void(const RowsCall &);

// Rows as they are. Fields as above.
struct GatherCall {
    const uint8_t *const *shards;
    int64_t shard_rows, rows, row_bytes;
    const int64_t *ids;
    uint8_t *out;  // [N, row_bytes]
    int64_t first, last;
    bool stream;   // past the caches
};

using GatherFunction = void(const GatherCall &);

}  // namespace engraphy
