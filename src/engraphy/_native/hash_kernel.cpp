// Row addresses, compiled once per instruction set (kernels.hpp says what that forbids).
//
// The remainder mix mod p, for 0 <= mix < 2**63, without a division. With u = 2**-53:
//   z = (double(mix) * inverse), rounded. double(mix), inverse and the product are each off by a
//   factor of at most 1 +- u, so |z - mix/p| <= (mix/p) * ((1+u)**3 - 1) =: e. (It is less if the
//   product is fused into the next sum.)
//   Adding 2**52 + 2**51 leaves q = round-to-nearest(z) in the low bits of the mantissa, if
//   z < 2**51.
//   So |mix/p - q| <= 1/2 + e, and r = mix - q*p has |r| <= (1/2 + e) * p: below p if e < 1/2.
//   With mix < 2**63: e < 2**63 * 3.0000001 * 2**-53 / p < 1/2 for every p >= 6145. Then z < 2**51
//   holds too.
// So one addition of p is enough if r is negative. And since |r| < p < 2**31, the low 32 bits of r
// determine it, and 32-bit products are enough. As unsigned numbers, min(r, r + p) is that addition
// without a comparison. Each 64-bit lane carries its value in the low half with zeros above, so the
// lane needs no mask. Other primes (of tiny tables, or 2**31 and above) take the plain remainder.
//
// Plain stores: prefetching the lines of the output, and writing a tile past the caches, make a
// call faster only if the output is in no cache (by a third and a half), and slower if it is.
#include <float.h>
#include <stdint.h>
#include <string.h>

#include "hash.hpp"
#include "kernels.hpp"

