// The row kinds of GGUF files: blocks of 32 or 256 small codes with their own scales. For kernel
// files: each instruction set has its own copy. engraphy/rows/blocks.py is the specification.
//
// Each kind has two ways of a block: `plain` says what the values are, and does what is rare;
// `quick` is in registers and returns false if the level has none or a scale is not finite.
//
// Why the bits are the same: a code times its scale, and times the scale of its part, are at most
// 22 significant bits, so the products are exact; only the last difference is rounded. A NaN comes
// of scales that are not finite alone, and is made the same one.
#pragma once

#include <stdint.h>

#include "bf16.hpp"
#include "copy.hpp"
#include "registers.hpp"
#include "widened.hpp"

namespace engraphy::ENGRAPHY_LEVEL {
namespace {

inline float half_at(const uint8_t *at) { return as_float(from_f16(*(const U16 *)at)); }

template <class To> inline typename To::Bits settled(float value) {
    const uint32_t bits = bits_of(value);
    return To::of_clean((bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : bits);
}

inline uint32_t word_at(const uint8_t *at) { return *(const U32 *)at; }

// The integers that four bits stand for.
struct Centred {
    static constexpr int8_t values[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
};
struct Nonlinear {
    static constexpr int8_t values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                          1,    13,   25,  38,  53,  69,  89,  113};
};
struct Doubled {  // e2m1 times 2
    static constexpr int8_t values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
};

// How a block of 32 codes of four bits keeps its scale.
struct HalfScale {
    static constexpr int bytes = 2;
    static float of(const uint8_t *at) { return half_at(at); }
    static bool finite(const uint8_t *at) { return (*(const U16 *)at & 0x7c00) != 0x7c00; }
};
struct PowerScale {  // 2**(e - 128), half of what ue8m0 says
    static constexpr int bytes = 1;
    static float of(const uint8_t *at) {
        return as_float(*at < 2 ? 0x200000u << *at : (*at - 1u) << 23);
    }
    static bool finite(const uint8_t *) { return true; }
};

// Scales and offsets of the 8 parts of a block of q4_k or q5_k: six bits each.
struct SixBits {
    uint32_t scales[2], lows[2];
    explicit SixBits(const uint8_t *at) {
        const uint32_t a = word_at(at), b = word_at(at + 4), c = word_at(at + 8);
        scales[0] = a & 0x3f3f3f3f;
        scales[1] = (c & 0x0f0f0f0f) | (a >> 2 & 0x30303030);
        lows[0] = b & 0x3f3f3f3f;
        lows[1] = (c >> 4 & 0x0f0f0f0f) | (b >> 2 & 0x30303030);
    }
};

// Scales of the 16 parts of a block of q3_k, 32 too large.
struct SignedSixBits {
    uint32_t scales[4];
    explicit SignedSixBits(const uint8_t *at) {
        const uint32_t a = word_at(at), b = word_at(at + 4), c = word_at(at + 8);
        scales[0] = (a & 0x0f0f0f0f) | (c << 4 & 0x30303030);
        scales[1] = (b & 0x0f0f0f0f) | (c << 2 & 0x30303030);
        scales[2] = (a >> 4 & 0x0f0f0f0f) | (c & 0x30303030);
        scales[3] = (b >> 4 & 0x0f0f0f0f) | (c >> 2 & 0x30303030);
    }
};

inline int byte_of(const uint32_t *words, int i) { return words[i / 4] >> i % 4 * 8 & 0xff; }

#if defined(__AVX2__)

ALWAYS __m256i load_codes(const uint8_t *at) { return _mm256_loadu_si256((const __m256i *)at); }

// 32 values of int8 codes. value(part, numbers): of the first 16 or the second 16 codes.
template <bool past, class Out, class Value>
ALWAYS void put_codes(Out *out, __m256i codes, const Value &value) {
    const __m128i first = _mm256_castsi256_si128(codes);
    const __m128i second = _mm256_extracti128_si256(codes, 1);
#if defined(__AVX512BW__)
    put<past>(out, value(0, numbers_of(first)), value(1, numbers_of(second)));
#else
    put<past>(out, value(0, numbers_of(first)), value(0, numbers_of(_mm_srli_si128(first, 8))));
    put<past>(out + 16, value(1, numbers_of(second)),
              value(1, numbers_of(_mm_srli_si128(second, 8))));
#endif
}

// 16 small integers times a number.
ALWAYS void multiply(float *to, __m128i codes, float by) {
    const Floats factor = all_lanes(by);
    store<false>(to, bits_in(product(numbers_of(codes), factor)));
#if !defined(__AVX512BW__)
    store<false>(to + 8, bits_in(product(numbers_of(_mm_srli_si128(codes, 8)), factor)));
#endif
}

#endif

struct Q8_0 {
    static constexpr int values = 32, bytes = 34;
    template <class To>
    static __attribute__((noinline)) void plain(const uint8_t *block, typename To::Bits *out) {
        const float scale = half_at(block);
        for (int i = 0; i < values; i++) out[i] = settled<To>((float)(int8_t)block[2 + i] * scale);
    }
    template <bool past, class Out> ALWAYS static bool quick(const uint8_t *block, Out *out) {
#if defined(__AVX2__)
        float scale;
        if (!finite_scale(block, scale)) return false;
        const Floats scales = all_lanes(scale);
        put_codes<past>(out, load_codes(block + 2),
                        [&](int, Floats numbers) { return product(numbers, scales); });
        return true;
#else
        return (void)block, (void)out, false;
#endif
    }
};

template <class Codes, class Scale> struct Nibbles {
    static constexpr int values = 32, bytes = Scale::bytes + 16;
    template <class To>
    static __attribute__((noinline)) void plain(const uint8_t *block, typename To::Bits *out) {
        const float scale = Scale::of(block);
        const uint8_t *codes = block + Scale::bytes;
        for (int i = 0; i < 16; i++) {
            out[i] = settled<To>((float)Codes::values[codes[i] & 15] * scale);
            out[i + 16] = settled<To>((float)Codes::values[codes[i] >> 4] * scale);
        }
    }
    template <bool past, class Out> ALWAYS static bool quick(const uint8_t *block, Out *out) {
#if defined(__AVX2__)
        if (!Scale::finite(block)) return false;
        const Floats scales = all_lanes(Scale::of(block));
        const __m128i pairs = _mm_loadu_si128((const __m128i *)(block + Scale::bytes));
        const __m256i shifted = _mm256_set_m128i(_mm_srli_epi16(pairs, 4), pairs);
        const __m256i nibbles = _mm256_and_si256(shifted, _mm256_set1_epi8(15));
        const __m256i table =
            _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)Codes::values));
        put_codes<past>(out, _mm256_shuffle_epi8(table, nibbles),
                        [&](int, Floats numbers) { return product(numbers, scales); });
        return true;
#else
        return (void)block, (void)out, false;
#endif
    }
};

