// The fusion layer for one token, compiled once per instruction set (kernels.hpp says what that
// forbids).
//
// When a token is decoded, the model's own weights have driven these out of the caches. So each
// weight is read once for all sequences, and fetched ahead of its use.
#include <stdint.h>
#include <string.h>

#include "fuse.hpp"
#include "gate.hpp"
#include "kernels.hpp"

namespace engraphy::ENGRAPHY_LEVEL {
namespace {

// S is the type of the model's values and weights. F is the type that is computed with: S itself,
// or float for bfloat16. As the plain version does, outputs of a projection and of the layer are
// rounded to S.

// Values of a row that one step of `dots` takes, and weights' rows that go side by side: the
// running sums of a step are enough to hide that an addition takes 4 cycles.
template <class S> constexpr int step = 2 * lanes<Wide<S>>;
template <class S> constexpr int rows_at_once = sizeof(S) == sizeof(Wide<S>) ? 4 : 2;

// Bytes from a weight that is read to one that is fetched meanwhile. Nothing is gained beyond, and
// with less the machine waits where a page ends: its own fetching stops there.
constexpr int64_t ahead = 4096;

template <class S> inline void fetch_step(const S *from) {
    for (int64_t at = 0; at < step<S> * (int64_t)sizeof(S); at += 64)
        __builtin_prefetch((const char *)from + ahead + at);
}

// Two vectors of weights, in the order of `in_steps`.
template <class S>
inline void load_step(const S *from, Vector<S> &one, Vector<S> &two) {
    one = load(from, Whole());
    two = load(from + lanes<S>, Whole());
}
// The even ones and the odd ones: two operations, where widening each half in order takes four.
inline void load_step(const Bf16 *from, Vector<float> &one, Vector<float> &two) {
    Bits pairs;
    memcpy(&pairs, from, sizeof(pairs));
    one = (Vector<float>)(pairs << 16);
    two = (Vector<float>)(pairs & 0xffff0000u);
}

// The dot products of `count` rows of weights, width values apart, with one row in steps.
template <class S, int count>
inline void dots(const S *weights, const Wide<S> *row, int64_t width, Wide<S> *out) {
    typedef Wide<S> F;
    Vector<F> sum[count][2] = {}, one, two;
    int64_t at = 0;
    for (; at + step<S> <= width; at += step<S>) {
        const Vector<F> row_one = load(row + at, Whole());
        const Vector<F> row_two = load(row + at + lanes<F>, Whole());
        for (int i = 0; i < count; i++) {
            fetch_step(weights + i * width + at);
            load_step(weights + i * width + at, one, two);
            sum[i][0] += one * row_one;
            sum[i][1] += two * row_two;
        }
    }
    for (int i = 0; i < count; i++) {
        out[i] = total(sum[i][0] + sum[i][1]);
        for (int64_t j = at; j < width; j++) out[i] += wide(weights[i * width + j]) * row[j];
    }
}

template <class S, int count>
void project_some(const FuseCall &call, const Wide<S> *rows, const S *weights, const S *bias,
                  int64_t outputs, Wide<S> *out) {
    const int64_t width = call.plan.width;
    for (int64_t b = 0; b < call.batch; b++, out += outputs) {
        Wide<S> sums[count];
        dots<S, count>(weights, rows + b * width, width, sums);
        for (int i = 0; i < count; i++)
            out[i] = rounded(sums[i] + (bias ? wide(bias[i]) : 0), weights);
    }
}

// out [B, outputs] = rows W^T + bias; rows in steps.
template <class S>
void project(const FuseCall &call, const Wide<S> *rows, const void *weight, const void *bias,
             int64_t outputs, void *out) {
    const S *w = (const S *)weight, *added = (const S *)bias;
    constexpr int some = rows_at_once<S>;
    const int64_t width = call.plan.width;
    int64_t i = 0;
    for (; i + some <= outputs; i += some)
        project_some<S, some>(call, rows, w + i * width, added ? added + i : nullptr, outputs,
                              (Wide<S> *)out + i);
    for (; i < outputs; i++)
        project_some<S, 1>(call, rows, w + i * width, added ? added + i : nullptr, outputs,
                           (Wide<S> *)out + i);
}

// A row of float32, rounded to S as the plain version rounds it, in the order in which `load_step`
// gives weights.
template <class S> void in_steps(const float *row, int64_t width, Wide<S> *out) {
    typedef Wide<S> F;
    constexpr bool in_pairs = sizeof(S) != sizeof(F);
    const S *as_stored = nullptr;
    int64_t at = 0;
    for (; in_pairs && at + step<S> <= width; at += step<S>)
        for (int i = 0; i < lanes<F>; i++) {
            out[at + i] = rounded((F)row[at + 2 * i], as_stored);
            out[at + lanes<F> + i] = rounded((F)row[at + 2 * i + 1], as_stored);
        }
    for (; at < width; at++) out[at] = rounded((F)row[at], as_stored);
}

void fetch(const void *from, int64_t bytes) {
    for (int64_t at = 0; from && at < bytes; at += 64) __builtin_prefetch((const char *)from + at);
}

// What is needed when the projections are done: short arrays that nobody else fetches in time.
template <class S> void fetch_the_rest(const FuseCall &call) {
    typedef Wide<S> F;
    const FusePlan &plan = call.plan;
    const int64_t values = plan.streams * plan.hidden;
    fetch(plan.query_norm, values * sizeof(S));
    fetch(plan.key_norm, values * sizeof(S));
    if (!plan.taps) return;
    fetch(plan.conv_norm, values * sizeof(S));
    fetch(plan.conv, values * plan.taps * sizeof(S));
    for (int64_t b = 0; b < call.batch; b++)
        for (int64_t tap = 0; tap < plan.taps - 1; tap++)
            fetch((const F *)call.window + b * call.stride + tap * plan.dilation * values,
                  values * sizeof(F));
}

template <class S>
Wide<S> stream_gate(const FusePlan &plan, const S *x, const Wide<S> *key, const S *query_norm,
                    const S *key_norm) {
    typedef Wide<S> F;
    const F added = plan.unit_offset;
    Vector<F> dot = {}, x_squares = {}, key_squares = {};
    along<F>(plan.hidden, [&](int64_t i, auto part) {
        const Vector<F> h = load(x + i, part), k = load(key + i, part);
        const Vector<F> query_scale = load(query_norm + i, part) + added;
        dot += h * (query_scale * (load(key_norm + i, part) + added)) * k;
        x_squares += h * h;
        key_squares += k * k;
    });
    const F query = rstd(total(x_squares), plan.hidden, plan.eps);
    return gate_of(total(dot) * query * rstd(total(key_squares), plan.hidden, plan.eps) /
                   root_of((F)plan.hidden));
}

// mixed = conv(inputs) for one stream. window: its oldest column.
template <class S>
void convolve(const FusePlan &plan, const Wide<S> *window, const Wide<S> *inputs, const S *conv,
              Wide<S> *mixed) {
    const int64_t hidden = plan.hidden, taps = plan.taps;
    const int64_t column = plan.dilation * plan.streams * hidden;
    for (int64_t i = 0; i < hidden; i++) mixed[i] = inputs[i] * wide(conv[i * taps + taps - 1]);
    for (int64_t tap = 0; tap < taps - 1; tap++)
        for (int64_t i = 0; i < hidden; i++)
            mixed[i] += window[tap * column + i] * wide(conv[i * taps + tap]);
}

// Stream s of sequence b.
template <class S> void fuse_one(const FuseCall &call, int64_t b, int64_t s) {
    typedef Wide<S> F;
    const FusePlan &plan = call.plan;
    const int64_t hidden = plan.hidden;
    const int64_t norm = s * hidden;                     // of the stream, in [S, D]
    const int64_t at = (b * plan.streams + s) * hidden;  // of sequence and stream, in [B, S, D]
    const F *value = (const F *)call.values + b * hidden, *key = (const F *)call.keys + at;
    const S *x = (const S *)call.x + at;
    S *out = (S *)call.out + at;
    F *mixed = (F *)call.mixed;
    const bool live = !call.live || call.live[b];
    F gate = stream_gate(plan, x, key, (const S *)plan.query_norm + norm,
                         (const S *)plan.key_norm + norm);
    if (!live) gate = 0;
    if (call.gate) ((F *)call.gate)[b * plan.streams + s] = gate;
    if (plan.taps) {
        const S *conv_norm = (const S *)plan.conv_norm + norm;
        const F *window = (const F *)call.window + b * call.stride + norm;
        F *inputs = (F *)call.inputs + b * call.stride + norm;
        const F added = plan.unit_offset;
        const F squares = gate * gate * squares_of(value, hidden);
        const F factor = gate * rstd(squares, hidden, plan.conv_eps);
        along<F>(hidden, [&](int64_t i, auto part) {
            const Vector<F> scale = load(conv_norm + i, part) + added;
            store(inputs + i, load(value + i, part) * factor * scale, part);
        });
        convolve(plan, window, inputs, (const S *)plan.conv + norm * plan.taps, mixed);
    }
    if (!live) {
        memcpy(out, x, hidden * sizeof(S));
        return;
    }
    along<F>(hidden, [&](int64_t i, auto part) {
        Vector<F> update = load(value + i, part) * gate;
        if (plan.taps) {
            const Vector<F> sum = load((const F *)mixed + i, part);
            update += sum / (exp_of(-sum) + 1);
        }
        store(out + i, load(x + i, part) + rounded(update, x), part);
    });
}

template <class S> void fuse_all(const FuseCall &call) {
    typedef Wide<S> F;
    const FusePlan &plan = call.plan;
    F *const rows = (F *)call.widened;
    fetch_the_rest<S>(call);
    for (int64_t b = 0; b < call.batch; b++)
        in_steps<S>((const float *)call.rows + b * plan.width, plan.width, rows + b * plan.width);
    project<S>(call, rows, plan.key, plan.key_bias, plan.streams * plan.hidden, call.keys);
    project<S>(call, rows, plan.value, plan.value_bias, plan.hidden, call.values);
    for (int64_t b = 0; b < call.batch; b++)
        for (int64_t s = 0; s < plan.streams; s++) fuse_one<S>(call, b, s);
}

}  // namespace

void fuse(const FuseCall &call) {
    switch (call.plan.kind) {
        case FuseKind::f32: return fuse_all<float>(call);
        case FuseKind::f64: return fuse_all<double>(call);
        case FuseKind::bf16: return fuse_all<Bf16>(call);
    }
}

}  // namespace engraphy::ENGRAPHY_LEVEL
