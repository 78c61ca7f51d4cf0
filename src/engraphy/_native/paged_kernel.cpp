// The fusion layer over a paged cache of conv inputs, compiled once per instruction set
// (kernels.hpp says what that forbids).
#include <stdint.h>
#include <string.h>

#include "gate.hpp"
#include "kernels.hpp"

namespace engraphy::ENGRAPHY_LEVEL {
namespace {

// A token. S is the type of the hidden states and of the projections.
template <class S> struct Token {
    const PagedCall &call;
    const int64_t n;

    const PagedPlan &plan() const { return call.plan; }
    bool live() const { return !call.live || call.live[n]; }
    int64_t at(int64_t s) const { return (n * plan().streams + s) * plan().hidden; }
    const S *x(int64_t s) const { return (const S *)call.x + at(s); }
    S *out(int64_t s) const { return (S *)call.out + at(s); }
    const S *key(int64_t s) const {
        return (const S *)call.key + n * call.stride + s * plan().hidden;
    }
    const S *value() const { return (const S *)call.value + n * call.stride; }
    float &gate(int64_t s) const { return call.gate[n * plan().streams + s]; }
    // The line of a tap; null = zeros.
    float *line(int64_t tap, int64_t s) const {
        const int64_t offset = call.offsets[n * plan().taps + tap];
        return offset < 0 ? nullptr : call.cache + offset + s * plan().hidden;
    }
};

template <class S> void write_inputs(const Token<S> &token, int64_t s, float squares) {
    const PagedPlan &plan = token.plan();
    const float gate = token.gate(s);
    const float factor = gate * rstd(gate * gate * squares, plan.hidden, plan.conv_eps);
    const float *norm = plan.conv_norm + s * plan.hidden;
    float *to = token.line(plan.taps - 1, s);
    along<float>(plan.hidden, [&](int64_t i, auto part) {
        store(to + i, load(token.value() + i, part) * factor * load(norm + i, part), part);
    });
}

template <class S> void inputs_of(const PagedCall &call, int64_t first, int64_t last) {
    const PagedPlan &plan = call.plan;
    for (int64_t n = first; n < last; n++) {
        const Token<S> token{call, n};
        const bool live = token.live();
        const float squares = live && plan.taps ? squares_of(token.value(), plan.hidden) : 0;
        for (int64_t s = 0; s < plan.streams; s++) {
            if (live) {
                const float *scale = plan.scale + s * plan.hidden;
                token.gate(s) = gate_of(
                    match_of(token.x(s), token.key(s), scale, plan.hidden, plan.eps).u);
                if (plan.taps) write_inputs(token, s, squares);
            } else if (plan.taps) {
                memset(token.line(plan.taps - 1, s), 0, plan.hidden * sizeof(float));
            }
        }
    }
}

template <class S> void write_out(const Token<S> &token, int64_t s) {
    const PagedPlan &plan = token.plan();
    const S *x = token.x(s);
    S *out = token.out(s);
    if (!token.live()) {
        memcpy(out, x, plan.hidden * sizeof(S));
        return;
    }
    const float *lines[most_taps], *weights[most_taps];
    int seen = 0;
    for (int64_t tap = 0; tap < plan.taps; tap++) {
        const float *line = token.line(tap, s);
        if (!line) continue;
        lines[seen] = line;
        weights[seen++] = plan.conv + (tap * plan.streams + s) * plan.hidden;
    }
    const float gate = token.gate(s);
    along<float>(plan.hidden, [&](int64_t i, auto part) {
        Vector<float> update = load(token.value() + i, part) * gate;
        if (plan.taps) {
            Vector<float> mixed = {};
            for (int k = 0; k < seen; k++)
                mixed += load(lines[k] + i, part) * load(weights[k] + i, part);
            update += mixed / (exp_of(-mixed) + 1);
        }
        store(out + i, load(x + i, part) + rounded(update, x), part);
    });
}

template <class S> void outs_of(const PagedCall &call, int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n++)
        for (int64_t s = 0; s < call.plan.streams; s++) write_out(Token<S>{call, n}, s);
}

}  // namespace

void paged_inputs(const PagedCall &call, int64_t first, int64_t last) {
    if (call.plan.bf16) inputs_of<Bf16>(call, first, last);
    else inputs_of<float>(call, first, last);
}

void paged_outs(const PagedCall &call, int64_t first, int64_t last) {
    if (call.plan.bf16) outs_of<Bf16>(call, first, last);
    else outs_of<float>(call, first, last);
}

}  // namespace engraphy::ENGRAPHY_LEVEL
