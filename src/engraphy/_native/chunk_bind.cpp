// The fusion layer for a chunk, from Python.
#include <algorithm>
#include <atomic>
#include <memory>

#include "bind.hpp"
#include "kernels.hpp"
#include "require.hpp"
#include "threads.hpp"

namespace nb = nanobind;

namespace engraphy {
namespace {

constexpr int64_t least_piece = 128;  // tokens; a piece computes W of its neighbour's again
constexpr int64_t most_pieces = 64;   // of a batch with fewer sequences

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

template <class F> void add_pieces(const Chunk &c, F *sums) {
    const int64_t size = c.sum_rows() * c.streams * c.hidden;
    const F *pieces = (const F *)c.sums;
    std::copy(pieces, pieces + size, sums);
    for (int64_t p = 1; p < c.pieces(); p++)
        for (int64_t i = 0; i < size; i++) sums[i] += pieces[p * size + i];
}

using Address = uintptr_t;

// Chunk as a Python object: what both passes read. It keeps addresses: the arrays stay the
// caller's.
class ChunkFusion {
  public:
    ChunkFusion(int kind, int64_t batch, int64_t tokens, int64_t streams, int64_t hidden,
                int64_t taps, int64_t dilation, double eps, double conv_eps, bool residual,
                int64_t columns, bool masked, Address scale, Address conv_norm, Address conv,
                Address normed_conv, Address x, Address key, Address value, Address window,
                Address live, Address starts, Address gate, Address stats, int threads)
        : threads_(threads) {
        require(kind >= 0 && kind <= int(ChunkKind::f64_f64), "unknown kind of values");
        require(batch >= 1 && tokens >= 1 && streams >= 1 && hidden >= 1 && dilation >= 1,
                "sizes must be positive");
        require(taps >= 0 && taps <= most_taps, "too many taps");
        chunk_.kind = ChunkKind(kind);
        chunk_.batch = batch;
        chunk_.tokens = tokens;
        chunk_.streams = streams;
        chunk_.hidden = hidden;
        chunk_.taps = taps;
        chunk_.dilation = dilation;
        chunk_.eps = eps;
        chunk_.conv_eps = conv_eps;
        chunk_.residual = residual;
        chunk_.columns = columns;
        chunk_.masked = masked;
        require(columns >= 0 && columns <= tokens + chunk_.window_size(),
                "columns must be of the chunk");
        require(scale && x && key && value && gate && stats, "arrays must be present");
        require(!taps || (conv_norm && conv && normed_conv), "the conv's weights must be present");
        // The shape alone decides, so that sums over the pieces do not depend on the threads.
        const int64_t shares = std::max<int64_t>(1, most_pieces / batch);
        chunk_.piece = std::max(least_piece, (tokens + shares - 1) / shares);
        chunk_.scale = (const void *)scale;
        chunk_.conv_norm = (const void *)conv_norm;
        chunk_.conv = (const void *)conv;
        chunk_.normed_conv = (const void *)normed_conv;
        chunk_.x = (const void *)x;
        chunk_.key = (const void *)key;
        chunk_.value = (const void *)value;
        chunk_.window = (const void *)window;
        chunk_.live = (const bool *)live;
        chunk_.gate = (void *)gate;
        chunk_.stats = (void *)stats;
        first_ = first_seen(chunk_, (const bool *)starts);
        chunk_.first = first_.get();
    }
    ChunkFusion(const ChunkFusion &) = delete;

    void forward(Address out, Address inputs) const {
        require(out && (!chunk_.columns || inputs), "outputs must be present");
        Chunk c = chunk_;
        c.out = (void *)out;
        c.inputs = (void *)inputs;
        run(c, threads_, false, kernels().chunk_forward);
    }

    void backward(Address out_grad, Address gate_grad, Address inputs_grad, Address x_grad,
                  Address key_grad, Address value_grad, Address window_grad, Address sums) const {
        require(out_grad && key_grad && value_grad && sums, "gradients must be present");
        require(!window_grad || chunk_.window, "a window must be present to have a gradient");
        Chunk c = chunk_;
        c.out_grad = (const void *)out_grad;
        c.gate_grad = (const void *)gate_grad;
        c.inputs_grad = (const void *)inputs_grad;
        c.x_grad = (void *)x_grad;
        c.key_grad = (void *)key_grad;
        c.value_grad = (void *)value_grad;
        c.window_grad = (void *)window_grad;
        const int64_t values = c.pieces() * c.sum_rows() * c.streams * c.hidden;
        const std::unique_ptr<char[]> pieces(new char[values * size_of(c)]);
        c.sums = pieces.get();
        run(c, threads_, true, kernels().chunk_backward);
        if (c.kind == ChunkKind::f64_f64) add_pieces(c, (double *)sums);
        else add_pieces(c, (float *)sums);
    }

  private:
    Chunk chunk_ = {};
    std::unique_ptr<int32_t[]> first_;
    int threads_;
};

}  // namespace

void bind_chunk(nb::module_ &m) {
    using nb::arg;
    const auto unlocked = nb::call_guard<nb::gil_scoped_release>();
    nb::class_<ChunkFusion>(m, "ChunkFusion")
        .def(nb::init<int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, double, double,
                      bool, int64_t, bool, Address, Address, Address, Address, Address, Address,
                      Address, Address, Address, Address, Address, Address, int>(),
             nb::kw_only(), arg("kind"), arg("batch"), arg("tokens"), arg("streams"),
             arg("hidden"), arg("taps"), arg("dilation"), arg("eps"), arg("conv_eps"),
             arg("residual"), arg("columns"), arg("masked"), arg("scale"), arg("conv_norm"),
             arg("conv"), arg("normed_conv"), arg("x"), arg("key"), arg("value"), arg("window"),
             arg("live"), arg("starts"), arg("gate"), arg("stats"), arg("threads"))
        .def("forward", &ChunkFusion::forward, unlocked, nb::kw_only(), arg("out"), arg("inputs"))
        .def("backward", &ChunkFusion::backward, unlocked, nb::kw_only(), arg("out_grad"),
             arg("gate_grad"), arg("inputs_grad"), arg("x_grad"), arg("key_grad"),
             arg("value_grad"), arg("window_grad"), arg("sums"));
}

}  // namespace engraphy