namespace engraphy::ENGRAPHY_LEVEL {
namespace {

static_assert(FLT_EVAL_METHOD == 0, "the remainder needs doubles that are rounded at each step");

constexpr int tile = 64;  // tokens at a time: all that a tile needs stays in the first-level cache
static_assert(tile == hot_tile);
constexpr double magic = 6755399441055744.0;  // 2**52 + 2**51

template <int W> struct Vec {
    typedef double F64 __attribute__((vector_size(8 * W)));
    typedef uint64_t U64 __attribute__((vector_size(8 * W)));
    typedef uint32_t U32 __attribute__((vector_size(8 * W)));
};

template <class T> inline T load(const void *from) {
    T value;
    memcpy(&value, from, sizeof(T));
    return value;
}

// A tile's positions, after the longest - 1 positions before it. Truth values are masks: 0 or -1.
struct Window {
    int64_t x[max_order - 1 + tile];      // compressed ids, -1 = dead
    int64_t reset[max_order +
                  tile];  // nothing before this position may be seen from it or from later ones
};

struct Tile {
    int64_t terms[max_order][tile];  // terms[i][j] is x_i of token j
    uint64_t mix[tile];
    uint64_t mix_low[tile];
    double mix_f64[tile];
};

// Positions [at, at + count) of the window, and whether position at + count is reset by the last of
// them. A negative id that passed the check is absent history.
void resolve(const HashPlan &plan, Window &w, int at, const int64_t *ids, const uint8_t *live,
             const uint8_t *starts, int count) {
    int64_t *x = w.x + at, *reset = w.reset + at;
    const int32_t *map = plan.map;
    const int64_t stop = plan.stop;
    for (int j = 0; j < count; j++) {
        const bool dead = ids[j] < 0 || (live && !live[j]);
        x[j] = dead ? -1 : map ? map[ids[j]] : ids[j];
    }
    for (int j = 0; j < count; j++) reset[j + 1] = -(int64_t)((x[j] < 0) | (ids[j] == stop));
    if (starts)
        for (int j = 0; j < count; j++) reset[j] |= -(int64_t)(starts[j] != 0);
}

// The positions before token `at` of sequence b.
void begin(const HashPlan &plan, const HashCall &call, int64_t b, int64_t at, Window &w) {
    const int before = plan.longest - 1;
    const int past = at < before ? before - (int)at : 0;  // of these, in the history
    w.reset[0] = -1;
    if (call.history) {
        resolve(plan, w, 0, call.history + b * before + at, nullptr, nullptr, past);
    } else {
        for (int h = 0; h < past; h++) w.x[h] = w.reset[h + 1] = -1;
    }
    const int64_t k = b * call.tokens + at - (before - past);
    resolve(plan, w, past, call.ids + k, call.live ? call.live + k : nullptr,
            call.starts ? call.starts + k : nullptr, before - past);
}

void fill_terms(const HashPlan &plan, Window &w, int count, Tile &t) {
    const int before = plan.longest - 1;
    const int64_t *x = w.x + before, *reset = w.reset + before, filler = plan.filler;
    int64_t hidden[tile];
    for (int j = 0; j < count; j++) {
        hidden[j] = -(int64_t)(x[j] < 0);
        t.terms[0][j] = hidden[j] ? filler : x[j];
    }
    for (int i = 1; i <= before; i++)
        for (int j = 0; j < count; j++) {
            hidden[j] |= reset[j - i + 1];
            t.terms[i][j] = hidden[j] ? filler : x[j - i];
        }
    memmove(w.x, w.x + count, before * sizeof(int64_t));
    memmove(w.reset, w.reset + count, (before + 1) * sizeof(int64_t));
}

// (double)mix in steps that every instruction set has for vectors: the halves become the low
// mantissa bits of 2**84 and 2**52, the first difference is exact, the sum rounds once.
inline double to_double(uint64_t mix) {
    const double high = __builtin_bit_cast(double, mix >> 32 | 0x4530000000000000);
    const double low = __builtin_bit_cast(double, (mix & 0xffffffff) | 0x4330000000000000);
    return (high - 19342813118337666422669312.0) + low;  // 2**84 + 2**52
}

// Columns of one order for a whole tile: P vectors of W columns at a time, the rest with fewer or
// narrower ones.
template <int W, int P>
__attribute__((noinline)) void fast_columns(const Tile &t, int count, int heads,
                                            const uint64_t *primes, const double *inverses,
                                            const uint64_t *offsets, int64_t *out, int64_t stride) {
    using V = Vec<W>;
    int c = 0;
    for (; c + W * P <= heads; c += W * P) {
        typename V::U32 prime[P];
        typename V::F64 inverse[P];
        typename V::U64 offset[P];
        for (int p = 0; p < P; p++) {
            prime[p] = load<typename V::U32>(primes + c + p * W);
            inverse[p] = load<typename V::F64>(inverses + c + p * W);
            offset[p] = load<typename V::U64>(offsets + c + p * W);
        }
        int64_t *to = out + c;
        for (int j = 0; j < count; j++, to += stride) {
            const auto low = (typename V::U32)(t.mix_low[j] - typename V::U64{});
            for (int p = 0; p < P; p++) {
                const typename V::F64 shifted = t.mix_f64[j] * inverse[p] + magic;
                const typename V::U32 r = low - (typename V::U32)shifted * prime[p];
                const typename V::U32 r_plus = r + prime[p];
                const typename V::U64 row = (typename V::U64)(r < r_plus ? r : r_plus) + offset[p];
                memcpy(to + p * W, &row, sizeof(row));
            }
        }
    }
    if constexpr (W > 1 || P > 1)
        if (c < heads)
            fast_columns<(P > 1 ? W : W / 2), 1>(t, count, heads - c, primes + c, inverses + c,
                                                 offsets + c, out + c, stride);
}

void plain_columns(const Tile &t, int count, int heads, const uint64_t *primes,
                   const uint64_t *offsets, int64_t *out, int64_t stride) {
    for (int j = 0; j < count; j++)
        for (int c = 0; c < heads; c++)
            out[j * stride + c] = (int64_t)(t.mix[j] % primes[c] + offsets[c]);
}

// Rows of hot n-grams of one order, in place of those that were hashed.
void write_hot(const int64_t *slots, int count, int heads, int64_t first, int64_t *out,
               int64_t stride) {
    for (int j = 0; j < count; j++) {
        if (slots[j] < 0) continue;
        for (int c = 0; c < heads; c++) out[j * stride + c] = first + slots[j] * heads + c;
    }
}

void write_layer(const HashPlan &plan, int layer, Tile &t, int count, const int64_t *slots,
                 int64_t *out) {
    const int64_t columns = (int64_t)plan.order_count * plan.heads;
    const int64_t *multipliers = plan.multipliers + (int64_t)layer * plan.longest;
    for (int i = 0; i < plan.longest; i++) {
        const uint64_t m = (uint64_t)multipliers[i];
        for (int j = 0; j < count; j++) t.mix[j] = (i ? t.mix[j] : 0) ^ (uint64_t)t.terms[i][j] * m;
        for (int o = 0; o < plan.order_count; o++) {
            if (plan.orders[o] != i + 1) continue;
            const int64_t first = layer * columns + o * plan.heads;
            int64_t *target = out + o * plan.heads;
            if (!plan.fast[layer * plan.order_count + o]) {
                plain_columns(t, count, plan.heads, plan.primes + first, plan.offsets + first,
                              target, columns);
                if (plan.hot && plan.hot[o])
                    write_hot(slots + o * tile, count, plan.heads, plan.hot_first[layer], target,
                              columns);
                continue;
            }
            for (int j = 0; j < count; j++) {
                t.mix_low[j] = t.mix[j] & 0xffffffff;
                t.mix_f64[j] = to_double(t.mix[j]);
            }
            fast_columns<ENGRAPHY_LANES, 2>(t, count, plan.heads, plan.primes + first,
                                            plan.inverses + first, plan.offsets + first, target,
                                            columns);
            if (plan.hot && plan.hot[o])
                write_hot(slots + o * tile, count, plan.heads, plan.hot_first[layer], target,
                          columns);
        }
    }
}

// The first id out of range, sequence by sequence and history first; coded as the kernel's result.
int64_t first_bad(const HashPlan &plan, const HashCall &call) {
    const uint64_t vocab = (uint64_t)plan.vocab;
    const int64_t *ids = call.ids, *history = call.history, past = history ? plan.longest - 1 : 0;
    const uint8_t *live = call.live;
    bool bad = false;
    for (int64_t k = 0; k < call.batch * call.tokens; k++) bad |= (uint64_t)ids[k] >= vocab;
    for (int64_t k = 0; k < call.batch * past; k++) bad |= (uint64_t)history[k] >= vocab;
    for (int64_t b = 0; bad && b < call.batch; b++) {
        for (int64_t k = b * past; k < (b + 1) * past; k++)
            if (history[k] != -1 && (uint64_t)history[k] >= vocab) return -2 - k;
        for (int64_t k = b * call.tokens; k < (b + 1) * call.tokens; k++)
            if ((!live || live[k]) && (uint64_t)ids[k] >= vocab) return k;
    }
    return -1;
}

// Row ids of tokens [first, last); those of the layers lie layer_size apart.
void write_rows(const HashPlan &plan, const HashCall &call, int64_t first, int64_t last,
                int64_t layer_size) {
    const int64_t columns = (int64_t)plan.order_count * plan.heads, before = plan.longest - 1;
    Window window;
    Tile t;
    int64_t slots[max_order * tile];
    int count;
    for (int64_t k = first; k < last; k += count) {
        const int64_t b = k / call.tokens, at = k % call.tokens;
        const int64_t left = call.tokens - at < last - k ? call.tokens - at : last - k;
        count = (int)(left < tile ? left : tile);
        if (k == first || !at) begin(plan, call, b, at, window);
        resolve(plan, window, before, call.ids + k, call.live ? call.live + k : nullptr,
                call.starts ? call.starts + k : nullptr, count);
        fill_terms(plan, window, count, t);
        for (int o = 0; plan.hot && o < plan.order_count; o++)
            if (plan.hot[o]) hot_find(*plan.hot[o], t.terms[0], tile, count, slots + o * tile);
        for (int l = 0; l < call.layer_count; l++)
            write_layer(plan, call.first_layer + l, t, count, slots,
                        call.out + l * layer_size + (k - first) * columns);
    }
}

void mark_alive(const HashPlan &plan, const HashCall &call) {
    const int32_t *map = plan.map;
    for (int64_t k = 0; k < call.batch * call.tokens; k++)
        call.alive[k] = (!call.live || call.live[k]) && (!map || map[call.ids[k]] >= 0);
}

}  // namespace

int64_t hash(const HashPlan &plan, const HashCall &call) {
    const int64_t bad = first_bad(plan, call);
    if (bad != -1) return bad;
    const int64_t count = call.batch * call.tokens;
    if (call.alive) mark_alive(plan, call);
    if (call.out)
        write_rows(plan, call, 0, count, count * (int64_t)plan.order_count * plan.heads);
    return -1;
}

void hash_part(const HashPlan &plan, const HashCall &call, int64_t first, int64_t last) {
    write_rows(plan, call, first, last, (last - first) * (int64_t)plan.order_count * plan.heads);
}

}  // namespace engraphy::ENGRAPHY_LEVEL
