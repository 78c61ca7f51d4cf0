// Updates of rows from the gradients of a step, compiled once per instruction set (kernels.hpp says
// what that forbids).
//
// First a survey of the gradients: those of rows that have several are summed, and what is not
// finite is found before anything is written. Then one pass over rows and moments, which are
// updated where they lie. What lies some way ahead is prefetched.
//
// Why the bits are those of the plain version: each value is computed by the same operations in the
// same order, roots and quotients are exact, and the file is compiled without contraction.
#include <float.h>
#include <stdint.h>
#include <string.h>

#include "column_blocks.hpp"
#include "copy.hpp"
#include "kernels.hpp"
#include "mapped.hpp"
#include "update.hpp"

namespace engraphy::ENGRAPHY_LEVEL {
namespace {

static_assert(FLT_EVAL_METHOD == 0, "each operation has to be rounded to float32 at once");

// Distances of prefetches, in rows or gradients. First far ahead into the second cache, which has
// room for more misses under way than the first has; rows then near into the first. Gradients are
// read by the survey as fast as from the second cache without that.
constexpr int far_rows = 24, near_rows = 2;
constexpr int far_grads = 32;
constexpr int64_t far_bytes = 128 << 10;  // at most, of rows that are large
constexpr unsigned ring = 32;             // a power of two above the distances

// Rounding to nearest and subnormal numbers, whatever the caller's thread has chosen.
class Arithmetic {
  public:
#if defined(__SSE2__)
    Arithmetic() : before_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(0x1f80); }
    ~Arithmetic() { __builtin_ia32_ldmxcsr(before_); }

  private:
    const unsigned before_;
#endif
};

// The rules. Each updates one row and its moments; `key` is of the row.

template <class Row, class Moment> struct Adam {
    static constexpr bool random = Row::random || Moment::random;
    static int64_t width(int64_t d) { return 2 * d; }

    ALWAYS static void update(const UpdateCall &call, const uint8_t *grad, uint8_t *row,
                              uint8_t *mean, int64_t d, uint64_t key) {
        uint8_t *const square = mean + Moment::size * d;
        const float decay = call.factors[0], square_decay = call.factors[1];
        const float rate = call.factors[2], eps = call.factors[3], scale = call.scale;
        by_blocks(d, [&](int64_t column, int count) __attribute__((always_inline)) {
            Block g, m, v, moved;
            Bits random = {};
            load(grad + 4 * column, count, g);
            Moment::get(mean + Moment::size * column, count, m);
            Moment::get(square + Moment::size * column, count, v);
            Row::get(row + Row::size * column, count, moved);
            g *= scale;
            m += decay * (g - m);
            v += square_decay * (g * g - v);
            if (Moment::random) random_bits(key, (uint32_t)column + parts_apart, random);
            Moment::put(mean + Moment::size * column, count, m, random & 0xffff);
            Moment::put(square + Moment::size * column, count, v, random >> 16);
            take_root(v);
            moved -= rate * m / (v + eps);
            if (Row::random) random_bits(key, (uint32_t)column, random);
            Row::put(row + Row::size * column, count, moved, random & 0xffff);
        });
    }
};

template <class Row, class Moment> struct Nesterov {
    static constexpr bool random = Row::random || Moment::random;
    static int64_t width(int64_t d) { return d; }

    ALWAYS static void update(const UpdateCall &call, const uint8_t *grad, uint8_t *row,
                              uint8_t *velocity, int64_t d, uint64_t key) {
        const float momentum = call.factors[0], rate = call.factors[1], scale = call.scale;
        by_blocks(d, [&](int64_t column, int count) __attribute__((always_inline)) {
            Block g, v, moved;
            Bits random = {};
            load(grad + 4 * column, count, g);
            Moment::get(velocity + Moment::size * column, count, v);
            Row::get(row + Row::size * column, count, moved);
            g *= scale;
            v = v * momentum + g;
            if (Moment::random) random_bits(key, (uint32_t)column + parts_apart, random);
            Moment::put(velocity + Moment::size * column, count, v, random & 0xffff);
            moved -= rate * (g + momentum * v);
            if (Row::random) random_bits(key, (uint32_t)column, random);
            Row::put(row + Row::size * column, count, moved, random & 0xffff);
        });
    }
};

template <class Row, class Moment> struct Adagrad {
    static constexpr bool random = Row::random;
    static int64_t width(int64_t) { return 1; }

    ALWAYS static void update(const UpdateCall &call, const uint8_t *grad, uint8_t *row,
                              uint8_t *moment, int64_t d, uint64_t key) {
        const float lr = call.factors[0], eps = call.factors[1], scale = call.scale;
        Block squares = {};
        by_blocks(d, [&](int64_t column, int count) __attribute__((always_inline)) {
            Block g;
            load(grad + 4 * column, count, g);
            g *= scale;
            squares += g * g;
        });
        float sum;
        memcpy(&sum, moment, sizeof(sum));
        sum += folded(squares) / (float)d;
        memcpy(moment, &sum, sizeof(sum));
        const float rate = lr / (__builtin_sqrtf(sum) + eps);
        by_blocks(d, [&](int64_t column, int count) __attribute__((always_inline)) {
            Block g, moved;
            Bits random = {};
            load(grad + 4 * column, count, g);
            Row::get(row + Row::size * column, count, moved);
            moved -= rate * (g * scale);
            if (Row::random) random_bits(key, (uint32_t)column, random);
            Row::put(row + Row::size * column, count, moved, random & 0xffff);
        });
    }
};

// Where things lie.

inline const uint8_t *gradient(const Runs &runs, int64_t k) {
    int64_t position = runs.order ? runs.order[k] : k, entry = 0;
    for (int64_t above = runs.entries; entry + 1 < above;) {
        const int64_t middle = (entry + above) / 2;
        (runs.firsts[middle] <= position ? entry : above) = middle;
    }
    return (const uint8_t *)runs.grads[entry] + (position - runs.firsts[entry]) * runs.d * 4;
}

inline int64_t begin_of(const Runs &runs, int64_t u) { return runs.starts ? runs.starts[u] : u; }

inline uint8_t *record(const Place &place, const int64_t *ids, int64_t u, int64_t bytes) {
    const uint64_t row = (uint64_t)(place.compact ? u : ids[u]);
    if (place.rows <= place.shard_rows) return (uint8_t *)place.shards[0] + row * bytes;
    const uint64_t shard = row / (uint64_t)place.shard_rows;
    return (uint8_t *)place.shards[shard] + (row - shard * place.shard_rows) * bytes;
}

// Each line once: to ask again would take a place of those under way. level: 3 = to the first
// cache, 2 = to the second.
template <int level> ALWAYS void prefetch(const uint8_t *at, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += line) __builtin_prefetch(at + i, 0, level);
    const int64_t room = -bytes & (line - 1);  // in the last line, if `at` begins one
    if ((int64_t)((uintptr_t)at % line) > room) __builtin_prefetch(at + bytes - 1, 0, level);
}

