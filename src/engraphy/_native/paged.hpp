// The fusion layer for tokens whose conv inputs lie in a paged cache: what the kernel reads and
// writes.
//
// engraphy/fusion/paged.py is the specification, up to the order of sums. N tokens, S streams, D
// hidden, K taps of the conv.
#pragma once

#include <stdint.h>

#include "chunk.hpp"

namespace engraphy {

// What does not change between two calls for a layer. Arrays are C-contiguous; null without a conv.
struct PagedPlan {
    bool bf16;  // hidden states and projections are bfloat16, else float32
    int64_t streams, hidden, taps;
    double eps, conv_eps;
    const float *scale;      // [S, D]: the factors of query norm times those of key norm
    const float *conv_norm;  // [S, D]: factors
    const float *conv;       // [K, S, D]
};

struct PagedCall {
    const PagedPlan &plan;
    int64_t tokens;
    const void *x;            // [N, S, D]
    const void *key, *value;  // [N, S, D], [N, D], `stride` values from a token to the next
    int64_t stride;
    const bool *live;         // [N]; null = all
    const int64_t *offsets;   // [N, K]: where a tap's line begins in the cache; -1 = zeros
    float *cache;
    float *gate;  // [N, S], from the first pass to the second
    void *out;    // [N, S, D]: x + update
};

// For the tokens from `first` to before `last`. All conv inputs have to be written before any is
// read, so there are two passes.
using PagedFunction = void(const PagedCall &, int64_t first, int64_t last);

}  // namespace engraphy
