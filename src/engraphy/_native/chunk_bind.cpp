// The fusion layer for a chunk, from Python.
#include <algorithm>
#include <atomic>
#include <memory>
#include <stdexcept>

#include "bind.hpp"
#include "kernels.hpp"
#include "threads.hpp"

namespace nb = nanobind;

namespace engraphy {
namespace {

constexpr int64_t least_piece = 128;  // tokens; a piece computes W of its neighbour's again
constexpr int64_t most_pieces = 64;   // of a batch with fewer sequences

void require(bool condition, const char *message) {
    if (!condition) throw std::invalid_argument(message);
}

using Address = uintptr_t;

// The sizes and what forward and backward read. Pieces depend on the shape alone, so that sums over
// them do not depend on the threads.
Chunk chunk_of(int kind, int64_t batch, int64_t tokens, int64_t streams, int64_t hidden,
               int64_t taps, int64_t dilation, double eps, double conv_eps, bool residual,
               int64_t columns, bool masked, Address scale, Address conv_norm, Address conv,
               Address normed_conv, Address x, Address key, Address value, Address window,
               Address live, Address gate, Address stats) {
    require(kind >= 0 && kind <= int(ChunkKind::f64_f64), "unknown kind of values");
    require(batch >= 1 && tokens >= 1 && streams >= 1 && hidden >= 1 && dilation >= 1,
            "sizes must be positive");
    require(taps >= 0 && taps <= most_taps, "too many taps");
    Chunk c = {};
    c.kind = ChunkKind(kind);
    c.batch = batch;
    c.tokens = tokens;
    c.streams = streams;
    c.hidden = hidden;
    c.taps = taps;
    c.dilation = dilation;
    c.eps = eps;
    c.conv_eps = conv_eps;
    c.residual = residual;
    c.columns = columns;
    c.masked = masked;
    require(columns >= 0 && columns <= tokens + c.window_size(), "columns must be of the chunk");
    require(scale && x && key && value && gate && stats, "arrays must be present");
    require(!taps || (conv_norm && conv && normed_conv), "the conv's weights must be present");
    const int64_t shares = std::max<int64_t>(1, most_pieces / batch);
    c.piece = std::max(least_piece, (tokens + shares - 1) / shares);
    c.scale = (const void *)scale;
    c.conv_norm = (const void *)conv_norm;
    c.conv = (const void *)conv;
    c.normed_conv = (const void *)normed_conv;
    c.x = (const void *)x;
    c.key = (const void *)key;
    c.value = (const void *)value;
    c.window = (const void *)window;
    c.live = (const bool *)live;
    c.gate = (void *)gate;
    c.stats = (void *)stats;
    return c;
}

// For each token the first position that its conv may see.
std::unique_ptr<int32_t[]> first_seen(const Chunk &c, const bool *starts) {
    require(c.tokens <= INT32_MAX && c.window_size() <= INT32_MAX, "too many tokens");
    std::unique_ptr<int32_t[]> first(new int32_t[c.batch * c.tokens]);
    for (int64_t b = 0; b < c.batch; b++) {
        int32_t seen = c.window ? int32_t(-c.window_size()) : 0;
        for (int64_t t = 0; t < c.tokens; t++) {
            const int64_t at = b * c.tokens + t;
            if (starts && starts[at]) seen = int32_t(t);
            first[at] = seen;
        }
    }
    return first;
}

int64_t size_of(const Chunk &c) {
    return c.kind == ChunkKind::f64_f64 ? sizeof(double) : sizeof(float);
}

// work(chunk, i) for each piece i, by at most `most` threads with scratch of their own.
void run(const Chunk &chunk, int most, bool backward, ChunkFunction *work) {
    const int64_t size = chunk.scratch_values(backward) * size_of(chunk);
    const int workers = int(std::clamp<int64_t>(most, 1, chunk.pieces()));
    const std::unique_ptr<char[]> scratch(new char[workers * size]);
    std::atomic<int> begun{0};
    computing().shared(chunk.pieces(), workers, [&](ThreadPool::Parts &parts) {
        Chunk own = chunk;
        own.scratch = scratch.get() + begun.fetch_add(1) * size;
        for (int64_t i; (i = parts.next()) >= 0;) work(own, i);
    });
}

void forward(int kind, int64_t batch, int64_t tokens, int64_t streams, int64_t hidden, int64_t taps,
             int64_t dilation, double eps, double conv_eps, bool residual, int64_t columns,
             bool masked, Address scale, Address conv_norm, Address conv, Address normed_conv,
             Address x, Address key, Address value, Address window, Address live, Address starts,
             int threads, Address out, Address gate, Address inputs, Address stats) {
    Chunk c = chunk_of(kind, batch, tokens, streams, hidden, taps, dilation, eps, conv_eps,
                       residual, columns, masked, scale, conv_norm, conv, normed_conv, x, key,
                       value, window, live, gate, stats);
    require(out && (!columns || inputs), "outputs must be present");
    const auto first = first_seen(c, (const bool *)starts);
    c.first = first.get();
    c.out = (void *)out;
    c.inputs = (void *)inputs;
    run(c, threads, false, kernels().chunk_forward);
}

template <class F> void add_pieces(const Chunk &c, F *sums) {
    const int64_t size = c.sum_rows() * c.streams * c.hidden;
    const F *pieces = (const F *)c.sums;
    std::copy(pieces, pieces + size, sums);
    for (int64_t p = 1; p < c.pieces(); p++)
        for (int64_t i = 0; i < size; i++) sums[i] += pieces[p * size + i];
}

void backward(int kind, int64_t batch, int64_t tokens, int64_t streams, int64_t hidden,
              int64_t taps, int64_t dilation, double eps, double conv_eps, bool residual,
              int64_t columns, bool masked, Address scale, Address conv_norm, Address conv,
              Address normed_conv, Address x, Address key, Address value, Address window,
              Address live, Address starts, int threads, Address out_grad, Address gate_grad,
              Address inputs_grad, Address gate, Address stats, Address x_grad, Address key_grad,
              Address value_grad, Address window_grad, Address sums) {
    Chunk c = chunk_of(kind, batch, tokens, streams, hidden, taps, dilation, eps, conv_eps,
                       residual, columns, masked, scale, conv_norm, conv, normed_conv, x, key,
                       value, window, live, gate, stats);
    require(out_grad && key_grad && value_grad && sums, "gradients must be present");
    require(!window_grad || window, "a window must be present to have a gradient");
    const auto first = first_seen(c, (const bool *)starts);
    c.first = first.get();
    c.out_grad = (const void *)out_grad;
    c.gate_grad = (const void *)gate_grad;
    c.inputs_grad = (const void *)inputs_grad;
    c.x_grad = (void *)x_grad;
    c.key_grad = (void *)key_grad;
    c.value_grad = (void *)value_grad;
    c.window_grad = (void *)window_grad;
    const int64_t values = c.pieces() * c.sum_rows() * streams * hidden;
    const std::unique_ptr<char[]> pieces(new char[values * size_of(c)]);
    c.sums = pieces.get();
    run(c, threads, true, kernels().chunk_backward);
    if (c.kind == ChunkKind::f64_f64) add_pieces(c, (double *)sums);
    else add_pieces(c, (float *)sums);
}

}  // namespace

void bind_chunk(nb::module_ &m) {
    using nb::arg;
    const auto unlocked = nb::call_guard<nb::gil_scoped_release>();
    m.def("fuse_chunk", &forward, unlocked, arg("kind"), arg("batch"), arg("tokens"),
          arg("streams"), arg("hidden"), arg("taps"), arg("dilation"), arg("eps"), arg("conv_eps"),
          arg("residual"), arg("columns"), arg("masked"), arg("scale"), arg("conv_norm"),
          arg("conv"), arg("normed_conv"), arg("x"), arg("key"), arg("value"), arg("window"),
          arg("live"), arg("starts"), arg("threads"), arg("out"), arg("gate"), arg("inputs"),
          arg("stats"));
    m.def("fuse_chunk_backward", &backward, unlocked, arg("kind"), arg("batch"), arg("tokens"),
          arg("streams"), arg("hidden"), arg("taps"), arg("dilation"), arg("eps"), arg("conv_eps"),
          arg("residual"), arg("columns"), arg("masked"), arg("scale"), arg("conv_norm"),
          arg("conv"), arg("normed_conv"), arg("x"), arg("key"), arg("value"), arg("window"),
          arg("live"), arg("starts"), arg("threads"), arg("out_grad"), arg("gate_grad"),
          arg("inputs_grad"), arg("gate"), arg("stats"), arg("x_grad"), arg("key_grad"),
          arg("value_grad"), arg("window_grad"), arg("sums"));
}

}  // namespace engraphy
