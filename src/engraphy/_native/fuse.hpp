// The fusion layer for one token of each of a few sequences: what the kernel reads. The plain version in
// engraphy/fusion/layer.py is its specification, up to the order of sums.
#pragma once

#include <stdint.h>

namespace engraphy {

// What the model's values and weights are, and in brackets what is computed with.
enum class FuseKind { f32, f64, bf16 /* f32 */ };

// Arrays are C-contiguous, null where the layer has none. B, S, D, E, K = batch, streams, hidden, width, taps.
struct FuseCall {
    FuseKind kind;
    int64_t streams, hidden, width, taps;
    int64_t dilation;                // positions between two taps
    double eps, conv_eps;
    bool unit_offset;                // norms scale by 1 + weight
    const void *key, *key_bias;      // [S*D, E], [S*D]
    const void *value, *value_bias;  // [D, E], [D]
    const void *query_norm, *key_norm, *conv_norm;  // [S, D]
    const void *conv;                // [S, D, K], the last tap is the present
    int64_t batch;
    const void *x, *rows;            // [B, S, D], [B, E]
    const bool *live;                // [B]; null = all
    void *out;                       // [B, S, D] x with what the layer adds
    // Of the type that is computed with:
    const void *window;              // the conv's inputs before: (K - 1) * dilation columns [S, D] of each sequence
    void *inputs;                    // the column of its inputs now, [S, D] of each sequence
    int64_t stride;                  // values from one sequence's columns to the next one's
    void *gate;                      // [B, S]; null = nobody asks
    void *keys, *values, *widened;   // [B, S*D], [B, D], [B, E], for the kernel's own use
};

using FuseFunction = void(const FuseCall &);

}  // namespace engraphy
