// Updates of rows from the gradients of a step, compiled once per instruction set (kernels.hpp says
// what that forbids).
//
// One pass over rows and moments: the gradients of a row are summed in a buffer, and the row and its
// moments are updated where they lie, while those some way ahead are prefetched.
//
// Why the bits are those of the plain version: each value is computed by the same operations in the
// same order, roots and quotients are exact, and the file is compiled without contraction. The
// loops are plain; the compiler turns them into the vectors of each level.
#include <float.h>
#include <stdint.h>

#include "bf16.hpp"
#include "copy.hpp"
#include "kernels.hpp"
#include "mapped.hpp"
#include "update.hpp"

namespace engraphy::ENGRAPHY_LEVEL {
namespace {

static_assert(FLT_EVAL_METHOD == 0, "each operation has to be rounded to float32 at once");

// Rows, moments and gradients may begin at any byte.
typedef float F32 __attribute__((aligned(1), may_alias));
typedef uint16_t U16 __attribute__((aligned(1), may_alias));
typedef uint32_t U32 __attribute__((aligned(1), may_alias));

constexpr int lanes = update_lanes;
constexpr int ahead = 8;     // rows that are on their way
constexpr int panel = 1024;  // columns whose gradients are summed at a time

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

inline const F32 *gradient(const Runs &runs, int64_t k) {
    int64_t position = runs.order ? runs.order[k] : k, entry = 0;
    for (int64_t above = runs.entries; entry + 1 < above;) {
        const int64_t middle = (entry + above) / 2;
        (runs.firsts[middle] <= position ? entry : above) = middle;
    }
    return (const F32 *)runs.grads[entry] + (position - runs.firsts[entry]) * runs.d;
}

// The gradients of the rows from `first` on, one row after the other.
class Sums {
  public:
    Sums(const Runs &runs, int64_t first, int64_t last)
        : runs_(runs), end_(start(last)), next_(start(first)) {
        for (int64_t k = next_; k < next_ + ahead && k < end_; k++) fetch(k);
    }

    // Goes on to row u.
    ALWAYS void go(int64_t u) {
        at_ = start(u);
        next_ = start(u + 1);
        for (int64_t k = at_ + ahead; k < next_ + ahead && k < end_; k++) fetch(k);
    }

    // The sum of the row's gradients, without the scale: columns [column, column + size).
    ALWAYS const F32 *columns(int64_t column, int64_t size) {
        const F32 *grad = gradient(runs_, at_) + column;
        if (next_ - at_ == 1) return grad;
        for (int64_t i = 0; i < size; i++) sums_[i] = grad[i];
        for (int64_t k = at_ + 1; k < next_; k++) {
            grad = gradient(runs_, k) + column;
            for (int64_t i = 0; i < size; i++) sums_[i] += grad[i];
        }
        return sums_;
    }

  private:
    int64_t start(int64_t u) const { return runs_.starts ? runs_.starts[u] : u; }
    void fetch(int64_t k) const { prefetched((const uint8_t *)gradient(runs_, k), 4 * runs_.d); }

