// Updates of rows from the gradients of a step: what the kernels do. The plain versions in
// engraphy/memory/summed.py and engraphy/train are the specification, bit for bit.
#pragma once

#include <stdint.h>

namespace engraphy {

constexpr int update_lanes = 16;     // running sums of a sum of squares
constexpr int64_t update_chunk = 2048;  // rows that one thread takes; a sum of squares has as many

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
};

// Where rows of one kind lie.
struct Place {
    const uint8_t *const *shards;
    int64_t shard_rows, rows;
    bool bf16;     // else float32
    bool compact;  // row number u of the call is row u, else row ids[u]
};

enum class UpdateRule { adam, adagrad, nesterov };

// Takes rows [first, last). Writes the sums of those that have several gradients to `sums`:
// float32 [M, d], M being their number.
struct SurveyCall {
    Runs runs;
    bool squares;  // else `squares` of the answer is 0
};
struct Survey {
    uint32_t largest;  // of the sizes of all values, as bits
    double squares;    // their sum
};
using SurveyFunction = Survey(const SurveyCall &, int64_t first, int64_t last, float *sums);

// Updates rows [first, last) and their moments in place. sums: from `survey`, those from `first`
// on.
struct UpdateCall {
    UpdateRule rule;
    float factors[4];    // of the rule
    Runs runs;
    float scale;         // multiplies the sums
    const int64_t *ids;  // [U], distinct
    Place rows, moments;
    bool stochastic;     // how bf16 is rounded
    uint64_t key;        // of the random bits
};
using UpdateFunction = void(const UpdateCall &, int64_t first, int64_t last, const float *sums);

}  // namespace engraphy
