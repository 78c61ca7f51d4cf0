// Updates of rows from Python: sorting gradients by row, checks of what would read or write out of
// bounds, threads, and the GIL.
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bind.hpp"
#include "kernels.hpp"
#include "threads.hpp"

namespace nb = nanobind;

namespace engraphy {
namespace {

constexpr int64_t chunk = 4096;      // rows of a sum of squares, as in memory/summed.py
constexpr int64_t portion = 1 << 20; // values that are looked at at a time

// As they come from Python; _core.pyi says what is in them.
using RunsTuple =
    std::tuple<uintptr_t, uintptr_t, int64_t, uintptr_t, uintptr_t, int64_t, int64_t, double>;
using PlaceTuple = std::tuple<uintptr_t, int64_t, int64_t, bool, bool>;

Runs runs_of(const RunsTuple &given) {
    const auto &[grads, firsts, entries, order, starts, count, d, scale] = given;
    const Runs runs = {(const uintptr_t *)grads, (const int64_t *)firsts, entries,
                       (const int64_t *)order,   (const int64_t *)starts, count,
                       d,                        (float)scale};
    if (entries < 1 || count < 0 || d < 1 || !grads || !firsts || !order != !starts)
        throw std::invalid_argument("sizes must be positive, gradients present");
    return runs;
}

Place place_of(const PlaceTuple &given, int64_t count) {
    const auto &[shards, shard_rows, rows, bf16, compact] = given;
    if (shard_rows < 1 || rows < 0 || (compact && rows < count))
        throw std::invalid_argument("shard_rows must be positive, rows enough");
    return {(const uint8_t *const *)shards, shard_rows, rows, bf16, compact};
}

UpdateRule rule_of(const std::string &name) {
    if (name == "adam") return UpdateRule::adam;
    if (name == "adagrad") return UpdateRule::adagrad;
    if (name == "nesterov") return UpdateRule::nesterov;
    throw std::invalid_argument("unknown rule");
}

int64_t bytes_of(const Runs &runs) { return runs.count * runs.d * 4; }

// Where part number i of so many begins: each has about as many gradients.
int64_t part_begin(const Runs &runs, int64_t i, int64_t parts) {
    if (!runs.starts) return runs.count * i / parts;
    const int64_t *const end = runs.starts + runs.count;
    return std::lower_bound(runs.starts, end, *end * i / parts) - runs.starts;
}

template <class Work> void by_parts(const Runs &runs, const Work &work) {
    if (!runs.count) return;
    const int64_t parts = parts_of(runs.starts ? runs.starts[runs.count] : runs.count);
    computing().each(parts, threads(), [&](int64_t i) {
        work(part_begin(runs, i, parts), part_begin(runs, i + 1, parts));
    });
}

// Sorts by id and position: from the least bits on, `digit` bits at a time.
//
// A key is an id with the position below it, and positions ascend at first. Keys go to and fro
// between the two buffers and end in `order`.
constexpr int most_digit = 12;

int64_t sort_rows(uintptr_t ids_at, int64_t count, uintptr_t order_at, uintptr_t rows_at,
                  uintptr_t starts_at) {
    if (count < 1 || !ids_at || !order_at || !rows_at || !starts_at)
        throw std::invalid_argument("count must be positive, arrays present");
    const uint64_t *const ids = (const uint64_t *)ids_at;
    uint64_t *const order = (uint64_t *)order_at, *const rows = (uint64_t *)rows_at;
    int64_t *const starts = (int64_t *)starts_at;
    const Unlocked unlocked(count * sizeof(int64_t));
    uint64_t all = 0;
    for (int64_t i = 0; i < count; i++) all |= ids[i];
    const int position_bits = std::bit_width((uint64_t)count - 1);
    const int id_bits = std::max<int>(std::bit_width(all), 1);
    if (id_bits + position_bits > 64) return -1;
    const int passes = (id_bits + most_digit - 1) / most_digit;
    const int digit = (id_bits + passes - 1) / passes;
    const uint64_t mask = (1ull << digit) - 1;
    std::vector<int64_t> places(passes << digit);
    for (int64_t i = 0; i < count; i++)
        for (int pass = 0; pass < passes; pass++)
            places[(pass << digit) + (ids[i] >> (pass * digit) & mask)]++;
    const uint64_t *from = nullptr;
    for (int pass = 0; pass < passes; pass++) {
        int64_t *const place = places.data() + (pass << digit);
        int64_t sum = 0;
        for (uint64_t value = 0; value <= mask; value++) sum += std::exchange(place[value], sum);
        uint64_t *const to = (passes - pass) % 2 ? order : rows;
        const int shift = position_bits + pass * digit;
        for (int64_t i = 0; i < count; i++) {
            const uint64_t key = from ? from[i] : ids[i] << position_bits | (uint64_t)i;
            to[place[key >> shift & mask]++] = key;
        }
        from = to;
    }
    int64_t u = -1;
    uint64_t row = ~(order[0] >> position_bits);
    starts[0] = 0;
    for (int64_t i = 0; i < count; i++) {
        const uint64_t key = order[i];
        u += key >> position_bits != row;
        row = key >> position_bits;
        order[i] = key & ((1ull << position_bits) - 1);
        rows[u] = row;
        starts[u + 1] = i + 1;  // the last one stays
    }
    return u + 1;
}

void sum_runs(const RunsTuple &given, uintptr_t out) {
    const Runs runs = runs_of(given);
    if (!out) throw std::invalid_argument("out must be present");
    const Unlocked unlocked(bytes_of(runs));
    by_parts(runs, [&](int64_t first, int64_t last) {
        kernels().sum_runs(runs, first, last, (float *)out);
    });
}

double square_runs(const RunsTuple &given) {
    const Runs runs = runs_of(given);
    const Unlocked unlocked(bytes_of(runs));
    const int64_t chunks = (runs.count + chunk - 1) / chunk;
    std::vector<double> sums(chunks);
    computing().each(chunks, parts_of(runs.count) > 1 ? threads() : 1, [&](int64_t i) {
        sums[i] = kernels().square_runs(runs, i * chunk, std::min((i + 1) * chunk, runs.count));
    });
    double total = 0;
    for (const double sum : sums) total += sum;
    return total;
}

bool within(uintptr_t values, int64_t count, double limit) {
    if (count < 0 || (count && !values)) throw std::invalid_argument("values must be present");
    const Unlocked unlocked(count * sizeof(float));
    std::atomic<bool> all{true};
    computing().each((count + portion - 1) / portion, threads(), [&](int64_t i) {
        const int64_t first = i * portion, size = std::min(portion, count - first);
        if (all && !kernels().within((const float *)values + first, size, (float)limit))
            all = false;
    });
    return all;
}

int64_t update_rows(const std::string &rule, const std::tuple<double, double, double, double> &given,
                    const RunsTuple &runs_given, uintptr_t ids, const PlaceTuple &rows,
                    const PlaceTuple &moments, bool stochastic, uint64_t key) {
    const auto &[a, b, c, d] = given;
    const Runs runs = runs_of(runs_given);
    const UpdateCall call = {rule_of(rule),
                             {(float)a, (float)b, (float)c, (float)d},
                             runs,
                             (const int64_t *)ids,
                             place_of(rows, runs.count),
                             place_of(moments, runs.count),
                             stochastic,
                             key};
    if (call.rule == UpdateRule::adagrad && call.moments.bf16)
        throw std::invalid_argument("adagrad has moments in float32");
    if (runs.count && !ids) throw std::invalid_argument("ids must be present");
    const Unlocked unlocked(INT64_MAX);
    for (const Place &place : {call.rows, call.moments}) {
        const int64_t bad =
            place.compact ? -1 : kernels().first_bad(call.ids, runs.count, place.rows);
        if (bad >= 0) return bad;
    }
    by_parts(runs, [&](int64_t first, int64_t last) { kernels().update(call, first, last); });
    return -1;
}

}  // namespace

void bind_update(nb::module_ &m) {
    using nb::arg;
    m.def("sort_rows", &sort_rows, arg("ids"), arg("count"), arg("order"), arg("rows"),
          arg("starts"));
    m.def("sum_runs", &sum_runs, arg("runs"), arg("out"));
    m.def("square_runs", &square_runs, arg("runs"));
    m.def("within", &within, arg("values"), arg("count"), arg("limit"));
    m.def("update_rows", &update_rows, arg("rule"), arg("factors"), arg("runs"), arg("ids"),
          arg("rows"), arg("moments"), arg("stochastic"), arg("key"));
}

}  // namespace engraphy
