// From the projections of a chunk's rows to what a fusion layer adds, and back to gradients: what
// the kernel reads and writes.
//
// engraphy/fusion/plain.py is the specification, up to the order of sums. B sequences of T tokens,
// S streams, D hidden, K taps of the conv, W = (K - 1) * dilation positions before the chunk.
#pragma once

#include <stdint.h>

namespace engraphy {

// The types of the hidden states and of the projections. F below, the type that is computed with,
// is f64 for the last one, else f32.
enum class ChunkKind { f32_f32, f32_bf16, bf16_bf16, bf16_f32, f64_f64 };

constexpr int most_taps = 16;
constexpr int stats_of_a_stream = 4;  // u, and the factors of the query's, key's and conv's norms

// What forward and backward share. Arrays are C-contiguous; null if absent.
struct Chunk {
    ChunkKind kind;
    int64_t batch, tokens, streams, hidden, taps, dilation;
    double eps, conv_eps;
    bool residual;    // out is x + update, else update
    int64_t columns;  // conv inputs that are returned: the last of the window and the chunk
    bool masked;      // those before the last start are zero
    int64_t piece;    // tokens of a piece, the unit of work
    const void *scale;        // F [S, D]: the factors of query norm times those of key norm
    const void *conv_norm;    // F [S, D]: factors
    const void *conv;         // F [K, S, D]
    const void *normed_conv;  // F [K, S, D]: conv times conv_norm
    const void *x, *key, *value;  // [B, T, S, D], [B, T, S, D], [B, T, D]
    const void *window;           // F [B, W, S, D]
    const bool *live;             // [B, T]
    const int32_t *first;         // [B, T]: the first position that the conv of a token may see
    void *gate;                   // F [B, T, S]; written by forward, read by backward
    void *stats;                  // F [B, T, S, 4]; likewise
    // Forward:
    void *out;     // [B, T, S, D]
    void *inputs;  // F [B, columns, S, D]
    // Backward. Gradients of the outputs:
    const void *out_grad, *gate_grad, *inputs_grad;
    // Gradients of the inputs; those of x and window may be null:
    void *x_grad, *key_grad, *value_grad, *window_grad;
    // F [pieces, rows, S, D], sums over the tokens of a piece: the gradient of scale; for each tap
    // that of normed_conv; with a window for each tap that of conv, from the window; with
    // inputs_grad that of conv_norm, from it.
    void *sums;
    // F: scratch of a thread, `scratch_values` of them.
    void *scratch;

    int64_t window_size() const { return taps ? (taps - 1) * dilation : 0; }
    int64_t pieces_of_a_sequence() const { return (tokens + piece - 1) / piece; }
    int64_t pieces() const { return batch * pieces_of_a_sequence(); }
    int64_t sum_rows() const { return 1 + taps * (window ? 2 : 1) + (inputs_grad ? 1 : 0); }
    int64_t scratch_values(bool backward) const {
        if (!backward) return (window_size() + piece) * streams;
        return ((window_size() + 1) * streams + 2) * hidden;
    }
};

// Piece number `index` of a chunk.
using ChunkFunction = void(const Chunk &, int64_t index);

}  // namespace engraphy
