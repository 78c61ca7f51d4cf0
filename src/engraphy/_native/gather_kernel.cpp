// Rows of mapped memory as they are, compiled once per instruction set (see kernels.hpp for what that forbids).
//
// Rows some way ahead are prefetched. A large output of whole cache lines is written past the caches, which it would
// sweep clean for nothing. That pays only where each row begins and ends with a line: putting other rows together in
// lines first costs more than it gains. The sizes that rows usually have are constants for the compiler: with loops of a
// length that only the call tells, a row of 256 bytes takes 1.4 times as long.
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.hpp"
#include "mapped.hpp"

namespace engraphy::ENGRAPHY_LEVEL {
namespace {

#define ALWAYS inline __attribute__((always_inline))

constexpr int ahead = 8;  // rows that are on their way
constexpr int wide = ENGRAPHY_LANES * 8;

typedef uint8_t Wide __attribute__((vector_size(wide), aligned(1), may_alias));

ALWAYS void copy(uint8_t *to, const uint8_t *from, int64_t size) {
    if (size < wide) {
        memcpy(to, from, size);
        return;
    }
    for (int64_t at = 0; at + wide <= size; at += wide) *(Wide *)(to + at) = *(const Wide *)(from + at);
    *(Wide *)(to + size - wide) = *(const Wide *)(from + size - wide);
}

// Whole lines, to where a line begins.
ALWAYS void stream(uint8_t *to, const uint8_t *from, int64_t size) {
#if defined(__AVX512F__)
    for (int64_t at = 0; at < size; at += 64) _mm512_stream_si512((__m512i *)(to + at), _mm512_loadu_si512(from + at));
#elif defined(__AVX2__)
    for (int64_t at = 0; at < size; at += 32)
        _mm256_stream_si256((__m256i *)(to + at), _mm256_loadu_si256((const __m256i *)(from + at)));
#elif defined(__SSE2__)
    for (int64_t at = 0; at < size; at += 16)
        _mm_stream_si128((__m128i *)(to + at), _mm_loadu_si128((const __m128i *)(from + at)));
#else
    copy(to, from, size);
#endif
}

template <bool streamed> ALWAYS void each_row(const GatherCall &call, int64_t row_bytes) {
    const int64_t last = call.last;
    uint8_t *out = call.out + call.first * row_bytes;
    const uint8_t *coming[ahead];
    for (int64_t i = call.first; i < call.first + ahead && i < last; i++)
        coming[i % ahead] = prefetched(row_at(call, i, row_bytes), row_bytes);
    for (int64_t i = call.first; i < last; i++, out += row_bytes) {
        const uint8_t *row = coming[i % ahead];
        if (i + ahead < last) coming[i % ahead] = prefetched(row_at(call, i + ahead, row_bytes), row_bytes);
        if (streamed) stream(out, row, row_bytes);
        else copy(out, row, row_bytes);
    }
}

template <bool streamed> void all_rows(const GatherCall &call) {
    switch (call.row_bytes) {
    case 64: return each_row<streamed>(call, 64);
    case 128: return each_row<streamed>(call, 128);
    case 256: return each_row<streamed>(call, 256);
    case 512: return each_row<streamed>(call, 512);
    case 160: return each_row<false>(call, 160);  // no whole lines: never streamed
    case 264: return each_row<false>(call, 264);
    default: return each_row<streamed>(call, call.row_bytes);
    }
}

}  // namespace

void gather_rows(const GatherCall &call) {
    if (call.stream && call.row_bytes % line == 0 && (uintptr_t)call.out % line == 0) {
        all_rows<true>(call);
#if defined(__SSE2__)
        _mm_sfence();
#endif
    } else {
        all_rows<false>(call);
    }
}

}  // namespace engraphy::ENGRAPHY_LEVEL
