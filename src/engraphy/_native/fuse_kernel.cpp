// The fusion layer for one token, compiled once per instruction set (kernels.hpp says what that
// forbids).
//
// When a token is decoded, the model's own weights have driven these out of the caches. So each
// weight is read once for all sequences.
#include <stdint.h>
#include <string.h>

#include "bf16.hpp"
#include "fuse.hpp"
#include "kernels.hpp"

namespace engraphy::ENGRAPHY_LEVEL {
namespace {

// S is the type of the model's values and weights. F is the type that is computed with: S itself,
// or float for bfloat16.
struct Bf16 { uint16_t bits; };
template <class S> struct Computed { typedef S Type; };
template <> struct Computed<Bf16> { typedef float Type; };
template <class S> using Wide = typename Computed<S>::Type;

inline float wide(float x) { return x; }
inline double wide(double x) { return x; }
inline float wide(Bf16 x) { return as_float((uint32_t)x.bits << 16); }

template <class S> inline S stored(Wide<S> x) { return x; }
template <> inline Bf16 stored<Bf16>(float x) { return {bf16_of(bits_of(x))}; }

// As the plain version does: it stores the outputs of a projection and of the layer as S.
template <class S> inline Wide<S> rounded(Wide<S> x) { return wide(stored<S>(x)); }

template <class F> constexpr int lanes = ENGRAPHY_LANES * 8 / sizeof(F);
constexpr int sums = 4;  // running sums of a dot product, since an addition takes 4 cycles
constexpr double gate_floor = 1e-6;

template <class F> struct Vector {
    typedef F Type __attribute__((vector_size(ENGRAPHY_LANES * 8)));
};

template <class F> inline void load(const F *from, typename Vector<F>::Type &to) {
    memcpy(&to, from, sizeof(to));
}

inline void load(const Bf16 *from, Vector<float>::Type &to) {
    typedef uint16_t Halves __attribute__((vector_size(ENGRAPHY_LANES * 4)));
    typedef uint32_t Bits __attribute__((vector_size(ENGRAPHY_LANES * 8)));
    Halves halves;
    memcpy(&halves, from, sizeof(halves));
    const Bits bits = __builtin_convertvector(halves, Bits) << 16;
    memcpy(&to, &bits, sizeof(to));
}

// Not those of <cmath>, for the reason in kernels.hpp.
inline float root_of(float x) { return __builtin_sqrtf(x); }
inline double root_of(double x) { return __builtin_sqrt(x); }
inline float exp_of(float x) { return __builtin_expf(x); }
inline double exp_of(double x) { return __builtin_exp(x); }

template <class S, class T> inline Wide<S> dot(const S *a, const T *b, int64_t size) {
    typedef Wide<S> F;
    typedef typename Vector<F>::Type V;
    V sum[sums] = {}, u, v;
    int64_t at = 0;
    for (; at + sums * lanes<F> <= size; at += sums * lanes<F>)
        for (int i = 0; i < sums; i++) {
            load(a + at + i * lanes<F>, u);
            load(b + at + i * lanes<F>, v);
            sum[i] += u * v;
        }
    const V all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    F total = 0;
    for (int i = 0; i < lanes<F>; i++) total += all[i];
    for (; at < size; at++) total += wide(a[at]) * wide(b[at]);
    return total;
}

// out [B, count] = rows W^T + bias
template <class S>
void project(const FuseCall &call, const Wide<S> *rows, const void *weight, const void *bias,
             int64_t count, void *out) {
    const int64_t width = call.plan.width;
    const S *w = (const S *)weight;
    for (int64_t i = 0; i < count; i++, w += width) {
        const Wide<S> added = bias ? wide(((const S *)bias)[i]) : 0;
        for (int64_t b = 0; b < call.batch; b++)
            ((Wide<S> *)out)[b * count + i] =
                rounded<S>(dot(w, rows + b * width, width) + added);
    }
}

template <class S> inline Wide<S> scale(const FusePlan &plan, const S *norm, int64_t i) {
    return plan.unit_offset ? wide(norm[i]) + 1 : wide(norm[i]);
}

template <class S> inline Wide<S> rstd(const S *x, int64_t size, double eps) {
    return 1 / root_of(dot(x, x, size) / size + (Wide<S>)eps);
}

template <class S>
Wide<S> gate_of(const FusePlan &plan, const S *x, const Wide<S> *key, const S *query_norm,
                const S *key_norm) {
    typedef Wide<S> F;
    const int64_t hidden = plan.hidden;
    F product = 0;
    for (int64_t i = 0; i < hidden; i++)
        product += wide(x[i]) * (scale(plan, query_norm, i) * scale(plan, key_norm, i)) * key[i];
    const F scaled = product * rstd(x, hidden, plan.eps) * rstd(key, hidden, plan.eps);
    const F u = scaled / root_of((F)hidden);
    const F size = u < 0 ? -u : u;
    const F root = root_of(size < (F)gate_floor ? (F)gate_floor : size);  // a NaN stays one
    return 1 / (1 + exp_of(u > 0 ? -root : u < 0 ? root : root * 0));
}

// update += SiLU(conv(inputs)) for one stream. window: its oldest column.
template <class S>
void convolve(const FusePlan &plan, const Wide<S> *window, const Wide<S> *inputs, const S *conv,
              Wide<S> *update) {
    const int64_t taps = plan.taps, step = plan.dilation * plan.streams * plan.hidden;
    for (int64_t i = 0; i < plan.hidden; i++) {
        Wide<S> mixed = inputs[i] * wide(conv[i * taps + taps - 1]);
        for (int64_t tap = 0; tap < taps - 1; tap++)
            mixed += window[tap * step + i] * wide(conv[i * taps + tap]);
        update[i] += mixed / (1 + exp_of(-mixed));
    }
}

// Stream s of sequence b.
template <class S> void fuse_one(const FuseCall &call, int64_t b, int64_t s) {
    typedef Wide<S> F;
    const FusePlan &plan = call.plan;
    const int64_t hidden = plan.hidden;
    const int64_t norm = s * hidden;                       // of the stream, in [S, D]
    const int64_t at = (b * plan.streams + s) * hidden;    // of sequence and stream, in [B, S, D]
    const S *query_norm = (const S *)plan.query_norm + norm;
    const S *key_norm = (const S *)plan.key_norm + norm;
    const F *value = (const F *)call.values + b * hidden;
    F *update = (F *)call.keys + at;  // takes the place of the keys once they have made the gate
    const S *x = (const S *)call.x + at;
    S *out = (S *)call.out + at;
    const bool live = !call.live || call.live[b];
    F gate = gate_of(plan, x, update, query_norm, key_norm);
    if (!live) gate = 0;
    if (call.gate) ((F *)call.gate)[b * plan.streams + s] = gate;
    for (int64_t i = 0; i < hidden; i++) update[i] = gate * value[i];
    if (plan.taps) {
        const S *conv_norm = (const S *)plan.conv_norm + norm;
        const F *window = (const F *)call.window + b * call.stride + norm;
        F *inputs = (F *)call.inputs + b * call.stride + norm;
        const F factor = rstd(update, hidden, plan.conv_eps);
        for (int64_t i = 0; i < hidden; i++)
            inputs[i] = update[i] * factor * scale(plan, conv_norm, i);
        convolve(plan, window, inputs, (const S *)plan.conv + norm * plan.taps, update);
    }
    for (int64_t i = 0; i < hidden; i++)
        out[i] = live ? stored<S>(wide(x[i]) + rounded<S>(update[i])) : x[i];
}

template <class S> void fuse_all(const FuseCall &call) {
    typedef Wide<S> F;
    const FusePlan &plan = call.plan;
    const F *rows = (const F *)call.rows;
    if constexpr (sizeof(S) != sizeof(F)) {
        F *widened = (F *)call.widened;
        for (int64_t i = 0; i < call.batch * plan.width; i++)
            widened[i] = wide(((const S *)call.rows)[i]);
        rows = widened;
    }
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
