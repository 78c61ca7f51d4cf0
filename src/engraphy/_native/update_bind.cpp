// Updates of rows from Python: sorting gradients by row, checks of what would read or write out of
// bounds, threads, and the GIL.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
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

constexpr uint32_t infinity = 0x7f800000;  // as bits; sizes of numbers are less

// As they come from Python; _core.pyi says what is in them.
using RunsTuple = std::tuple<uintptr_t, uintptr_t, int64_t, uintptr_t, uintptr_t, int64_t, int64_t>;
using PlaceTuple = std::tuple<uintptr_t, int64_t, int64_t, bool, bool>;

Runs runs_of(const RunsTuple &given) {
    const auto &[grads, firsts, entries, order, starts, count, d] = given;
    if (entries < 1 || count < 0 || d < 1 || !grads || !firsts || !order != !starts)
        throw std::invalid_argument("sizes must be positive, gradients present");
    return {(const uintptr_t *)grads, (const int64_t *)firsts, entries, (const int64_t *)order,
            (const int64_t *)starts,  count,                   d};
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

// Where the sums of each chunk of rows begin: how many rows before it have several gradients.
std::vector<int64_t> places_of_sums(const Runs &runs) {
    std::vector<int64_t> places{0};
    for (int64_t first = 0; first < runs.count; first += update_chunk) {
        const int64_t last = std::min(first + update_chunk, runs.count);
        int64_t several = 0;
        for (int64_t u = first; runs.starts && u < last; u++)
            several += runs.starts[u + 1] - runs.starts[u] > 1;
        places.push_back(places.back() + several);
    }
    return places;
}

// work(number, first, last, place of the sums) for each chunk of rows.
template <class Work> void by_chunks(const Runs &runs, const Work &work) {
    const std::vector<int64_t> places = places_of_sums(runs);
    computing().each(int64_t(places.size()) - 1, threads(), [&](int64_t i) {
        const int64_t first = i * update_chunk;
        work(i, first, std::min(first + update_chunk, runs.count), places[i] * runs.d);
    });
}

// Sorts by id and position: from the least bits on, `digit` bits at a time.
//
// A key is an id with the position below it, and positions ascend at first. Keys go to and fro
// between the two buffers and end in `order`.
//
// Each value of a digit writes a stream of its own, too many for the machine to foresee. So each
// write prefetches the next line of its stream.
constexpr int most_digit = 12;
constexpr int next_line = 64 / sizeof(uint64_t);

std::pair<int64_t, int64_t> sort_rows(uintptr_t ids_at, int64_t count, uintptr_t order_at,
                                      uintptr_t rows_at, uintptr_t starts_at) {
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
    if (id_bits + position_bits > 64) return {-1, 0};
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
        uint64_t *const to = (passes - pass) % 2 ? order : rows;
        for (uint64_t value = 0; value <= mask; value++) {
            __builtin_prefetch(to + sum, 1);
            sum += std::exchange(place[value], sum);
        }
        const int shift = position_bits + pass * digit;
        for (int64_t i = 0; i < count; i++) {
            const uint64_t key = from ? from[i] : ids[i] << position_bits | (uint64_t)i;
            uint64_t *const at = to + place[key >> shift & mask]++;
            __builtin_prefetch(at + next_line, 1);
            *at = key;
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
    int64_t several = 0;
    for (int64_t i = 0; i <= u; i++) several += starts[i + 1] - starts[i] > 1;
    return {u + 1, several};
}

Survey surveyed(const SurveyCall &call, float *sums) {
    std::vector<Survey> parts(call.runs.count / update_chunk + 1);
    by_chunks(call.runs, [&](int64_t i, int64_t first, int64_t last, int64_t place) {
        parts[i] = kernels().survey(call, first, last, sums + place);
    });
    Survey total = {};
    for (const Survey &part : parts) {
        total.largest = std::max(total.largest, part.largest);
        total.squares += part.squares;
    }
    return total;
}

// The rows that have several gradients, without the others.
struct Shared {
    std::vector<int64_t> order, starts{0};

    explicit Shared(const Runs &runs) {
        for (int64_t u = 0; u < runs.count; u++) {
            const int64_t first = runs.starts[u], last = runs.starts[u + 1];
            if (last - first < 2) continue;
            order.insert(order.end(), runs.order + first, runs.order + last);
            starts.push_back(int64_t(order.size()));
        }
    }
};

// Of the gradients, if at least so many are the only one of their row, all are read in the order of
// memory first, which is faster, and then those of rows that have several. A sum of what is not
// finite is not finite either.
constexpr double mostly_single = 0.75;

bool are_mostly_single(const Runs &runs) {
    const int64_t all = runs.starts[runs.count];
    int64_t single = 0;
    for (int64_t u = 0; u < runs.count; u++) single += runs.starts[u + 1] - runs.starts[u] == 1;
    return single >= mostly_single * double(all);
}

std::pair<bool, double> survey(const RunsTuple &given, uintptr_t sums_at, bool squares) {
    const Runs runs = runs_of(given);
    float *const sums = (float *)sums_at;
    if (runs.starts && !sums) throw std::invalid_argument("sums must be present");
    const Unlocked unlocked(bytes_of(runs));
    if (squares || !runs.starts || !are_mostly_single(runs)) {
        const Survey found = surveyed({runs, squares}, sums);
        return {found.largest < infinity, found.squares};
    }
    Runs single = runs, several = runs;
    single.order = single.starts = nullptr;
    single.count = runs.starts[runs.count];
    const Shared shared(runs);
    several.order = shared.order.data();
    several.starts = shared.starts.data();
    several.count = int64_t(shared.starts.size()) - 1;
    const uint32_t largest = surveyed({single, false}, nullptr).largest;
    return {std::max(largest, surveyed({several, false}, sums).largest) < infinity, 0};
}

int64_t update_rows(const std::string &rule,
                    const std::tuple<double, double, double, double> &given,
                    const RunsTuple &runs, uintptr_t sums, double scale, uintptr_t ids,
                    const PlaceTuple &rows, const PlaceTuple &moments, bool stochastic,
                    uint64_t key) {
    const auto &[a, b, c, d] = given;
    UpdateCall call = {rule_of(rule),
                       {(float)a, (float)b, (float)c, (float)d},
                       runs_of(runs),
                       (float)scale,
                       (const int64_t *)ids,
                       {},
                       {},
                       stochastic,
                       key};
    const int64_t count = call.runs.count;
    call.rows = place_of(rows, count);
    call.moments = place_of(moments, count);
    if (call.rule == UpdateRule::adagrad && call.moments.bf16)
        throw std::invalid_argument("adagrad has moments in float32");
    if (count && (!ids || (call.runs.starts && !sums)))
        throw std::invalid_argument("ids and sums must be present");
    const Unlocked unlocked(INT64_MAX);
    int64_t least = INT64_MAX;
    for (const Place &place : {call.rows, call.moments})
        if (!place.compact) least = std::min(least, place.rows);
    const int64_t bad = kernels().first_bad(call.ids, count, least);
    if (bad >= 0) return bad;
    by_chunks(call.runs, [&](int64_t, int64_t first, int64_t last, int64_t place) {
        kernels().update(call, first, last, (const float *)sums + place);
    });
    return -1;
}

}  // namespace

void bind_update(nb::module_ &m) {
    using nb::arg;
    m.def("sort_rows", &sort_rows, arg("ids"), arg("count"), arg("order"), arg("rows"),
          arg("starts"));
    m.def("survey", &survey, arg("runs"), arg("sums"), arg("squares"));
    m.def("update_rows", &update_rows, arg("rule"), arg("factors"), arg("runs"), arg("sums"),
          arg("scale"), arg("ids"), arg("rows"), arg("moments"), arg("stochastic"), arg("key"));
}

}  // namespace engraphy
