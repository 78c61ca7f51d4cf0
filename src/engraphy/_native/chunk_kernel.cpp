// The fusion layer for a chunk, forward and backward, compiled once per instruction set
// (kernels.hpp says what that forbids).
//
// One pass over the tokens of a piece each way. What a token's stream needs of its neighbours is
// one number each: a conv input is (gate * factor of the conv's norm) * value * conv_norm, so it is
// never stored. A piece computes its neighbours' numbers again; nothing depends on the threads.
#include <stdint.h>
#include <string.h>

#include "chunk.hpp"
#include "gate.hpp"
#include "kernels.hpp"

namespace engraphy::ENGRAPHY_LEVEL {
namespace {

// X and P are the types of the hidden states and of the projections.
template <class X, class P, class F> struct View {
    const Chunk &c;

    int64_t token(int64_t b, int64_t t) const { return b * c.tokens + t; }
    int64_t stream(int64_t b, int64_t t, int64_t s) const { return token(b, t) * c.streams + s; }
    bool live(int64_t b, int64_t t) const { return !c.live || c.live[token(b, t)]; }
    int64_t first(int64_t b, int64_t t) const { return c.first[token(b, t)]; }
    const X *x(int64_t n) const { return (const X *)c.x + n * c.hidden; }
    const P *key(int64_t n) const { return (const P *)c.key + n * c.hidden; }
    const P *value(int64_t b, int64_t t) const {
        return (const P *)c.value + token(b, t) * c.hidden;
    }
    F &gate(int64_t n) const { return ((F *)c.gate)[n]; }
    F *stats(int64_t n) const { return (F *)c.stats + n * stats_of_a_stream; }
    const F *scale(int64_t s) const { return (const F *)c.scale + s * c.hidden; }
    const F *conv_norm(int64_t s) const { return (const F *)c.conv_norm + s * c.hidden; }
    int64_t weight(int64_t tap, int64_t s) const { return (tap * c.streams + s) * c.hidden; }
    const F *conv(int64_t tap, int64_t s) const { return (const F *)c.conv + weight(tap, s); }
    const F *normed_conv(int64_t tap, int64_t s) const {
        return (const F *)c.normed_conv + weight(tap, s);
    }
    // t: from -W to -1.
    int64_t before(int64_t b, int64_t t, int64_t s) const {
        const int64_t window = c.window_size();
        return ((b * window + window + t) * c.streams + s) * c.hidden;
    }
    // Where among the returned conv inputs those of position t are; -1 = they are not returned.
    int64_t returned(int64_t b, int64_t t, int64_t s) const {
        const int64_t at = t - (c.tokens - c.columns);
        return at < 0 ? -1 : ((b * c.columns + at) * c.streams + s) * c.hidden;
    }
    // Whether they are returned as they are, not as zeros.
    bool seen_later(int64_t b, int64_t t) const {
        return !c.masked || !c.tokens || t >= first(b, c.tokens - 1);
    }
    // What the conv inputs of a token are to value * conv_norm.
    F input_factor(int64_t n) const { return gate(n) * stats(n)[3]; }
};

template <class F> F absolute(F x) { return x < 0 ? -x : x; }

// The numbers of one stream of a token: its gate and stats.
template <class F> struct Numbers {
    F gate, u, query, key, conv;
};

template <class X, class P, class F>
Numbers<F> numbers_of(const View<X, P, F> &v, int64_t b, int64_t t, int64_t s, F value_squares) {
    const Chunk &c = v.c;
    const int64_t n = v.stream(b, t, s);
    const Match<F> match = match_of(v.x(n), v.key(n), v.scale(s), c.hidden, c.eps);
    Numbers<F> out;
    out.u = match.u;
    out.query = match.query;
    out.key = match.key;
    out.gate = gate_of(out.u);
    out.conv = c.taps ? rstd(out.gate * out.gate * value_squares, c.hidden, c.conv_eps) : 0;
    return out;
}

// The taps of one stream's conv that see something: of earlier tokens of the chunk, each with
// values, weights and a factor, and of the window.
template <class P, class F> struct Taps {
    int count = 0, before = 0;
    const P *values[most_taps];
    const F *weights[most_taps];
    F factors[most_taps];
    int tap[most_taps];
    const F *window[most_taps], *window_weights[most_taps];
    int window_tap[most_taps];
};

// factor(t): of the conv inputs of a token, which is live.
template <class X, class P, class F, class Factor>
void find_taps(const View<X, P, F> &v, int64_t b, int64_t t, int64_t s, const Factor &factor,
               Taps<P, F> &out) {
    const Chunk &c = v.c;
    const int64_t first = v.first(b, t);
    out.count = out.before = 0;
    for (int tap = 0; tap < c.taps; tap++) {
        const int64_t then = t - (c.taps - 1 - tap) * c.dilation;
        if (then < first) continue;
        if (then < 0) {
            const int i = out.before++;
            out.window[i] = (const F *)c.window + v.before(b, then, s);
            out.window_weights[i] = v.conv(tap, s);
            out.window_tap[i] = tap;
        } else if (v.live(b, then)) {
            const int i = out.count++;
            out.values[i] = v.value(b, then);
            out.weights[i] = v.normed_conv(tap, s);
            out.factors[i] = factor(then);
            out.tap[i] = tap;
        }
    }
}

template <class P, class F, class Extent>
inline Vector<F> mixed_of(const Taps<P, F> &taps, int64_t i, Extent part) {
    Vector<F> mixed = {};
    for (int k = 0; k < taps.before; k++)
        mixed += load(taps.window[k] + i, part) * load(taps.window_weights[k] + i, part);
    for (int k = 0; k < taps.count; k++)
        mixed += load(taps.values[k] + i, part) * taps.factors[k] * load(taps.weights[k] + i, part);
    return mixed;
}

// --- forward

template <class X, class P, class F>
void write_inputs(const View<X, P, F> &v, int64_t b, int64_t t, int64_t s, F factor) {
    const int64_t at = v.returned(b, t, s);
    if (at < 0) return;
    F *to = (F *)v.c.inputs + at;
    const P *value = v.value(b, t);
    const F *norm = v.conv_norm(s);
    if (!v.live(b, t) || !v.seen_later(b, t)) {
        memset(to, 0, v.c.hidden * sizeof(F));
        return;
    }
    along<F>(v.c.hidden, [&](int64_t i, auto part) {
        store(to + i, load(value + i, part) * factor * load(norm + i, part), part);
    });
}

// The window's columns that are still in sight after a short chunk.
template <class X, class P, class F> void write_old_inputs(const View<X, P, F> &v, int64_t b) {
    const Chunk &c = v.c;
    for (int64_t t = c.tokens - c.columns; t < 0; t++)
        for (int64_t s = 0; s < c.streams; s++) {
            F *to = (F *)c.inputs + v.returned(b, t, s);
            if (c.window && v.seen_later(b, t))
                memcpy(to, (const F *)c.window + v.before(b, t, s), c.hidden * sizeof(F));
            else
                memset(to, 0, c.hidden * sizeof(F));
        }
}

template <class X, class P, class F>
void write_out(const View<X, P, F> &v, int64_t b, int64_t t, int64_t s, F gate,
               const Taps<P, F> &taps) {
    const Chunk &c = v.c;
    const int64_t n = v.stream(b, t, s);
    const X *x = v.x(n);
    X *out = (X *)c.out + n * c.hidden;
    const P *value = v.value(b, t);
    if (!v.live(b, t)) {
        if (c.residual) memcpy(out, x, c.hidden * sizeof(X));
        else memset(out, 0, c.hidden * sizeof(X));
        return;
    }
    along<F>(c.hidden, [&](int64_t i, auto part) {
        Vector<F> update = load(value + i, part) * gate;
        if (c.taps) {
            const Vector<F> mixed = mixed_of(taps, i, part);
            update += mixed / (exp_of(-mixed) + 1);
        }
        if (c.residual) update = load(x + i, part) + rounded(update, x);
        store(out + i, update, part);
    });
}

template <class X, class P, class F> void forward_piece(const Chunk &c, int64_t index) {
    const View<X, P, F> v{c};
    const int64_t b = index / c.pieces_of_a_sequence();
    const int64_t begin = index % c.pieces_of_a_sequence() * c.piece;
    const int64_t end = begin + c.piece < c.tokens ? begin + c.piece : c.tokens;
    const int64_t window = c.window_size();
    const int64_t warm = begin < window ? 0 : begin - window;  // the first token that is looked at
    F *factors = (F *)c.scratch;  // [tokens from `warm` on, S]
    Taps<P, F> taps;
    for (int64_t t = warm; t < end; t++) {
        const bool live = v.live(b, t);
        const F squares = live && c.taps ? squares_of(v.value(b, t), c.hidden) : 0;
        for (int64_t s = 0; s < c.streams; s++) {
            Numbers<F> numbers = {};
            if (live) numbers = numbers_of(v, b, t, s, squares);
            const F factor = numbers.gate * numbers.conv;
            factors[(t - warm) * c.streams + s] = factor;
            if (t < begin) continue;
            const int64_t n = v.stream(b, t, s);
            v.gate(n) = numbers.gate;
            F *stats = v.stats(n);
            stats[0] = numbers.u;
            stats[1] = numbers.query;
            stats[2] = numbers.key;
            stats[3] = numbers.conv;
            if (c.taps) {
                find_taps(
                    v, b, t, s,
                    [&](int64_t then) { return factors[(then - warm) * c.streams + s]; }, taps);
                write_inputs(v, b, t, s, factor);
            }
            write_out(v, b, t, s, numbers.gate, taps);
        }
    }
    if (!begin && c.taps) write_old_inputs(v, b);
}

// --- backward

// What a piece of the backward pass works with. Names as in the formula of plain.py: m is the
// conv's output, q the gradient of a conv input times conv_norm.
template <class X, class P, class F> struct Backward {
    const View<X, P, F> v;
    const int64_t b, begin, end;
    F *const ring;   // [W + 1, S, D]: gradients of m, of token t in place t % (W + 1)
    F *const q;      // [D]
    F *const value;  // [D]: gradient of the value
    F *const sums;   // of the piece

    F *m_grad(int64_t t, int64_t s) const {
        return ring + (t % (v.c.window_size() + 1) * v.c.streams + s) * v.c.hidden;
    }
    F *sum(int64_t row, int64_t s) const { return sums + v.weight(row, s); }
    const X *out_grad(int64_t n) const { return (const X *)v.c.out_grad + n * v.c.hidden; }
};

// The gradient of m for a token, and what its taps add to the sums of the conv.
template <class X, class P, class F>
void mix_back(const Backward<X, P, F> &w, int64_t t, int64_t s, Taps<P, F> &taps) {
    const View<X, P, F> &v = w.v;
    const Chunk &c = v.c;
    F *grad = w.m_grad(t, s);
    if (!v.live(w.b, t)) {
        memset(grad, 0, c.hidden * sizeof(F));
        return;
    }
    find_taps(
        v, w.b, t, s, [&](int64_t then) { return v.input_factor(v.stream(w.b, then, s)); }, taps);
    const X *out_grad = w.out_grad(v.stream(w.b, t, s));
    const bool own = t < w.end;  // else the next piece adds to the sums
    F *taps_sums[most_taps], *window_sums[most_taps];
    for (int k = 0; k < taps.count; k++) taps_sums[k] = w.sum(1 + taps.tap[k], s);
    for (int k = 0; k < taps.before; k++)
        window_sums[k] = w.sum(1 + c.taps + taps.window_tap[k], s);
    along<F>(c.hidden, [&](int64_t i, auto part) {
        const Vector<F> mixed = mixed_of(taps, i, part);
        const Vector<F> sigmoid = 1 / (exp_of(-mixed) + 1);
        const Vector<F> slope = sigmoid * (mixed * (1 - sigmoid) + 1);
        const Vector<F> m_grad = load(out_grad + i, part) * slope;
        store(grad + i, m_grad, part);
        if (!own) return;
        for (int k = 0; k < taps.count; k++) {
            const Vector<F> input = load(taps.values[k] + i, part) * taps.factors[k];
            store(taps_sums[k] + i, load(taps_sums[k] + i, part) + m_grad * input, part);
        }
        for (int k = 0; k < taps.before; k++) {
            const Vector<F> input = load(taps.window[k] + i, part);
            store(window_sums[k] + i, load(window_sums[k] + i, part) + m_grad * input, part);
        }
    });
}

// The later tokens whose conv sees position t, by the gradients of their m.
template <class F> struct Later {
    int count = 0;
    const F *grads[most_taps];
    const F *weights[most_taps];
};

template <class X, class P, class F>
void find_later(const Backward<X, P, F> &w, int64_t t, int64_t s, bool normed, Later<F> &out) {
    const View<X, P, F> &v = w.v;
    const Chunk &c = v.c;
    out.count = 0;
    for (int64_t tap = c.taps - 1; tap >= 0; tap--) {
        const int64_t then = t + (c.taps - 1 - tap) * c.dilation;
        if (then < 0) continue;
        if (then >= c.tokens) break;
        if (t < v.first(w.b, then)) continue;
        out.grads[out.count] = w.m_grad(then, s);
        out.weights[out.count++] = normed ? v.normed_conv(tap, s) : v.conv(tap, s);
    }
}

template <class F, class Extent>
inline Vector<F> from_later(const Later<F> &later, int64_t i, Extent part) {
    Vector<F> sum = {};
    for (int k = 0; k < later.count; k++)
        sum += load(later.grads[k] + i, part) * load(later.weights[k] + i, part);
    return sum;
}

// Gradients of the conv inputs that were returned for position t; null if there are none.
template <class X, class P, class F>
const F *returned_grad(const Backward<X, P, F> &w, int64_t t, int64_t s) {
    const Chunk &c = w.v.c;
    if (!c.inputs_grad || !w.v.seen_later(w.b, t)) return nullptr;
    const int64_t at = w.v.returned(w.b, t, s);
    return at < 0 ? nullptr : (const F *)c.inputs_grad + at;
}

// The gradient of the value, to which this stream is added, and of the gate.
template <class X, class P, class F>
F value_back(const Backward<X, P, F> &w, int64_t t, int64_t s, Later<F> &later) {
    const View<X, P, F> &v = w.v;
    const Chunk &c = v.c;
    const int64_t n = v.stream(w.b, t, s);
    const X *out_grad = w.out_grad(n);
    const P *value = v.value(w.b, t);
    const F gate = v.gate(n), factor = v.stats(n)[3];
    Vector<F> out_dot = {}, q_dot = {};
    if (c.taps) {
        find_later(w, t, s, true, later);
        const F *returned = returned_grad(w, t, s);
        const F *conv_norm = v.conv_norm(s);
        const F input_factor = gate * factor;
        F *norm_sum = c.inputs_grad ? w.sum(c.sum_rows() - 1, s) : nullptr;
        along<F>(c.hidden, [&](int64_t i, auto part) {
            const Vector<F> own = load(value + i, part);
            Vector<F> q = from_later(later, i, part);
            if (returned) {
                const Vector<F> more = load(returned + i, part);
                const Vector<F> sum = load(norm_sum + i, part) + more * own * input_factor;
                store(norm_sum + i, sum, part);
                q += more * load(conv_norm + i, part);
            }
            store(w.q + i, q, part);
            q_dot += q * own;
            out_dot += load(out_grad + i, part) * own;
        });
    } else {
        along<F>(c.hidden, [&](int64_t i, auto part) {
            out_dot += load(out_grad + i, part) * load(value + i, part);
        });
    }
    const F q_sum = total(q_dot);
    // The conv's norm is of gate * value: the gate scales it, so it gets a gradient through eps
    // only.
    const F cube = factor * factor * factor;
    const F along_value = cube * gate * gate * q_sum / c.hidden;
    along<F>(c.hidden, [&](int64_t i, auto part) {
        Vector<F> grad = load(out_grad + i, part);
        if (c.taps) grad += load(w.q + i, part) * factor - load(value + i, part) * along_value;
        store(w.value + i, load(w.value + i, part) + grad * gate, part);
    });
    return total(out_dot) + (F)c.conv_eps * cube * q_sum;
}

// Gradients of x, key and scale from that of the gate.
template <class X, class P, class F>
void gate_back(const Backward<X, P, F> &w, int64_t t, int64_t s, F gate_grad) {
    const View<X, P, F> &v = w.v;
    const Chunk &c = v.c;
    const int64_t n = v.stream(w.b, t, s);
    const F *stats = v.stats(n);
    const F gate = v.gate(n), u = stats[0], size = absolute(u);
    const F u_grad = size < (F)gate_floor ? 0 : gate_grad * gate * (1 - gate) / (2 * root_of(size));
    const F dot = u_grad * stats[1] * stats[2] / root_of((F)c.hidden);
    const F x_share = u_grad * u * stats[1] * stats[1] / c.hidden;
    const F key_share = u_grad * u * stats[2] * stats[2] / c.hidden;
    const X *x = v.x(n), *out_grad = w.out_grad(n);
    const P *key = v.key(n);
    const F *scale = v.scale(s);
    F *scale_sum = w.sum(0, s);
    X *x_grad = c.x_grad ? (X *)c.x_grad + n * c.hidden : nullptr;
    P *key_grad = (P *)c.key_grad + n * c.hidden;
    along<F>(c.hidden, [&](int64_t i, auto part) {
        const Vector<F> h = load(x + i, part), k = load(key + i, part);
        const Vector<F> factor = load(scale + i, part) * dot;
        store(key_grad + i, factor * h - k * key_share, part);
        store(scale_sum + i, load(scale_sum + i, part) + h * k * dot, part);
        if (!x_grad) return;
        Vector<F> grad = factor * k - h * x_share;
        if (c.residual) grad += load(out_grad + i, part);
        store(x_grad + i, grad, part);
    });
}

// A dead token: the residual alone.
template <class X, class P, class F> void skip_back(const Backward<X, P, F> &w, int64_t t) {
    const Chunk &c = w.v.c;
    const int64_t n = w.v.stream(w.b, t, 0), size = c.streams * c.hidden;
    memset((P *)c.key_grad + n * c.hidden, 0, size * sizeof(P));
    if (!c.x_grad) return;
    X *x_grad = (X *)c.x_grad + n * c.hidden;
    if (c.residual) memcpy(x_grad, w.out_grad(n), size * sizeof(X));
    else memset(x_grad, 0, size * sizeof(X));
}

template <class X, class P, class F>
void window_back(const Backward<X, P, F> &w, int64_t t, int64_t s) {
    const Chunk &c = w.v.c;
    Later<F> later;
    find_later(w, t, s, false, later);
    const F *returned = returned_grad(w, t, s);
    F *to = (F *)c.window_grad + w.v.before(w.b, t, s);
    along<F>(c.hidden, [&](int64_t i, auto part) {
        Vector<F> grad = from_later(later, i, part);
        if (returned) grad += load(returned + i, part);
        store(to + i, grad, part);
    });
}

template <class X, class P, class F> void backward_piece(const Chunk &c, int64_t index) {
    const int64_t window = c.window_size(), row = c.streams * c.hidden;
    const int64_t begin = index % c.pieces_of_a_sequence() * c.piece;
    const int64_t end = begin + c.piece < c.tokens ? begin + c.piece : c.tokens;
    F *ring = (F *)c.scratch;
    const Backward<X, P, F> w{{c},
                              index / c.pieces_of_a_sequence(),
                              begin,
                              end,
                              ring,
                              ring + (window + 1) * row,
                              ring + (window + 1) * row + c.hidden,
                              (F *)c.sums + index * c.sum_rows() * row};
    memset(w.sums, 0, c.sum_rows() * row * sizeof(F));
    Taps<P, F> taps;
    Later<F> later;
    const int64_t warm = end + window < c.tokens ? end + window : c.tokens;
    for (int64_t t = warm - 1; t >= begin; t--) {
        if (c.taps)
            for (int64_t s = 0; s < c.streams; s++) mix_back(w, t, s, taps);
        if (t >= end) continue;
        memset(w.value, 0, c.hidden * sizeof(F));
        if (w.v.live(w.b, t)) {
            for (int64_t s = 0; s < c.streams; s++) {
                F gate_grad = value_back(w, t, s, later);
                if (c.gate_grad) gate_grad += ((const F *)c.gate_grad)[w.v.stream(w.b, t, s)];
                gate_back(w, t, s, gate_grad);
            }
        } else {
            skip_back(w, t);
        }
        P *value_grad = (P *)c.value_grad + w.v.token(w.b, t) * c.hidden;
        along<F>(c.hidden, [&](int64_t i, auto part) {
            store(value_grad + i, load(w.value + i, part), part);
        });
    }
    if (begin || !c.window_grad) return;
    for (int64_t t = -1; t >= -window; t--)
        for (int64_t s = 0; s < c.streams; s++) window_back(w, t, s);
}

}  // namespace

void chunk_forward(const Chunk &c, int64_t index) {
    switch (c.kind) {
        case ChunkKind::f32_f32: return forward_piece<float, float, float>(c, index);
        case ChunkKind::f32_bf16: return forward_piece<float, Bf16, float>(c, index);
        case ChunkKind::bf16_bf16: return forward_piece<Bf16, Bf16, float>(c, index);
        case ChunkKind::bf16_f32: return forward_piece<Bf16, float, float>(c, index);
        case ChunkKind::f64_f64: return forward_piece<double, double, double>(c, index);
    }
}

void chunk_backward(const Chunk &c, int64_t index) {
    switch (c.kind) {
        case ChunkKind::f32_f32: return backward_piece<float, float, float>(c, index);
        case ChunkKind::f32_bf16: return backward_piece<float, Bf16, float>(c, index);
        case ChunkKind::bf16_bf16: return backward_piece<Bf16, Bf16, float>(c, index);
        case ChunkKind::bf16_f32: return backward_piece<Bf16, float, float>(c, index);
        case ChunkKind::f64_f64: return backward_piece<double, double, double>(c, index);
    }
}

}  // namespace engraphy::ENGRAPHY_LEVEL