typedef Nibbles<Centred, HalfScale> Q4_0;
typedef Nibbles<Nonlinear, HalfScale> Iq4Nl;
typedef Nibbles<Doubled, PowerScale> Mxfp4;

struct Q2K {
    static constexpr int values = 256, bytes = 84;
    template <class To>
    static __attribute__((noinline)) void plain(const uint8_t *block, typename To::Bits *out) {
        const float scale = half_at(block + 80), low = half_at(block + 82);
        for (int part = 0; part < 16; part++) {
            const uint8_t *codes = block + 16 + part / 8 * 32 + part % 2 * 16;
            const int shift = part / 2 % 4 * 2;
            const float high = scale * (float)(block[part] & 15);
            const float less = low * (float)(block[part] >> 4);
            for (int i = 0; i < 16; i++)
                out[16 * part + i] = settled<To>((float)(codes[i] >> shift & 3) * high - less);
        }
    }
    template <bool past, class Out> ALWAYS static bool quick(const uint8_t *block, Out *out) {
#if defined(__AVX2__)
        float scale, low;
        if (!finite_scale(block + 80, scale) || !finite_scale(block + 82, low)) return false;
        const __m128i pairs = _mm_loadu_si128((const __m128i *)block);
        const __m128i nibble = _mm_set1_epi8(15);
        float high[16], less[16];
        multiply(high, _mm_and_si128(pairs, nibble), scale);
        multiply(less, _mm_and_si128(_mm_srli_epi16(pairs, 4), nibble), low);
        for (int half = 0; half < 2; half++) {
            __m256i codes = load_codes(block + 16 + 32 * half);
            for (int at = 8 * half; at < 8 * half + 8; at += 2) {
                put_codes<past>(out + 16 * at, _mm256_and_si256(codes, _mm256_set1_epi8(3)),
                                [&](int part, Floats numbers) {
                                    return difference(product(numbers, all_lanes(high[at + part])),
                                                      all_lanes(less[at + part]));
                                });
                codes = _mm256_srli_epi16(codes, 2);
            }
        }
        return true;
#else
        return (void)block, (void)out, false;
#endif
    }
};

