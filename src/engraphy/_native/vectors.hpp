// Vectors of the level's width, of float and double, over arrays of float, double and bfloat16. For
// the files that are compiled once per instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

#include "bf16.hpp"

namespace engraphy::ENGRAPHY_LEVEL {

struct Bf16 { uint16_t bits; };

// The type that values of type S are computed with.
template <class S> struct Computed { typedef S Type; };
template <> struct Computed<Bf16> { typedef float Type; };
template <class S> using Wide = typename Computed<S>::Type;

inline int32_t as_int(float value) { return __builtin_bit_cast(int32_t, value); }
inline float wide(float x) { return x; }
inline double wide(double x) { return x; }
inline float wide(Bf16 x) { return as_float((uint32_t)x.bits << 16); }

template <class F> constexpr int lanes = ENGRAPHY_LANES * 8 / sizeof(F);
template <class F> struct Lanes {
    typedef F Type __attribute__((vector_size(ENGRAPHY_LANES * 8)));
};
template <class F> using Vector = typename Lanes<F>::Type;

// How much of a vector is there: all, or its first values; the others are zero.
struct Whole {};
struct Part { int count; };

template <class F> inline Vector<F> load(const F *from, Whole) {
    Vector<F> to;
    memcpy(&to, from, sizeof(to));
    return to;
}
template <class F> inline Vector<F> load(const F *from, Part part) {
    Vector<F> to = {};
    for (int i = 0; i < part.count; i++) to[i] = from[i];
    return to;
}

typedef uint16_t Halves __attribute__((vector_size(ENGRAPHY_LANES * 4)));
typedef uint32_t Bits __attribute__((vector_size(ENGRAPHY_LANES * 8)));
typedef int32_t Integers __attribute__((vector_size(ENGRAPHY_LANES * 8)));

inline Vector<float> load(const Bf16 *from, Whole) {
    Halves halves;
    memcpy(&halves, from, sizeof(halves));
    return (Vector<float>)(__builtin_convertvector(halves, Bits) << 16);
}
inline Vector<float> load(const Bf16 *from, Part part) {
    Vector<float> to = {};
    for (int i = 0; i < part.count; i++) to[i] = wide(from[i]);
    return to;
}

template <class F> inline void store(F *to, Vector<F> from, Whole) {
    memcpy(to, &from, sizeof(from));
}
template <class F> inline void store(F *to, Vector<F> from, Part part) {
    for (int i = 0; i < part.count; i++) to[i] = from[i];
}

// To nearest even, any NaN made quiet, as bf16_of does.
inline Halves halves_of(Vector<float> from) {
    const Bits bits = (Bits)from;
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Bits quiet = (bits >> 16) | 0x40;
    const Bits is_nan = (Bits)((bits & 0x7fffffff) > 0x7f800000);
    return __builtin_convertvector((is_nan & quiet) | (~is_nan & rounded), Halves);
}
inline void store(Bf16 *to, Vector<float> from, Whole) {
    const Halves halves = halves_of(from);
    memcpy(to, &halves, sizeof(halves));
}
inline void store(Bf16 *to, Vector<float> from, Part part) {
    for (int i = 0; i < part.count; i++) to[i].bits = bf16_of(bits_of(from[i]));
}

// As the values would be after they were stored as S and loaded again.
inline float rounded(float from, const float *) { return from; }
inline double rounded(double from, const double *) { return from; }
inline float rounded(float from, const Bf16 *) { return wide(Bf16{bf16_of(bits_of(from))}); }
inline Vector<float> rounded(Vector<float> from, const float *) { return from; }
inline Vector<double> rounded(Vector<double> from, const double *) { return from; }
inline Vector<float> rounded(Vector<float> from, const Bf16 *) {
    return (Vector<float>)(__builtin_convertvector(halves_of(from), Bits) << 16);
}

// body(first, part) for each vector of `size` values.
template <class F, class Body>
inline __attribute__((always_inline)) void along(int64_t size, const Body &body) {
    int64_t i = 0;
    for (; i + lanes<F> <= size; i += lanes<F>) body(i, Whole());
    if (i < size) body(i, Part{int(size - i)});
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

template <class S> inline Wide<S> squares_of(const S *values, int64_t size) {
    Vector<Wide<S>> sum = {};
    along<Wide<S>>(size, [&](int64_t i, auto part) {
        const Vector<Wide<S>> value = load(values + i, part);
        sum += value * value;
    });
    return total(sum);
}

// Not those of <cmath>, for the reason in kernels.hpp.
inline float root_of(float x) { return __builtin_sqrtf(x); }
inline double root_of(double x) { return __builtin_sqrt(x); }
inline double exp_of(double x) { return __builtin_exp(x); }

// 2**n e**r, with |r| <= ln(2) / 2, where eight terms of the series are exact to a unit in the last
// place; within 2 units of the true value.
inline Vector<float> exp_of(Vector<float> x) {
    const float most = 89, least = -104;  // the result is infinite above, 0 below
    const float log2_of_e = 1.44269504f;
    const float magic = 12582912;  // 1.5 * 2**23: its last bit stands for 1
    const float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;  // n * ln2_high is exact
    const Vector<float> none = {};
    x = x > most ? none + most : x;  // a NaN stays one
    x = x < least ? none + least : x;
    const Vector<float> shifted = x * log2_of_e + magic;
    const Vector<float> n = shifted - magic;
    const Vector<float> r = (x - n * ln2_high) - n * ln2_low;
    Vector<float> sum = r * (1 / 5040.f) + 1 / 720.f;
    sum = sum * r + 1 / 120.f;
    sum = sum * r + 1 / 24.f;
    sum = sum * r + 1 / 6.f;
    sum = sum * r + 0.5f;
    sum = sum * r + 1;
    sum = sum * r + 1;
    // In two steps, since 2**n alone may be out of range.
    const Integers power = (Integers)shifted - as_int(magic), half = power >> 1;
    return sum * (Vector<float>)((half + 127) << 23) *
           (Vector<float>)((power - half + 127) << 23);
}
inline float exp_of(float x) { return exp_of(Vector<float>{} + x)[0]; }
inline Vector<double> exp_of(Vector<double> x) {
    for (int i = 0; i < lanes<double>; i++) x[i] = __builtin_exp(x[i]);
    return x;
}

}  // namespace engraphy::ENGRAPHY_LEVEL