// How many of the next `most` records, of so many bytes each, to prefetch.
inline int distance(int most, int64_t bytes) {
    const int64_t fit = far_bytes / bytes;
    return fit >= most ? most : fit > near_rows ? (int)fit : near_rows + 1;
}

template <class Rule, class Row, class Moment>
ALWAYS void update_wide(const UpdateCall &call, int64_t first, int64_t last, const uint8_t *sums,
                        const int64_t d) {
    const Arithmetic exact;
    const Runs runs = call.runs;
    const int64_t row_bytes = d * Row::size, moment_bytes = Rule::width(d) * Moment::size;
    const int far = distance(far_rows, row_bytes + moment_bytes + 4 * d);
    uint8_t *rows[ring], *moments[ring];
    const uint8_t *grads[ring];
    const auto come = [&](int64_t u) __attribute__((always_inline)) {
        const unsigned i = (unsigned)u % ring;
        rows[i] = record(call.rows, call.ids, u, row_bytes);
        moments[i] = record(call.moments, call.ids, u, moment_bytes);
        prefetch<2>(rows[i], row_bytes);
        prefetch<2>(moments[i], moment_bytes);
        const int64_t begin = begin_of(runs, u);
        if (begin_of(runs, u + 1) - begin > 1) {
            grads[i] = sums;
            sums += 4 * d;
        } else {
            grads[i] = gradient(runs, begin);
            prefetch<2>(grads[i], 4 * d);
        }
    };
    for (int64_t u = first; u < first + far && u < last; u++) come(u);
    for (int64_t u = first; u < last; u++) {
        if (u + far < last) come(u + far);
        if (u + near_rows < last) {
            const unsigned i = (unsigned)(u + near_rows) % ring;
            prefetch<3>(rows[i], row_bytes);
            prefetch<3>(moments[i], moment_bytes);
            prefetch<3>(grads[i], 4 * d);
        }
        const unsigned i = (unsigned)u % ring;
        const uint64_t key = Rule::random ? splitmix64(call.key ^ (uint64_t)call.ids[u]) : 0;
        Rule::update(call, grads[i], rows[i], moments[i], d, key);
    }
}

// The usual width is a constant for the compiler.
constexpr int64_t usual = 64;

