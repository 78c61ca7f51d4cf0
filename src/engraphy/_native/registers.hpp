// Rows of small codes as numbers, in registers. For kernel files: each instruction set has its own
// copy.
//
// A function here returns false if it leaves its codes to the plain loops of rows_kernel.cpp: the
// level has no such registers, the row is narrower than they are, or it holds what is rare: NaN
// codes, extreme scales. The bits are the same either way. `past` the caches: `out` and each row
// of it begin with a line then.
//
// A plain loop turns a code into float32, multiplies it by its scale and rounds. Here:
//   e4m3 into float32: its bits, as those of f16, are a value 2**8 times smaller. F16C widens it,
//   subnormal codes included, in any mode; the scale makes good for the 2**8. Both factors are
//   exact, so the product is rounded once, as in the plain loop.
//   e4m3 under a power of two into bf16: four significant bits always fit, so nothing is rounded.
//   The bits of the product are those of the code, moved, plus a multiple of the exponent's step.
//   int4: a row has 16 different values. They are computed, and rounded, once, then looked up.
#pragma once

#include <stdint.h>

#include "bf16.hpp"
#include "copy.hpp"

namespace engraphy::ENGRAPHY_LEVEL {
namespace {

// Records and outputs may begin at any byte.
typedef uint16_t U16 __attribute__((aligned(1), may_alias));
typedef uint32_t U32 __attribute__((aligned(1), may_alias));

#if defined(__AVX2__)

#if defined(__AVX512BW__)

typedef __m512 Floats;
typedef __m512i Words;
constexpr int lanes = 16;

ALWAYS Floats all_lanes(float value) { return _mm512_set1_ps(value); }
ALWAYS Floats product(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
ALWAYS Floats difference(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
ALWAYS Words bits_in(Floats values) { return _mm512_castps_si512(values); }

template <bool past> ALWAYS void store(void *to, Words words) {
    past ? _mm512_stream_si512((__m512i *)to, words) : _mm512_storeu_si512(to, words);
}

// The first `lanes` codes.
ALWAYS Floats numbers_of(__m128i codes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
}

ALWAYS Floats from_int8(const uint8_t *codes) {
    return numbers_of(_mm_loadu_si128((const __m128i *)codes));
}

// 2 * lanes codes, 2**8 times smaller than they are.
ALWAYS void from_e4m3(const uint8_t *codes, Floats &first, Floats &second) {
    const Words wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)codes));
    const Words halves =
        _mm512_and_si512(_mm512_slli_epi16(wide, 7), _mm512_set1_epi16((short)0xbf80));
    first = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    second = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
}

// Rounded to nearest even: the upper halves are bf16.
ALWAYS Words rounded(Floats values) {
    const Words bits = bits_in(values);
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(1 << 16));
    const Words up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    return _mm512_mask_add_epi32(up, odd, up, _mm512_set1_epi32(1));
}

// Packing works within 128 bits, so the order is mended.
ALWAYS Words upper_halves(Words first, Words second) {
    const Words packed =
        _mm512_packus_epi32(_mm512_srli_epi32(first, 16), _mm512_srli_epi32(second, 16));
    return _mm512_permutexvar_epi64(_mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), packed);
}

#else

typedef __m256 Floats;
typedef __m256i Words;
constexpr int lanes = 8;

ALWAYS Floats all_lanes(float value) { return _mm256_set1_ps(value); }
ALWAYS Floats product(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
ALWAYS Floats difference(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
ALWAYS Words bits_in(Floats values) { return _mm256_castps_si256(values); }

template <bool past> ALWAYS void store(void *to, Words words) {
    past ? _mm256_stream_si256((__m256i *)to, words) : _mm256_storeu_si256((__m256i *)to, words);
}

ALWAYS Floats numbers_of(__m128i codes) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
}

ALWAYS Floats from_int8(const uint8_t *codes) {
    return numbers_of(_mm_loadl_epi64((const __m128i *)codes));
}

ALWAYS void from_e4m3(const uint8_t *codes, Floats &first, Floats &second) {
    const Words wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)codes));
    const Words halves =
        _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16((short)0xbf80));
    first = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    second = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
}

ALWAYS Words rounded(Floats values) {
    const Words bits = bits_in(values);
    const Words odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}

ALWAYS Words upper_halves(Words first, Words second) {
    const Words packed =
        _mm256_packus_epi32(_mm256_srli_epi32(first, 16), _mm256_srli_epi32(second, 16));
    return _mm256_permute4x64_epi64(packed, 0xd8);
}

#endif

template <bool past> ALWAYS void store_bytes(void *to, __m256i bytes) {
    past ? _mm256_stream_si256((__m256i *)to, bytes) : _mm256_storeu_si256((__m256i *)to, bytes);
}

// 2 * lanes numbers that are not NaN.
template <bool past> ALWAYS void put(U32 *out, Floats first, Floats second) {
    store<past>(out, bits_in(first));
    store<past>(out + lanes, bits_in(second));
}
template <bool past> ALWAYS void put(U16 *out, Floats first, Floats second) {
    store<past>(out, upper_halves(rounded(first), rounded(second)));
}

