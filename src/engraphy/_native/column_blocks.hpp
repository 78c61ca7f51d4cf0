// Blocks of 16 columns of a row, which the compiler turns into the vectors of each level:
// arithmetic on them, and how they are stored. At the end of a row a block is filled up with zeros.
// For the files that are compiled once per instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

#include "copy.hpp"
#include "update.hpp"

namespace engraphy::ENGRAPHY_LEVEL {
namespace {

constexpr int lanes = update_lanes;

typedef float Block __attribute__((vector_size(4 * lanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * lanes)));
typedef int32_t Signed __attribute__((vector_size(4 * lanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * lanes)));
typedef double Wide8 __attribute__((vector_size(8 * lanes / 2)));
typedef float Block8 __attribute__((vector_size(4 * lanes / 2)));

// Arrays may begin at any byte; `count` is below 16 at the end of a row alone.

template <class Vector> ALWAYS void load(const void *from, int count, Vector &to) {
    constexpr int size = sizeof(Vector) / lanes;
    if (count < lanes) to = Vector{};
    memcpy(&to, from, count * size);
}

template <class Vector> ALWAYS void store(void *to, int count, const Vector &from) {
    memcpy(to, &from, count * sizeof(Vector) / lanes);
}

// step(column, count) for each block of a row.
template <class Step> ALWAYS void by_blocks(int64_t d, const Step &step) {
    int64_t column = 0;
    for (; column + lanes <= d; column += lanes) step(column, lanes);
    if (column < d) step(column, (int)(d - column));
}

ALWAYS void take_root(Block &x) {
    float values[lanes];
    memcpy(values, &x, sizeof(x));
    for (int i = 0; i < lanes; i++) values[i] = __builtin_sqrtf(values[i]);
    memcpy(&x, values, sizeof(x));
}

// The second half is added to the first, four times.
template <class F> inline F folded(F *sums) {
    for (int half = lanes / 2; half; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
}

ALWAYS float folded(const Block &sums) {
    Block8 halves[2];
    memcpy(halves, &sums, sizeof(sums));
    const Block8 a = halves[0] + halves[1];
    const float b[4] = {a[0] + a[4], a[1] + a[5], a[2] + a[6], a[3] + a[7]};
    return (b[0] + b[2]) + (b[1] + b[3]);
}

// Random bits, as in engraphy/train/rounding.py.

inline uint64_t splitmix64(uint64_t value) {
    value += 0x9e3779b97f4a7c15;
    value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9;
    value = (value ^ value >> 27) * 0x94d049bb133111eb;
    return value ^ value >> 31;
}

constexpr uint32_t parts_apart = 1 << 16;

ALWAYS void random_bits(uint64_t row, uint32_t counter, Bits &bits) {
    const Bits columns = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    bits = (columns + counter) * 0x9e3779b1u + (uint32_t)row;
    bits = (bits ^ bits >> 16) * 0x85ebca6bu;
    bits = (bits ^ bits >> 13) + (uint32_t)(row >> 32);
    bits *= 0xc2b2ae35u;
    bits ^= bits >> 16;
}

// How values are stored. `random`: 16 bits each, used by Stochastic alone.
struct Exact {
    static constexpr int size = 4;
    static constexpr bool random = false;
    ALWAYS static void get(const uint8_t *from, int count, Block &to) { load(from, count, to); }
    ALWAYS static void put(uint8_t *to, int count, const Block &from, const Bits &) {
        store(to, count, from);
    }
};

struct Bf16 {
    static constexpr int size = 2;
    ALWAYS static void get(const uint8_t *from, int count, Block &to) {
        Halves halves;
        load(from, count, halves);
        to = (Block)(__builtin_convertvector(halves, Bits) << 16);
    }
    // added: what goes to the low half before it is cut off.
    ALWAYS static void cut(uint8_t *to, int count, const Block &from, const Bits &added) {
        const Bits bits = (Bits)from;
        const Signed is_nan = (Signed)(bits & 0x7fffffff) > 0x7f800000;
        const Bits kept = is_nan ? bits >> 16 | 0x40 : (bits + added) >> 16;
        store(to, count, __builtin_convertvector(kept, Halves));
    }
};

struct Nearest : Bf16 {
    static constexpr bool random = false;
    ALWAYS static void put(uint8_t *to, int count, const Block &from, const Bits &) {
        cut(to, count, from, ((Bits)from >> 16 & 1) + 0x7fff);
    }
};

struct Stochastic : Bf16 {
    static constexpr bool random = true;
    ALWAYS static void put(uint8_t *to, int count, const Block &from, const Bits &added) {
        cut(to, count, from, added);
    }
};

}  // namespace
}  // namespace engraphy::ENGRAPHY_LEVEL
