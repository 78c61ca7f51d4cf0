// Sorts of n-grams, to compare the building of a hot index with: bench/hot.py compiles it.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

template <int N> void compare(uint32_t *ids, int64_t count) {
    auto *const keys = reinterpret_cast<std::array<uint32_t, N> *>(ids);
    std::sort(keys, keys + count);
}

// The last id first, each in two digits of 9 bits.
template <int N> void radix(uint32_t *ids, int64_t count) {
    using Key = std::array<uint32_t, N>;
    constexpr int digit = 9;
    std::vector<Key> other(count);
    Key *from = reinterpret_cast<Key *>(ids), *to = other.data();
    for (int pass = 0; pass < 2 * N; pass++) {
        const int place = N - 1 - pass / 2, shift = pass % 2 * digit;
        std::vector<int64_t> next((1 << digit) + 1);
        for (int64_t i = 0; i < count; i++) next[(from[i][place] >> shift) % (1 << digit) + 1]++;
        for (int value = 0; value < 1 << digit; value++) next[value + 1] += next[value];
        for (int64_t i = 0; i < count; i++)
            to[next[(from[i][place] >> shift) % (1 << digit)]++] = from[i];
        std::swap(from, to);
    }
}

}  // namespace

// Sorts ids [count, order] below 2**18, in place, by comparing them or by their digits. Seconds.
extern "C" double sort_ngrams(uint32_t *ids, int64_t count, int order, int by_digits) {
    const double begun = now();
    if (order == 2) by_digits ? radix<2>(ids, count) : compare<2>(ids, count);
    if (order == 3) by_digits ? radix<3>(ids, count) : compare<3>(ids, count);
    if (order == 4) by_digits ? radix<4>(ids, count) : compare<4>(ids, count);
    return now() - begun;
}
