// Gather and dequantise, compiled once per instruction set (kernels.hpp says what that forbids).
//
// One row after the other, straight from mapped memory into the output. Rows of small codes are
// dequantised in registers (registers.hpp, and blocks.hpp for the kinds of GGUF files). The plain loops here say what their values are; they
// do what is left. The compiler turns them into the vectors of each level. The comparisons below
// are of 32 bits, so that it does not narrow masks to bytes and widen them again.
//
// A large output of whole lines is written past the caches.
//
// Why the bits are those of the plain version:
//   Codes are exact in float32 and multiplied by their scale once. The file is compiled without
//   contraction.
//   e4m3 and f16 are widened as bits. Their subnormals are differences of two normal float32
//   numbers, so a mode that flushes subnormals does not change them. A signalling NaN of f16 stays
//   one, as in numpy's conversion (the F16C instructions would quiet it).
//   A product of two NaNs has to keep the code's NaN, and the compiler decides which one is kept.
//   So there is no multiplication if a scale is NaN.
#include <float.h>
#include <stdint.h>
#include <string.h>

#include "bf16.hpp"
#include "blocks.hpp"
#include "copy.hpp"
#include "kernels.hpp"
#include "mapped.hpp"
#include "registers.hpp"
#include "rows.hpp"
#include "widened.hpp"

