// The steps of the fusion's formula that its kernels share.
#pragma once

#include "vectors.hpp"

namespace engraphy::ENGRAPHY_LEVEL {

constexpr double gate_floor = 1e-6;

// The factor of an RMS norm, from the sum of squares.
template <class F> inline F rstd(F squares, int64_t hidden, double eps) {
    return 1 / root_of(squares / hidden + (F)eps);
}

// The gate, from the scaled product of query and key.
template <class F> inline F gate_of(F product) {
    const F size = product < 0 ? -product : product;
    const F root = root_of(size < (F)gate_floor ? (F)gate_floor : size);  // a NaN stays one
    return 1 / (1 + exp_of(product > 0 ? -root : product < 0 ? root : root * 0));
}

}  // namespace engraphy::ENGRAPHY_LEVEL
