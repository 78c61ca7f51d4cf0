// Updates of rows from the gradients of a step: what the kernels do. The plain versions in
// engraphy/memory/summed.py and engraphy/train are the specification, bit for bit.
#pragma once

#include <stdint.h>

namespace engraphy {

constexpr int update_lanes = 16;  // running sums of a sum of squares

// Gradients of one layer in the order of their rows: those of row number u are
// order[starts[u]], order[starts[u] + 1], ..., and are added in this order.
struct Runs {
    const uintptr_t *grads;  // [E], addresses of float32 [n, d]
    const int64_t *firsts;   // [E], the position of the first gradient of each
    int64_t entries;
    const int64_t *order;    // [N], positions; null = 0, 1, 2, ...
    const int64_t *starts;   // [U + 1]; null = one gradient each
    int64_t count;           // U
    int64_t d;
    float scale;             // of the sums
};

// Where rows of one kind lie.
struct Place {
    const uint8_t *const *shards;
    int64_t shard_rows, rows;
    bool bf16;     // else float32
    bool compact;  // row number u of the call is row u, else row ids[u]
};

enum class UpdateRule { adam, adagrad, nesterov };

struct UpdateCall {
    UpdateRule rule;
    float factors[4];    // of the rule
    Runs runs;
    const int64_t *ids;  // [U], distinct
    Place rows, moments;
    bool stochastic;     // how bf16 is rounded
    uint64_t key;        // of the random bits
};

// All take rows [first, last) of the U, so that threads may share a call.

// Writes sums times scale to out: float32 [U, d].
using SumRunsFunction = void(const Runs &, int64_t first, int64_t last, float *out);

// The sum of the squares of the sums, of one chunk.
using SquareRunsFunction = double(const Runs &, int64_t first, int64_t last);

// Whether the sizes of all values are at most `limit`; false if one is NaN.
using WithinFunction = bool(const float *values, int64_t count, float limit);

// Updates rows and moments in place.
using UpdateFunction = void(const UpdateCall &, int64_t first, int64_t last);

}  // namespace engraphy
