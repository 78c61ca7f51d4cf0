// The fusion layer for one token, compiled once per instruction set (kernels.hpp says what that
// forbids).
//
// When a token is decoded, the model's own weights have driven these out of the caches. So each
// weight is read once for all sequences, and fetched ahead of its use.
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

// The even and the odd ones of twice as many values as a vector of floats has. Two operations, where
// widening each half of them in order takes four.
inline void load_pairs(const Bf16 *from, Vector<float>::Type &even, Vector<float>::Type &odd) {
    typedef uint32_t Bits __attribute__((vector_size(ENGRAPHY_LANES * 8)));
    Bits pairs;
    memcpy(&pairs, from, sizeof(pairs));
    const Bits low = pairs << 16, high = pairs & 0xffff0000u;
    memcpy(&even, &low, sizeof(even));
    memcpy(&odd, &high, sizeof(odd));
}

// The sum of a vector, half by half: the compiler would add its lanes one after the other.
template <class F, int bytes> struct Sized { typedef F Type __attribute__((vector_size(bytes))); };
inline double total(Sized<double, 16>::Type v) { return v[0] + v[1]; }
inline float total(Sized<float, 16>::Type v) {
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1);
    return v[0] + v[1];
}
#if ENGRAPHY_LANES >= 4
inline double total(Sized<double, 32>::Type v) {
    return total(__builtin_shufflevector(v, v, 0, 1) + __builtin_shufflevector(v, v, 2, 3));
}
inline float total(Sized<float, 32>::Type v) {
    return total(__builtin_shufflevector(v, v, 0, 1, 2, 3) +
                 __builtin_shufflevector(v, v, 4, 5, 6, 7));
}
#endif
#if ENGRAPHY_LANES >= 8
inline double total(Sized<double, 64>::Type v) {
    return total(__builtin_shufflevector(v, v, 0, 1, 2, 3) +
                 __builtin_shufflevector(v, v, 4, 5, 6, 7));
}
inline float total(Sized<float, 64>::Type v) {
    return total(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                 __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
}
#endif

// Not those of <cmath>, for the reason in kernels.hpp.
inline float root_of(float x) { return __builtin_sqrtf(x); }
inline double root_of(double x) { return __builtin_sqrt(x); }
inline double exp_of(double x) { return __builtin_exp(x); }

// 2**n e**r, with |r| <= ln(2) / 2, where eight terms of the series are exact to a unit in the last
// place. No call and no branch, so that loops become vectors; within 2 units of the true value.
inline float exp_of(float x) {
    constexpr float magic = 12582912;  // 1.5 * 2**23: its last bit stands for 1
    const float low = x < -104.0f ? -104.0f : x;  // the result is 0 below, infinite above
    const float bounded = low > 89.0f ? 89.0f : low;
    const float shifted = bounded * 1.44269504f + magic;
    const float n = shifted - magic;
    // ln(2) in two parts; the product with the first one is exact.
    const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    float sum = 1.0f / 5040;
    sum = sum * r + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1;
    sum = sum * r + 1;
    // In two steps, since 2**n alone may be out of range.
    const int32_t power = (int32_t)(bits_of(shifted) - bits_of(magic)), half = power >> 1;
    return sum * as_float((uint32_t)(half + 127) << 23) *
           as_float((uint32_t)(power - half + 127) << 23);
}

template <class S, class T> inline Wide<S> dot(const S *a, const T *b, int64_t size) {
    typedef Wide<S> F;
    typedef typename Vector<F>::Type V;
    V sum[2] = {}, u, v;
    int64_t at = 0;
    for (; at + 2 * lanes<F> <= size; at += 2 * lanes<F>)
        for (int i = 0; i < 2; i++) {
            load(a + at + i * lanes<F>, u);
            load(b + at + i * lanes<F>, v);
            sum[i] += u * v;
        }
    F all = total(sum[0] + sum[1]);
    for (; at < size; at++) all += wide(a[at]) * wide(b[at]);
    return all;
}

// Values of a row that one step of `dots` takes, and weights' rows that go side by side: the running
// sums of a step are enough to hide that an addition takes 4 cycles.
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
inline void load_step(const S *from, typename Vector<S>::Type &one, typename Vector<S>::Type &two) {
    load(from, one);
    load(from + lanes<S>, two);
}
inline void load_step(const Bf16 *from, Vector<float>::Type &one, Vector<float>::Type &two) {
    load_pairs(from, one, two);
}

// The dot products of `count` rows of weights, width values apart, with one row in steps.
template <class S, int count>
inline void dots(const S *weights, const Wide<S> *row, int64_t width, Wide<S> *out) {
    typedef Wide<S> F;
    typename Vector<F>::Type sum[count][2] = {}, row_one, row_two, one, two;
    int64_t at = 0;
    for (; at + step<S> <= width; at += step<S>) {
        load(row + at, row_one);
        load(row + at + lanes<F>, row_two);
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
        for (int i = 0; i < count; i++) out[i] = rounded<S>(sums[i] + (bias ? wide(bias[i]) : 0));
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
    int64_t at = 0;
    for (; in_pairs && at + step<S> <= width; at += step<S>)
        for (int i = 0; i < lanes<F>; i++) {
            out[at + i] = rounded<S>(row[at + 2 * i]);
            out[at + lanes<F> + i] = rounded<S>(row[at + 2 * i + 1]);
        }
    for (; at < width; at++) out[at] = rounded<S>(row[at]);
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
    typedef typename Vector<F>::Type V;
    const int64_t hidden = plan.hidden;
    const F added = plan.unit_offset;
    V sum = {}, u, k, query_scale, key_scale;
    int64_t at = 0;
    for (; at + lanes<F> <= hidden; at += lanes<F>) {
        load(x + at, u);
        load(key + at, k);
        load(query_norm + at, query_scale);
        load(key_norm + at, key_scale);
        sum += u * ((query_scale + added) * (key_scale + added)) * k;
    }
    F product = total(sum);
    for (; at < hidden; at++)
        product += wide(x[at]) * (scale(plan, query_norm, at) * scale(plan, key_norm, at)) * key[at];
    const F scaled = product * rstd(x, hidden, plan.eps) * rstd(key, hidden, plan.eps);
    const F similarity = scaled / root_of((F)hidden);
    const F size = similarity < 0 ? -similarity : similarity;
    const F root = root_of(size < (F)gate_floor ? (F)gate_floor : size);  // a NaN stays one
    return 1 / (1 + exp_of(similarity > 0 ? -root : similarity < 0 ? root : root * 0));
}

// update += SiLU(conv(inputs)) for one stream. window: its oldest column. mixed: scratch [D].
template <class S>
void convolve(const FusePlan &plan, const Wide<S> *window, const Wide<S> *inputs, const S *conv,
              Wide<S> *mixed, Wide<S> *update) {
    const int64_t hidden = plan.hidden, taps = plan.taps;
    const int64_t column = plan.dilation * plan.streams * hidden;
    for (int64_t i = 0; i < hidden; i++) mixed[i] = inputs[i] * wide(conv[i * taps + taps - 1]);
    for (int64_t tap = 0; tap < taps - 1; tap++)
        for (int64_t i = 0; i < hidden; i++)
            mixed[i] += window[tap * column + i] * wide(conv[i * taps + tap]);
    for (int64_t i = 0; i < hidden; i++) update[i] += mixed[i] / (1 + exp_of(-mixed[i]));
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
        convolve(plan, window, inputs, (const S *)plan.conv + norm * plan.taps,
                 (F *)call.mixed, update);
    }
    for (int64_t i = 0; i < hidden; i++)
        out[i] = live ? stored<S>(wide(x[i]) + rounded<S>(update[i])) : x[i];
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
