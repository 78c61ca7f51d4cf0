// The fusion layer for one token of each of a few sequences: what the kernel reads.
//
// The plain version in engraphy/fusion/layer.py is its specification, up to the order of sums.
#pragma once

#include <stdint.h>

namespace engraphy {

// The type of the model's values and weights; in brackets the type that is computed with.
enum class FuseKind { f32, f64, bf16 /* f32 */ };

// What does not change between the tokens of a layer. Weights are C-contiguous, null if the layer
// has none. S, D, E, K = streams, hidden, width, taps.
struct FusePlan {
    FuseKind kind;
    int64_t streams, hidden, width;
    int64_t taps;      // of the conv; 0 = no conv
    int64_t dilation;  // positions between two taps
    double eps, conv_eps;
    bool unit_offset;  // norms scale by 1 + weight
    const void *key, *key_bias;                     // [S*D, E], [S*D]
    const void *value, *value_bias;                 // [D, E], [D]
    const void *query_norm, *key_norm, *conv_norm;  // [S, D]
    const void *conv;                               // [S, D, K]; the last tap is the present
};

// One token of each of `batch` (B) sequences. Arrays are C-contiguous.
struct FuseCall {
    const FusePlan &plan;
    int64_t batch;
    const void *x;         // [B, S, D]
    const float *rows;     // [B, E], whatever the kind
    const bool *live;      // [B]; null = all
    void *out;             // [B, S, D]: x with what the layer adds
    // Of the type that is computed with:
    const void *window;  // earlier conv inputs: (K - 1) * dilation columns [S, D] of each sequence
    void *inputs;        // column [S, D] of each sequence, for the present conv inputs
    int64_t stride;      // values from one sequence's columns to the next one's
    void *gate;          // [B, S]; null = not wanted
    void *keys, *values, *widened, *mixed;  // [B, S*D], [B, D], [B, E], [D]: scratch of the kernel
};

using FuseFunction = void(const FuseCall &);

}  // namespace engraphy
