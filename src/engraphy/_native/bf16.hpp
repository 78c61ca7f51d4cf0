// bfloat16 and the bits of float32. For the files that are compiled once per instruction set.
#pragma once

#include <stdint.h>

namespace engraphy::ENGRAPHY_LEVEL {

inline float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t bits_of(float value) { return __builtin_bit_cast(uint32_t, value); }

// From the bits of a float32, to nearest even. rounded: of numbers, infinities, and NaNs whose low
// half is zero.
inline uint16_t bf16_rounded(uint32_t bits) {
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The same for any NaN too: it is made quiet and keeps its sign.
inline uint16_t bf16_of(uint32_t bits) {
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : bf16_rounded(bits));
}

}  // namespace engraphy::ENGRAPHY_LEVEL
