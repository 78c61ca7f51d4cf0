// The fusion layer for one token, compiled once per instruction set (see kernels.hpp for what that forbids).
//
// A decoded token meets weights that the model's own have driven out of the caches, so each is read once for all
// sequences.
#include <stdint.h>
#include <string.h>

#include "fuse.hpp"
#include "kernels.hpp"

namespace engraphy::ENGRAPHY_LEVEL {
namespace {

template <class F> constexpr int lanes = ENGRAPHY_LANES * 8 / sizeof(F);
constexpr int sums = 4;  // running sums of a dot product: an addition takes as many cycles
constexpr double gate_floor = 1e-6;

template <class F> struct Vector {
    typedef F Type __attribute__((vector_size(ENGRAPHY_LANES * 8)));
};

// Not those of <cmath>, for the reason in kernels.hpp.
inline float root_of(float x) { return __builtin_sqrtf(x); }
inline double root_of(double x) { return __builtin_sqrt(x); }
inline float exp_of(float x) { return __builtin_expf(x); }
inline double exp_of(double x) { return __builtin_exp(x); }

template <class F> inline F dot(const F *a, const F *b, int64_t size) {
    typedef typename Vector<F>::Type V;
    V sum[sums] = {}, u, v;
    int64_t at = 0;
    for (; at + sums * lanes<F> <= size; at += sums * lanes<F>)
        for (int i = 0; i < sums; i++) {
            memcpy(&u, a + at + i * lanes<F>, sizeof(V));
            memcpy(&v, b + at + i * lanes<F>, sizeof(V));
            sum[i] += u * v;
        }
    const V all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    F total = 0;
    for (int i = 0; i < lanes<F>; i++) total += all[i];
    for (; at < size; at++) total += a[at] * b[at];
    return total;
}

// out [B, count] = rows W^T + bias
template <class F> void project(const FuseCall &call, const void *weight, const void *bias, int64_t count, void *out) {
    const F *w = (const F *)weight, *rows = (const F *)call.rows;
    for (int64_t i = 0; i < count; i++, w += call.width)
        for (int64_t b = 0; b < call.batch; b++)
            ((F *)out)[b * count + i] = dot(w, rows + b * call.width, call.width) + (bias ? ((const F *)bias)[i] : 0);
}

template <class F> inline F scale(const FuseCall &call, const F *norm, int64_t i) {
    return call.unit_offset ? norm[i] + 1 : norm[i];
}

template <class F> inline F rstd(const F *x, int64_t size, double eps) {
    return 1 / root_of(dot(x, x, size) / size + (F)eps);
}

template <class F> F gate_of(const FuseCall &call, const F *x, const F *key, const F *query_norm, const F *key_norm) {
    const int64_t hidden = call.hidden;
    F product = 0;
    for (int64_t i = 0; i < hidden; i++)
        product += x[i] * (scale(call, query_norm, i) * scale(call, key_norm, i)) * key[i];
    const F u = product * rstd(x, hidden, call.eps) * rstd(key, hidden, call.eps) / root_of((F)hidden);
    const F size = u < 0 ? -u : u;
    const F root = root_of(size < (F)gate_floor ? (F)gate_floor : size);  // a NaN stays one
    return 1 / (1 + exp_of(u > 0 ? -root : u < 0 ? root : root * 0));
}

// update += SiLU(conv(inputs)) for one stream. window: its oldest column.
template <class F> void convolve(const FuseCall &call, const F *window, const F *inputs, const F *conv, F *update) {
    const int64_t taps = call.taps, step = call.dilation * call.streams * call.hidden;
    for (int64_t i = 0; i < call.hidden; i++) {
        F mixed = inputs[i] * conv[i * taps + taps - 1];
        for (int64_t tap = 0; tap < taps - 1; tap++) mixed += window[tap * step + i] * conv[i * taps + tap];
        update[i] += mixed / (1 + exp_of(-mixed));
    }
}

template <class F> void fuse_one(const FuseCall &call, int64_t b, int64_t s) {
    const int64_t hidden = call.hidden, norm = s * hidden, at = (b * call.streams + s) * hidden;
    const F *query_norm = (const F *)call.query_norm + norm, *key_norm = (const F *)call.key_norm + norm;
    const F *value = (const F *)call.values + b * hidden;
    F *update = (F *)call.keys + at;  // in the place of the keys, once they have made the gate
    const F *x = (const F *)call.x + at;
    F *out = (F *)call.out + at;
    const bool live = !call.live || call.live[b];
    F gate = gate_of(call, x, update, query_norm, key_norm);
    if (!live) gate = 0;
    if (call.gate) ((F *)call.gate)[b * call.streams + s] = gate;
    for (int64_t i = 0; i < hidden; i++) update[i] = gate * value[i];
    if (call.taps) {
        const F *conv_norm = (const F *)call.conv_norm + norm;
        const F *window = (const F *)call.window + b * call.stride + norm;
        F *inputs = (F *)call.inputs + b * call.stride + norm;
        const F factor = rstd(update, hidden, call.conv_eps);
        for (int64_t i = 0; i < hidden; i++) inputs[i] = update[i] * factor * scale(call, conv_norm, i);
        convolve(call, window, inputs, (const F *)call.conv + norm * call.taps, update);
    }
    for (int64_t i = 0; i < hidden; i++) out[i] = live ? x[i] + update[i] : x[i];
}

template <class F> void fuse_all(const FuseCall &call) {
    project<F>(call, call.key, call.key_bias, call.streams * call.hidden, call.keys);
    project<F>(call, call.value, call.value_bias, call.hidden, call.values);
    for (int64_t b = 0; b < call.batch; b++)
        for (int64_t s = 0; s < call.streams; s++) fuse_one<F>(call, b, s);
}

}  // namespace

void fuse(const FuseCall &call) { call.wide ? fuse_all<double>(call) : fuse_all<float>(call); }

}  // namespace engraphy::ENGRAPHY_LEVEL
