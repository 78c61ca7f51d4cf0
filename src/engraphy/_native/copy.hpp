// Copies of rows. For kernel files: each instruction set has its own.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace engraphy::ENGRAPHY_LEVEL {
namespace {

// What is called with a size that is a constant becomes straight code.
#define ALWAYS inline __attribute__((always_inline))

constexpr int wide = ENGRAPHY_LANES * 8;

typedef uint8_t Wide __attribute__((vector_size(wide), aligned(1), may_alias));

ALWAYS void copy(uint8_t *to, const uint8_t *from, int64_t size) {
    if (size < wide) {
        memcpy(to, from, size);
        return;
    }
    for (int64_t at = 0; at + wide <= size; at += wide)
        *(Wide *)(to + at) = *(const Wide *)(from + at);
    *(Wide *)(to + size - wide) = *(const Wide *)(from + size - wide);
}

// Whole lines, to where a line begins, past the caches. `streamed` has to follow before others may
// look.
ALWAYS void stream(uint8_t *to, const uint8_t *from, int64_t size) {
#if defined(__AVX512F__)
    for (int64_t at = 0; at < size; at += 64)
        _mm512_stream_si512((__m512i *)(to + at), _mm512_loadu_si512(from + at));
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

template <bool past> ALWAYS void copy_to(uint8_t *to, const uint8_t *from, int64_t size) {
    past ? stream(to, from, size) : copy(to, from, size);
}

inline void streamed() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

}  // namespace
}  // namespace engraphy::ENGRAPHY_LEVEL
