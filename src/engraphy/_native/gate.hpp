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

// How query and key of a stream match, and the factors of their norms.
template <class F> struct Match {
    F u, query, key;
};

// scale: [D], the factors of query norm times those of key norm.
template <class F, class X, class P>
inline Match<F> match_of(const X *x, const P *key, const F *scale, int64_t hidden, double eps) {
    Vector<F> dot = {}, x_squares = {}, key_squares = {};
    along<F>(hidden, [&](int64_t i, auto part) {
        const Vector<F> h = load(x + i, part), k = load(key + i, part);
        dot += h * load(scale + i, part) * k;
        x_squares += h * h;
        key_squares += k * k;
    });
    Match<F> out;
    out.query = rstd(total(x_squares), hidden, eps);
    out.key = rstd(total(key_squares), hidden, eps);
    out.u = total(dot) * out.query * out.key / root_of((F)hidden);
    return out;
}

}  // namespace engraphy::ENGRAPHY_LEVEL