namespace engraphy::ENGRAPHY_LEVEL {
namespace {

static_assert(FLT_EVAL_METHOD == 0, "products have to be rounded to float32 at once");

// What becomes of the bits of a float32. of_clean: the same for numbers, infinities, and NaNs whose
// low half is zero.
struct ToF32 {
    typedef U32 Bits;
    static uint32_t of(uint32_t bits) { return bits; }
    static uint32_t of_clean(uint32_t bits) { return bits; }
};

struct ToBf16 {
    typedef U16 Bits;
    static uint16_t of(uint32_t bits) { return bf16_of(bits); }
    static uint16_t of_clean(uint32_t bits) { return bf16_rounded(bits); }
};

inline uint32_t from_e4m3(uint32_t code) {
    const uint32_t wide = (code & 0x7f) << 20;
    return (code & 0x80) << 24 | (wide == 0x7fu << 20 ? quiet_nan : widened<120>(wide));
}

// A kind of row: the bytes of d values, and their way into `out`. `plain` says what the values are;
// it is not inlined, so that the compiler sees to the other way.
#define PLAIN static __attribute__((noinline)) void

struct F32 {
    static int64_t row_bytes(int64_t d) { return 4 * d; }
    template <class To, bool past>
    static void decode(const uint8_t *row, typename To::Bits *__restrict out, int64_t d, float) {
        const U32 *bits = (const U32 *)row;
        if constexpr (sizeof(*out) == sizeof(*bits)) copy_to<past>((uint8_t *)out, row, 4 * d);
        else for (int64_t i = 0; i < d; i++) out[i] = To::of(bits[i]);
    }
};

struct F16 {
    static int64_t row_bytes(int64_t d) { return 2 * d; }
    template <class To, bool past>
    static void decode(const uint8_t *row, typename To::Bits *__restrict out, int64_t d, float) {
        const U16 *half = (const U16 *)row;
        for (int64_t i = 0; i < d; i++) out[i] = To::of(from_f16(half[i]));
    }
};

struct Bf16 {
    static int64_t row_bytes(int64_t d) { return 2 * d; }
    template <class To, bool past>
    static void decode(const uint8_t *row, typename To::Bits *__restrict out, int64_t d, float) {
        const U16 *bits = (const U16 *)row;
        if constexpr (sizeof(*out) == sizeof(*bits))  // signalling NaNs stay as they are
            copy_to<past>((uint8_t *)out, row, 2 * d);
        else for (int64_t i = 0; i < d; i++) out[i] = To::of((uint32_t)bits[i] << 16);
    }
};

struct Fp8 {
    static int64_t row_bytes(int64_t d) { return d + d / fp8_block; }
    template <class To>
    PLAIN plain(const uint8_t *codes, uint32_t exponent, typename To::Bits *__restrict out) {
        if (exponent == 255) {
            for (int i = 0; i < fp8_block; i++)
                out[i] = To::of(quiet_nan |
                                ((codes[i] & 0x7f) == 0x7f ? (codes[i] & 0x80u) << 24 : 0));
            return;
        }
        const float scale = as_float(exponent ? exponent << 23 : 1u << 22);  // 2**-127 is subnormal
        for (int i = 0; i < fp8_block; i++)
            out[i] = To::of_clean(bits_of(as_float(from_e4m3(codes[i])) * scale));
    }
    template <class To, bool past>
    static void decode(const uint8_t *row, typename To::Bits *__restrict out, int64_t d, float) {
        for (int64_t block = 0; block < d / fp8_block; block++, out += fp8_block) {
            const uint8_t *codes = row + block * fp8_block;
            const uint32_t exponent = row[d + block];
            if (!fp8_codes<past>(codes, exponent, out)) plain<To>(codes, exponent, out);
        }
    }
};

struct Fp8Scaled {
    static int64_t row_bytes(int64_t d) { return d; }
    template <class To>
    PLAIN plain(const uint8_t *row, typename To::Bits *__restrict out, int64_t d, float scale) {
        for (int64_t i = 0; i < d; i++)
            out[i] = To::of_clean(bits_of(as_float(from_e4m3(row[i])) * scale));
    }
    template <class To, bool past>
    static void decode(const uint8_t *row, typename To::Bits *__restrict out, int64_t d,
                       float scale) {
        if (!fp8_scaled_row<past>(row, out, d, scale)) plain<To>(row, out, d, scale);
    }
};

// The f16 scale of a row of integers. If it is NaN, so is every value, made quiet: then `out` is
// filled.
template <class To>
bool nan_scale(const uint8_t *at, typename To::Bits *out, int64_t d, float &scale) {
    const uint32_t bits = from_f16(*(const U16 *)at);
    scale = as_float(bits);
    if ((bits & 0x7fffffff) <= 0x7f800000) return false;
    for (int64_t i = 0; i < d; i++) out[i] = To::of(bits | 0x400000);
    return true;
}

struct Int8 {
    static int64_t row_bytes(int64_t d) { return d + 2; }
    template <class To>
    PLAIN plain(const uint8_t *row, typename To::Bits *__restrict out, int64_t d) {
        float scale;
        if (nan_scale<To>(row + d, out, d, scale)) return;
        for (int64_t i = 0; i < d; i++)
            out[i] = To::of_clean(bits_of((float)(int8_t)row[i] * scale));
    }
    template <class To, bool past>
    static void decode(const uint8_t *row, typename To::Bits *__restrict out, int64_t d, float) {
        if (!int8_row<past>(row, out, d)) plain<To>(row, out, d);
    }
};

struct Int4 {
    static int64_t row_bytes(int64_t d) { return d / 2 + 2; }
    template <class To>
    PLAIN plain(const uint8_t *row, typename To::Bits *__restrict out, int64_t d) {
        float scale;
        if (nan_scale<To>(row + d / 2, out, d, scale)) return;
        for (int64_t i = 0; i < d / 2; i++) {
            out[2 * i] = To::of_clean(bits_of((float)((int8_t)(row[i] << 4) >> 4) * scale));
            out[2 * i + 1] = To::of_clean(bits_of((float)((int8_t)row[i] >> 4) * scale));
        }
    }
    template <class To, bool past>
    static void decode(const uint8_t *row, typename To::Bits *__restrict out, int64_t d, float) {
        if (!int4_row<past>(row, out, d)) plain<To>(row, out, d);
    }
};

template <class Kind, class To, bool past>
__attribute__((noinline)) void read_all(const RowsCall &call) {
    const int64_t d = call.d, row_bytes = Kind::row_bytes(d), last = call.last;
    typename To::Bits *out = (typename To::Bits *)call.out + call.first * d;
    ComingRows<RowsCall> rows(call, row_bytes);
    for (int64_t i = call.first; i < last; i++, out += d) {
        const uint8_t *row = rows.at(i);
        if (!past && i + 1 < last) prefetch_to_write(out + d, d * sizeof(*out));
        Kind::template decode<To, past>(row, out, d, call.scale);
    }
}

template <class To, bool past> void read_kind(const RowsCall &call) {
    switch (call.kind) {
        case RowKind::f32: return read_all<F32, To, past>(call);
        case RowKind::f16: return read_all<F16, To, past>(call);
        case RowKind::bf16: return read_all<Bf16, To, past>(call);
        case RowKind::fp8: return read_all<Fp8, To, past>(call);
        case RowKind::fp8_scaled: return read_all<Fp8Scaled, To, past>(call);
        case RowKind::int8: return read_all<Int8, To, past>(call);
        case RowKind::int4: return read_all<Int4, To, past>(call);
        case RowKind::q8_0: return read_all<Blocks<Q8_0>, To, past>(call);
        case RowKind::q4_0: return read_all<Blocks<Q4_0>, To, past>(call);
        case RowKind::iq4_nl: return read_all<Blocks<Iq4Nl>, To, past>(call);
        case RowKind::mxfp4: return read_all<Blocks<Mxfp4>, To, past>(call);
        case RowKind::q2_k: return read_all<Blocks<Q2K>, To, past>(call);
        case RowKind::q3_k: return read_all<Blocks<Q3K>, To, past>(call);
        case RowKind::q4_k: return read_all<Blocks<Q4K>, To, past>(call);
        case RowKind::q5_k: return read_all<Blocks<Q5K>, To, past>(call);
    }
}

template <class To> void read_to(const RowsCall &call) {
    const bool whole_lines =
        (uintptr_t)call.out % line == 0 && call.d * sizeof(typename To::Bits) % line == 0;
    if (call.stream && whole_lines) {
        read_kind<To, true>(call);
        streamed();
    } else {
        read_kind<To, false>(call);
    }
}

}  // namespace

int64_t first_bad(const int64_t *unaligned, int64_t count, int64_t rows) {
    const I64 *ids = (const I64 *)unaligned;
    bool bad = false;
    for (int64_t i = 0; i < count; i++) bad |= (uint64_t)ids[i] >= (uint64_t)rows;
    for (int64_t i = 0; bad && i < count; i++)
        if ((uint64_t)ids[i] >= (uint64_t)rows) return i;
    return -1;
}

void read_rows(const RowsCall &call) {
    call.to_bf16 ? read_to<ToBf16>(call) : read_to<ToF32>(call);
}

}  // namespace engraphy::ENGRAPHY_LEVEL