// work(at) for each `width` of d values; false if d is smaller. Where d is no multiple, the last
// call overlaps the one before it, and writes the same again.
template <int width, class Work> ALWAYS bool in_steps(int64_t d, const Work &work) {
    if (d < width) return false;
    int64_t at = 0;
    for (; at + width <= d; at += width) work(at);
    if (at < d) work(d - width);
    return true;
}

// The scale of a row of integers; false if it is not finite.
ALWAYS bool finite_scale(const uint8_t *at, float &scale) {
    const uint32_t half = *(const U16 *)at;
    scale = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
    return (half & 0x7c00) != 0x7c00;
}

template <bool past, class Out> ALWAYS bool int8_row(const uint8_t *row, Out *out, int64_t d) {
    float scale;
    if (!finite_scale(row + d, scale)) return false;
    const Floats scales = all_lanes(scale);
    return in_steps<2 * lanes>(d, [&](int64_t at) {
        put<past>(out + at, product(from_int8(row + at), scales),
                  product(from_int8(row + at + lanes), scales));
    });
}

#if defined(__AVX512BW__)

template <bool past> ALWAYS bool int4_row(const uint8_t *row, U32 *out, int64_t d) {
    float scale;
    if (!finite_scale(row + d / 2, scale)) return false;
    const Floats codes =
        _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    const Floats values = product(codes, all_lanes(scale));
    return in_steps<lanes>(d, [&](int64_t at) {
        const Words bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(row + at / 2)));
        // The look-up takes the four lowest bits of each 32.
        const Words nibbles = _mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28));
        store<past>(out + at, bits_in(_mm512_permutexvar_ps(nibbles, values)));
    });
}

#else

// Eight values in one register cannot be looked up in 16.
template <bool past> ALWAYS bool int4_row(const uint8_t *row, U32 *out, int64_t d) {
    float scale;
    if (!finite_scale(row + d / 2, scale)) return false;
    const Floats scales = all_lanes(scale);
    const Words to_top = _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0);
    return in_steps<lanes>(d, [&](int64_t at) {
        const Words bytes = _mm256_set1_epi32((int)*(const U32 *)(row + at / 2));
        const Words codes = _mm256_srai_epi32(_mm256_sllv_epi32(bytes, to_top), 28);
        store<past>(out + at, bits_in(product(_mm256_cvtepi32_ps(codes), scales)));
    });
}

#endif

// The 16 values of a row of int4 as bf16: their lower and their upper bytes, in both halves of a
// register.
ALWAYS void int4_values(float scale, __m256i &low, __m256i &high) {
    const auto upper = [](__m256 values) {
        const __m256i bits = _mm256_castps_si256(values);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
        return _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    };
    const __m256 scales = _mm256_set1_ps(scale);
    const __m256 positive = _mm256_mul_ps(_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7), scales);
    const __m256 negative =
        _mm256_mul_ps(_mm256_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1), scales);
    const __m256i words = _mm256_permute4x64_epi64(
        _mm256_packus_epi32(upper(positive), upper(negative)), 0xd8);
    const __m256i bytes = _mm256_packus_epi16(_mm256_and_si256(words, _mm256_set1_epi16(0xff)),
                                              _mm256_srli_epi16(words, 8));
    low = _mm256_permute4x64_epi64(bytes, 0x88);
    high = _mm256_permute4x64_epi64(bytes, 0xdd);
}

template <bool past> ALWAYS bool int4_row(const uint8_t *row, U16 *out, int64_t d) {
    float scale;
    if (!finite_scale(row + d / 2, scale)) return false;
    __m256i low, high;
    int4_values(scale, low, high);
    const __m256i nibble = _mm256_set1_epi8(15);
    // Interleaving works within 128 bits, so bytes are set apart before it.
    const __m256i apart = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    return in_steps<64>(d, [&](int64_t at) {
        const __m256i loaded = _mm256_loadu_si256((const __m256i *)(row + at / 2));
        const __m256i bytes = _mm256_permutevar8x32_epi32(loaded, apart);
        const __m256i even = _mm256_and_si256(bytes, nibble);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
        const auto look_up = [&](U16 *to, __m256i nibbles) {
            const __m256i lows = _mm256_shuffle_epi8(low, nibbles);
            const __m256i highs = _mm256_shuffle_epi8(high, nibbles);
            store_bytes<past>(to, _mm256_unpacklo_epi8(lows, highs));
            store_bytes<past>(to + 16, _mm256_unpackhi_epi8(lows, highs));
        };
        look_up(out + at, _mm256_unpacklo_epi8(even, odd));
        look_up(out + at + 32, _mm256_unpackhi_epi8(even, odd));
    });
}

ALWAYS __m256i sizes_of(__m256i codes) { return _mm256_and_si256(codes, _mm256_set1_epi8(0x7f)); }

ALWAYS bool has_nan(__m256i sizes) {
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(sizes, _mm256_set1_epi8(0x7f)));
}

