// Bits of narrow floats as bits of float32. For kernel files: each instruction set has its own copy.
#pragma once

#include <stdint.h>

#include "bf16.hpp"

namespace engraphy::ENGRAPHY_LEVEL {
namespace {

constexpr uint32_t quiet_nan = 0x7fc00000;

// The bits of a float32 v from the exponent and mantissa bits of a narrower format, shifted to
// where float32 has them; `bias` is the difference of the biases. b = 2**(bias - 126) is the
// smallest normal number of the narrower format.
//   v >= b: normal = v,            small = 2v - b >= v
//   v < b:  normal = (v + b) / 2,  small = v
// So v is the smaller one. Neither is negative: they are ordered as their bits are.
template <uint32_t bias> inline uint32_t widened(uint32_t bits) {
    const uint32_t small =
        bits_of(as_float(bits + ((bias + 1) << 23)) - as_float((bias + 1) << 23));
    const uint32_t normal = bits + (bias << 23);
    return small < normal ? small : normal;
}

inline uint32_t from_f16(uint32_t half) {
    const uint32_t wide = (half & 0x7fff) << 13;
    const uint32_t not_finite = wide < 0x7c00u << 13 ? 0 : 112u << 23;
    return (half & 0x8000) << 16 | (widened<112>(wide) + not_finite);
}

}  // namespace
}  // namespace engraphy::ENGRAPHY_LEVEL