    const Runs &runs_;
    const int64_t end_;
    int64_t at_ = 0, next_;
    float sums_[panel];
};

inline int64_t panel_of(int64_t d, int64_t column) {
    return d - column < panel ? d - column : panel;
}

template <class F> inline F folded(F *sums) {
    for (int half = lanes / 2; half; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
}

// Adds the squares of columns to the running sums. A panel begins with sum 0.
template <class F> ALWAYS void add_squares(F *sums, const F32 *grad, int64_t size, float scale) {
    int64_t i = 0;
    for (; i + lanes <= size; i += lanes)
        for (int j = 0; j < lanes; j++) {
            const F value = (F)(grad[i + j] * scale);
            sums[j] += value * value;
        }
    for (int j = 0; i + j < size; j++) {
        const F value = (F)(grad[i + j] * scale);
        sums[j] += value * value;
    }
}

// Random bits, as in engraphy/train/rounding.py.

inline uint64_t splitmix64(uint64_t value) {
    value += 0x9e3779b97f4a7c15;
    value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9;
    value = (value ^ value >> 27) * 0x94d049bb133111eb;
    return value ^ value >> 31;
}

inline uint32_t random_bits(uint64_t row, uint32_t counter) {
    uint32_t bits = (uint32_t)row + counter * 0x9e3779b1u;
    bits = (bits ^ bits >> 16) * 0x85ebca6bu;
    bits = (bits ^ bits >> 13) + (uint32_t)(row >> 32);
    bits *= 0xc2b2ae35u;
    return bits ^ bits >> 16;
}

constexpr uint32_t parts_apart = 1 << 16;

// How values are stored. `random`: 16 bits, used by Stochastic alone.
struct Exact {
    typedef F32 Value;
    static constexpr bool random = false;
    static float get(float value) { return value; }
    static float put(float value, uint32_t) { return value; }
};

struct Nearest {
    typedef U16 Value;
    static constexpr bool random = false;
    static float get(uint16_t bits) { return as_float((uint32_t)bits << 16); }
    static uint16_t put(float value, uint32_t) { return bf16_of(bits_of(value)); }
};

struct Stochastic : Nearest {
    static constexpr bool random = true;
    static uint16_t put(float value, uint32_t random) {
        const uint32_t bits = bits_of(value), rounded = (bits + random) >> 16;
        return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
    }
};

// The rules. `row` updates one row and its moments.

template <class Row, class Moment> struct Adam {
    static constexpr bool random = Row::random || Moment::random;
    static int64_t width(int64_t d) { return 2 * d; }

    ALWAYS static void columns(const UpdateCall &call, const F32 *__restrict grad,
                               typename Row::Value *__restrict row,
                               typename Moment::Value *__restrict mean,
                               typename Moment::Value *__restrict square, int64_t column,
                               int64_t size, uint64_t key) {
        const float decay = call.factors[0], square_decay = call.factors[1];
        const float rate = call.factors[2], eps = call.factors[3], scale = call.runs.scale;
        for (int64_t i = 0; i < size; i++) {
            const uint32_t counter = (uint32_t)(column + i);
            const float g = grad[i] * scale;
            float m = Moment::get(mean[i]), v = Moment::get(square[i]);
            m += decay * (g - m);
            v += square_decay * (g * g - v);
            const uint32_t moment_bits =
                Moment::random ? random_bits(key, counter + parts_apart) : 0;
            mean[i] = Moment::put(m, moment_bits & 0xffff);
            square[i] = Moment::put(v, moment_bits >> 16);
            const uint32_t row_bits = Row::random ? random_bits(key, counter) : 0;
            const float moved = Row::get(row[i]) - rate * m / (__builtin_sqrtf(v) + eps);
            row[i] = Row::put(moved, row_bits & 0xffff);
        }
    }

    ALWAYS static void update(const UpdateCall &call, Sums &sums, typename Row::Value *row,
                              typename Moment::Value *moments, int64_t d, uint64_t key) {
        for (int64_t column = 0; column < d; column += panel) {
            const int64_t size = panel_of(d, column);
            columns(call, sums.columns(column, size), row + column, moments + column,
                    moments + d + column, column, size, key);
        }
    }
};

template <class Row, class Moment> struct Nesterov {
    static constexpr bool random = Row::random || Moment::random;
    static int64_t width(int64_t d) { return d; }

    ALWAYS static void columns(const UpdateCall &call, const F32 *__restrict grad,
                               typename Row::Value *__restrict row,
                               typename Moment::Value *__restrict velocity, int64_t column,
                               int64_t size, uint64_t key) {
        const float momentum = call.factors[0], rate = call.factors[1], scale = call.runs.scale;
        for (int64_t i = 0; i < size; i++) {
            const uint32_t counter = (uint32_t)(column + i);
            const float g = grad[i] * scale, v = Moment::get(velocity[i]) * momentum + g;
            const uint32_t moment_bits =
                Moment::random ? random_bits(key, counter + parts_apart) : 0;
            velocity[i] = Moment::put(v, moment_bits & 0xffff);
            const uint32_t row_bits = Row::random ? random_bits(key, counter) : 0;
            const float moved = Row::get(row[i]) - rate * (g + momentum * v);
            row[i] = Row::put(moved, row_bits & 0xffff);
        }
    }

    ALWAYS static void update(const UpdateCall &call, Sums &sums, typename Row::Value *row,
                              typename Moment::Value *moments, int64_t d, uint64_t key) {
        for (int64_t column = 0; column < d; column += panel) {
            const int64_t size = panel_of(d, column);
            columns(call, sums.columns(column, size), row + column, moments + column, column, size,
                    key);
        }
    }
};

template <class Row, class Moment> struct Adagrad {
    static constexpr bool random = Row::random;
    static int64_t width(int64_t) { return 1; }

    ALWAYS static void columns(const UpdateCall &call, const F32 *__restrict grad,
                               typename Row::Value *__restrict row, float rate, int64_t column,
                               int64_t size, uint64_t key) {
        const float scale = call.runs.scale;
        for (int64_t i = 0; i < size; i++) {
            const uint32_t bits = Row::random ? random_bits(key, (uint32_t)(column + i)) : 0;
            row[i] = Row::put(Row::get(row[i]) - rate * (grad[i] * scale), bits & 0xffff);
        }
    }

    ALWAYS static void update(const UpdateCall &call, Sums &sums, typename Row::Value *row,
                              typename Moment::Value *moments, int64_t d, uint64_t key) {
        const float lr = call.factors[0], eps = call.factors[1];
        float squares[lanes] = {};
        const F32 *grad = nullptr;
        for (int64_t column = 0; column < d; column += panel) {
            grad = sums.columns(column, panel_of(d, column));
            add_squares(squares, grad, panel_of(d, column), call.runs.scale);
        }
        const float sum = moments[0] + folded(squares) / (float)d;
        moments[0] = sum;
        const float rate = lr / (__builtin_sqrtf(sum) + eps);
        for (int64_t column = 0; column < d; column += panel) {
            const int64_t size = panel_of(d, column);
            if (d > panel) grad = sums.columns(column, size);
            columns(call, grad, row + column, rate, column, size, key);
        }
    }
};

inline uint8_t *record(const Place &place, const int64_t *ids, int64_t u, int64_t bytes) {
    const uint64_t row = (uint64_t)(place.compact ? u : ids[u]);
    if (place.rows <= place.shard_rows) return (uint8_t *)place.shards[0] + row * bytes;
    const uint64_t shard = row / (uint64_t)place.shard_rows;
    return (uint8_t *)place.shards[shard] + (row - shard * place.shard_rows) * bytes;
}

template <template <class, class> class Form, class Row, class Moment>
void update_all(const UpdateCall &call, int64_t first, int64_t last) {
    typedef Form<Row, Moment> Rule;
    const Arithmetic exact;
    const int64_t d = call.runs.d, row_bytes = d * sizeof(typename Row::Value);
    const int64_t moment_bytes = Rule::width(d) * sizeof(typename Moment::Value);
    Sums sums(call.runs, first, last);
    uint8_t *rows[ahead], *moments[ahead];
    const auto fetch = [&](int64_t u) {
        rows[u % ahead] = record(call.rows, call.ids, u, row_bytes);
        moments[u % ahead] = record(call.moments, call.ids, u, moment_bytes);
        prefetched(rows[u % ahead], row_bytes);
        prefetched(moments[u % ahead], moment_bytes);
    };
    for (int64_t u = first; u < first + ahead && u < last; u++) fetch(u);
    for (int64_t u = first; u < last; u++) {
        uint8_t *const row = rows[u % ahead], *const moment = moments[u % ahead];
        if (u + ahead < last) fetch(u + ahead);
        sums.go(u);
        const uint64_t key = Rule::random ? splitmix64(call.key ^ (uint64_t)call.ids[u]) : 0;
        Rule::update(call, sums, (typename Row::Value *)row, (typename Moment::Value *)moment, d,
                     key);
    }
}

template <template <class, class> class Form, class Row>
void update_moments(const UpdateCall &call, int64_t first, int64_t last) {
    if (!call.moments.bf16) return update_all<Form, Row, Exact>(call, first, last);
    if (call.stochastic) return update_all<Form, Row, Stochastic>(call, first, last);
    update_all<Form, Row, Nearest>(call, first, last);
}

template <template <class, class> class Form>
void update_by(const UpdateCall &call, int64_t first, int64_t last) {
    if (!call.rows.bf16) return update_moments<Form, Exact>(call, first, last);
    if (call.stochastic) return update_moments<Form, Stochastic>(call, first, last);
    update_moments<Form, Nearest>(call, first, last);
}

void update_by_adagrad(const UpdateCall &call, int64_t first, int64_t last) {
    if (!call.rows.bf16) return update_all<Adagrad, Exact, Exact>(call, first, last);
    if (call.stochastic) return update_all<Adagrad, Stochastic, Exact>(call, first, last);
    update_all<Adagrad, Nearest, Exact>(call, first, last);
}

}  // namespace

void update_rows(const UpdateCall &call, int64_t first, int64_t last) {
    switch (call.rule) {
        case UpdateRule::adam: return update_by<Adam>(call, first, last);
        case UpdateRule::nesterov: return update_by<Nesterov>(call, first, last);
        case UpdateRule::adagrad: return update_by_adagrad(call, first, last);
    }
}

void sum_runs(const Runs &runs, int64_t first, int64_t last, float *out) {
    const Arithmetic exact;
    Sums sums(runs, first, last);
    for (int64_t u = first; u < last; u++) {
        sums.go(u);
        for (int64_t column = 0; column < runs.d; column += panel) {
            const int64_t size = panel_of(runs.d, column);
            const F32 *grad = sums.columns(column, size);
            F32 *__restrict to = out + u * runs.d + column;
            for (int64_t i = 0; i < size; i++) to[i] = grad[i] * runs.scale;
        }
    }
}

double square_runs(const Runs &runs, int64_t first, int64_t last) {
    const Arithmetic exact;
    Sums sums(runs, first, last);
    double squares[lanes] = {};
    for (int64_t u = first; u < last; u++) {
        sums.go(u);
        for (int64_t column = 0; column < runs.d; column += panel) {
            const int64_t size = panel_of(runs.d, column);
            add_squares(squares, sums.columns(column, size), size, runs.scale);
        }
    }
    return folded(squares);
}

// Sizes are compared as integers: they are ordered in the same way, and a NaN is the largest.
bool within(const float *unaligned, int64_t count, float limit) {
    const U32 *values = (const U32 *)unaligned;
    uint32_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        const uint32_t size = values[i] & 0x7fffffff;
        most = size > most ? size : most;
    }
    return most <= bits_of(limit);
}

}  // namespace engraphy::ENGRAPHY_LEVEL