template <bool past, class Out>
ALWAYS bool fp8_scaled_row(const uint8_t *row, Out *out, int64_t d, float scale) {
    bool rare = !(scale * 256 < 0x1p127f);
    in_steps<32>(d, [&](int64_t at) {
        rare |= has_nan(sizes_of(_mm256_loadu_si256((const __m256i *)(row + at))));
    });
    if (rare || d < 32) return false;
    const Floats scales = all_lanes(scale * 256);
    return in_steps<2 * lanes>(d, [&](int64_t at) {
        Floats first, second;
        from_e4m3(row + at, first, second);
        put<past>(out + at, product(first, scales), product(second, scales));
    });
}

// What a scale byte b means, between 10 and 246: the products of all codes but NaN and zero are
// normal, and the factor of values 2**8 times smaller is finite.
struct Fp8Scale {
    float factor = 0;                  // 2**(b - 127 + 8)
    uint32_t to_size = 0, to_top = 0;  // of bf16: what is added to bytes, four times
};

struct Fp8Scales {
    static constexpr uint32_t first = 10, last = 246;
    Fp8Scale of[256];
    constexpr Fp8Scales() {
        for (uint32_t b = first; b <= last; b++) {
            of[b].factor = __builtin_bit_cast(float, (b + 8) << 23);
            of[b].to_size = (16 + (b - 7) % 2 * 8) * 0x01010101;
            of[b].to_top = ((b - 7) / 2 - 1) * 0x01010101;
        }
    }
};

constexpr Fp8Scales fp8_scales;

ALWAYS bool is_usual(uint32_t b) { return b >= Fp8Scales::first && b <= Fp8Scales::last; }

// The 32 codes of a scale byte.
template <bool past> ALWAYS bool fp8_codes(const uint8_t *codes, uint32_t b, U32 *out) {
    const __m256i loaded = _mm256_loadu_si256((const __m256i *)codes);
    if (!is_usual(b) || has_nan(sizes_of(loaded))) return false;
    const Floats factor = all_lanes(fp8_scales.of[b].factor);
    for (int at = 0; at < 32; at += 2 * lanes) {
        Floats first, second;
        from_e4m3(codes + at, first, second);
        put<past>(out + at, product(first, factor), product(second, factor));
    }
    return true;
}

// The bits of bf16 are 16 s + 128 (b - 7) under the sign, if s are the lower seven bits of a normal
// code. A subnormal code of value m, 1 to 7, has the bits of a normal one with s = m + small[m]. In
// bytes, with x = s + 16 + 8 ((b - 7) % 2): the lower byte is 16 x, the upper one
// x / 16 + (b - 7) / 2 - 1. Zero has no such bits and is set.
template <bool past> ALWAYS bool fp8_codes(const uint8_t *from, uint32_t b, U16 *out) {
    const __m256i loaded = _mm256_loadu_si256((const __m256i *)from);
    const __m256i codes = _mm256_permute4x64_epi64(loaded, 0xd8);  // as unpacking wants it
    const __m256i sizes = sizes_of(codes);
    if (!is_usual(b) || has_nan(sizes)) return false;
    const __m256i small = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -17, -10, -7, -4, -3, -2, -1, 0, 0, 0, 0, 0, 0, 0, 0));
    // From 16 on, where nothing is to be looked up, the sum has the upper bit.
    const __m256i place = _mm256_adds_epu8(sizes, _mm256_set1_epi8(0x70));
    const __m256i to_normal = _mm256_shuffle_epi8(small, place);
    const __m256i offset = _mm256_set1_epi32((int)fp8_scales.of[b].to_size);
    const __m256i x = _mm256_add_epi8(_mm256_add_epi8(sizes, offset), to_normal);
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i lower = _mm256_andnot_si256(nibble, _mm256_slli_epi16(x, 4));
    const __m256i upper = _mm256_add_epi8(_mm256_and_si256(_mm256_srli_epi16(x, 4), nibble),
                                          _mm256_set1_epi32((int)fp8_scales.of[b].to_top));
    const __m256i zero = _mm256_cmpeq_epi8(sizes, _mm256_setzero_si256());
    const __m256i sign = _mm256_xor_si256(codes, sizes);
    const __m256i low = _mm256_andnot_si256(zero, lower);
    const __m256i high = _mm256_or_si256(_mm256_andnot_si256(zero, upper), sign);
    store_bytes<past>(out, _mm256_unpacklo_epi8(low, high));
    store_bytes<past>(out + 16, _mm256_unpackhi_epi8(low, high));
    return true;
}

#else

template <bool past, class... Arguments> bool int8_row(Arguments...) { return false; }
template <bool past, class... Arguments> bool int4_row(Arguments...) { return false; }
template <bool past, class... Arguments> bool fp8_scaled_row(Arguments...) { return false; }
template <bool past, class... Arguments> bool fp8_codes(Arguments...) { return false; }

#endif

}  // namespace
}  // namespace engraphy::ENGRAPHY_LEVEL