template <template <class, class> class Form, class Row, class Moment>
void update_all(const UpdateCall &call, int64_t first, int64_t last, const float *from) {
    typedef Form<Row, Moment> Rule;
    const uint8_t *const sums = (const uint8_t *)from;
    if (call.runs.d == usual) update_wide<Rule, Row, Moment>(call, first, last, sums, usual);
    else update_wide<Rule, Row, Moment>(call, first, last, sums, call.runs.d);
}

template <template <class, class> class Form, class Row>
void update_moments(const UpdateCall &call, int64_t first, int64_t last, const float *sums) {
    if (!call.moments.bf16) return update_all<Form, Row, Exact>(call, first, last, sums);
    if (call.stochastic) return update_all<Form, Row, Stochastic>(call, first, last, sums);
    update_all<Form, Row, Nearest>(call, first, last, sums);
}

template <template <class, class> class Form>
void update_by(const UpdateCall &call, int64_t first, int64_t last, const float *sums) {
    if (!call.rows.bf16) return update_moments<Form, Exact>(call, first, last, sums);
    if (call.stochastic) return update_moments<Form, Stochastic>(call, first, last, sums);
    update_moments<Form, Nearest>(call, first, last, sums);
}

void update_by_adagrad(const UpdateCall &call, int64_t first, int64_t last, const float *sums) {
    if (!call.rows.bf16) return update_all<Adagrad, Exact, Exact>(call, first, last, sums);
    if (call.stochastic) return update_all<Adagrad, Stochastic, Exact>(call, first, last, sums);
    update_all<Adagrad, Nearest, Exact>(call, first, last, sums);
}

ALWAYS Survey survey_wide(const SurveyCall &call, int64_t first, int64_t last, uint8_t *sums,
                          const int64_t d) {
    const Arithmetic exact;
    const Runs runs = call.runs;
    const int64_t all = begin_of(runs, last), bytes = 4 * d;
    const int far = distance(far_grads, bytes);
    Bits most = {};
    Wide8 squares[2] = {};
    const auto next = [&](int64_t k) __attribute__((always_inline)) {
        if (k + far < all) prefetch<2>(gradient(runs, k + far), bytes);
        return gradient(runs, k);
    };
    const auto look_at = [&](const Block &sum) __attribute__((always_inline)) {
        // As integers, sizes are ordered in the same way, and a NaN is the largest.
        const Bits size = (Bits)sum & 0x7fffffff;
        most = (Signed)size > (Signed)most ? size : most;
        if (!call.squares) return;
        Block8 halves[2];
        memcpy(halves, &sum, sizeof(sum));
        for (int i = 0; i < 2; i++) {
            const Wide8 wide = __builtin_convertvector(halves[i], Wide8);
            squares[i] += wide * wide;
        }
    };
    for (int64_t u = first, k = begin_of(runs, first); u < last; u++) {
        const int64_t end = begin_of(runs, u + 1);
        const uint8_t *grad = next(k);
        if (++k == end) {
            by_blocks(d, [&](int64_t column, int count) __attribute__((always_inline)) {
                Block sum;
                load(grad + 4 * column, count, sum);
                look_at(sum);
            });
            continue;
        }
        copy(sums, grad, bytes);
        for (; k < end; k++) {
            grad = next(k);
            by_blocks(d, [&](int64_t column, int count) __attribute__((always_inline)) {
                Block sum, more;
                load(sums + 4 * column, count, sum);
                load(grad + 4 * column, count, more);
                sum += more;
                store(sums + 4 * column, count, sum);
                if (k + 1 == end) look_at(sum);
            });
        }
        sums += bytes;
    }
    uint32_t largest = 0;
    for (int i = 0; i < lanes; i++) largest = most[i] > largest ? most[i] : largest;
    double sums_16[lanes];
    memcpy(sums_16, squares, sizeof(squares));
    return {largest, folded(sums_16)};
}

}  // namespace

void update_rows(const UpdateCall &call, int64_t first, int64_t last, const float *sums) {
    switch (call.rule) {
        case UpdateRule::adam: return update_by<Adam>(call, first, last, sums);
        case UpdateRule::nesterov: return update_by<Nesterov>(call, first, last, sums);
        case UpdateRule::adagrad: return update_by_adagrad(call, first, last, sums);
    }
}

Survey survey(const SurveyCall &call, int64_t first, int64_t last, float *sums) {
    if (call.runs.d == usual) return survey_wide(call, first, last, (uint8_t *)sums, usual);
    return survey_wide(call, first, last, (uint8_t *)sums, call.runs.d);
}

}  // namespace engraphy::ENGRAPHY_LEVEL