struct Q3K {
    static constexpr int values = 256, bytes = 110;
    template <class To>
    static __attribute__((noinline)) void plain(const uint8_t *block, typename To::Bits *out) {
        const float scale = half_at(block + 108);
        const SignedSixBits parts(block + 96);
        for (int part = 0; part < 16; part++) {
            const uint8_t *codes = block + 32 + part / 8 * 32 + part % 2 * 16;
            const uint8_t *bits = block + part % 2 * 16;
            const int shift = part / 2 % 4 * 2;
            const float high = scale * (float)(byte_of(parts.scales, part) - 32);
            for (int i = 0; i < 16; i++) {
                const int code = (codes[i] >> shift & 3) - (bits[i] >> part / 2 & 1 ? 0 : 4);
                out[16 * part + i] = settled<To>((float)code * high);
            }
        }
    }
    template <bool past, class Out> ALWAYS static bool quick(const uint8_t *block, Out *out) {
#if defined(__AVX2__)
        float scale;
        if (!finite_scale(block + 108, scale)) return false;
        const SignedSixBits parts(block + 96);
        float high[16];
        const __m128i scales = _mm_loadu_si128((const __m128i *)parts.scales);
        multiply(high, _mm_sub_epi8(scales, _mm_set1_epi8(32)), scale);
        const __m256i bits = load_codes(block);
        __m256i bit = _mm256_set1_epi8(1);
        for (int half = 0; half < 2; half++) {
            __m256i pairs = load_codes(block + 32 + 32 * half);
            for (int at = 8 * half; at < 8 * half + 8; at += 2) {
                const __m256i unset =
                    _mm256_cmpeq_epi8(_mm256_and_si256(bits, bit), _mm256_setzero_si256());
                const __m256i codes =
                    _mm256_sub_epi8(_mm256_and_si256(pairs, _mm256_set1_epi8(3)),
                                    _mm256_and_si256(unset, _mm256_set1_epi8(4)));
                put_codes<past>(out + 16 * at, codes, [&](int part, Floats numbers) {
                    return product(numbers, all_lanes(high[at + part]));
                });
                pairs = _mm256_srli_epi16(pairs, 2);
                bit = _mm256_add_epi8(bit, bit);
            }
        }
        return true;
#else
        return (void)block, (void)out, false;
#endif
    }
};

// q4_k; or with a fifth bit of each code, q5_k.
template <bool fifth> struct PartsOf32 {
    static constexpr int values = 256, bytes = fifth ? 176 : 144, codes_at = fifth ? 48 : 16;
    template <class To>
    static __attribute__((noinline)) void plain(const uint8_t *block, typename To::Bits *out) {
        const float scale = half_at(block), low = half_at(block + 2);
        const SixBits parts(block + 4);
        for (int part = 0; part < 8; part++) {
            const uint8_t *codes = block + codes_at + part / 2 * 32;
            const float high = scale * (float)byte_of(parts.scales, part);
            const float less = low * (float)byte_of(parts.lows, part);
            for (int i = 0; i < 32; i++) {
                int code = codes[i] >> part % 2 * 4 & 15;
                if (fifth) code |= (block[16 + i] >> part & 1) << 4;
                out[32 * part + i] = settled<To>((float)code * high - less);
            }
        }
    }
    template <bool past, class Out> ALWAYS static bool quick(const uint8_t *block, Out *out) {
#if defined(__AVX2__)
        float scale, low;
        if (!finite_scale(block, scale) || !finite_scale(block + 2, low)) return false;
        const SixBits parts(block + 4);
        float high[16], less[16];  // of 8 parts
        multiply(high, _mm_loadl_epi64((const __m128i *)parts.scales), scale);
        multiply(less, _mm_loadl_epi64((const __m128i *)parts.lows), low);
        const __m256i bits = load_codes(block + 16);  // of q5_k alone
        __m256i bit = _mm256_set1_epi8(1);
        for (int part = 0; part < 8; part++) {
            const __m256i pairs = load_codes(block + codes_at + part / 2 * 32);
            const __m256i shifted = part % 2 ? _mm256_srli_epi16(pairs, 4) : pairs;
            __m256i codes = _mm256_and_si256(shifted, _mm256_set1_epi8(15));
            if (fifth) {
                const __m256i unset =
                    _mm256_cmpeq_epi8(_mm256_and_si256(bits, bit), _mm256_setzero_si256());
                codes = _mm256_or_si256(codes, _mm256_andnot_si256(unset, _mm256_set1_epi8(16)));
                bit = _mm256_add_epi8(bit, bit);
            }
            put_codes<past>(out + 32 * part, codes, [&](int, Floats numbers) {
                return difference(product(numbers, all_lanes(high[part])), all_lanes(less[part]));
            });
        }
        return true;
#else
        return (void)block, (void)out, false;
#endif
    }
};

typedef PartsOf32<false> Q4K;
typedef PartsOf32<true> Q5K;

// A row of blocks, one after the other.
template <class Block> struct Blocks {
    static int64_t row_bytes(int64_t d) { return d / Block::values * Block::bytes; }
    template <class To, bool past>
    static void decode(const uint8_t *row, typename To::Bits *__restrict out, int64_t d, float) {
        for (int64_t at = 0; at < d; at += Block::values, row += Block::bytes)
            if (!Block::template quick<past>(row, out + at)) Block::template plain<To>(row, out + at);
    }
};

}  // namespace
}  // namespace engraphy::ENGRAPHY_LEVEL
