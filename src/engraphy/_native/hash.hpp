// Row addresses of hashed n-grams: what the kernel reads. The plain version in
// engraphy/addresses/addresser.py is its specification, apart from the error report, which is
// described here.
#pragma once

#include <stdint.h>

#include "hot.hpp"

namespace engraphy {

constexpr int max_order = 32;        // the longest n-gram; bounds the kernel's stack
constexpr int64_t fast_above =
    6144;  // primes in (fast_above, 2**31) take the fast remainder: see hash_kernel.cpp
constexpr int64_t fast_below = int64_t{1} << 31;

// What does not change between calls. Columns run order-major, heads inner: C = order_count *
// heads.
struct HashPlan {
    const int32_t *map;     // [vocab] raw -> compressed id, negative = dead; null = identity
    int64_t vocab;          // raw ids lie in [0, vocab)
    int64_t stop;           // raw id that ends the look-back of what follows it, -1 = none
    int64_t filler;         // compressed id that stands for what cannot be seen
    int longest;            // N, the largest order
    int heads;              // K
    int order_count;
    const int *orders;      // [order_count]
    int layers;
    const int64_t
        *multipliers;  // [layers, longest]; products with compressed ids stay in [0, 2**63)
    const uint64_t *primes;      // [layers, C]
    const double *inverses;      // [layers, C] 1 / prime, rounded to nearest
    const uint64_t *offsets;     // [layers, C]
    const uint8_t
        *fast;  // [layers, order_count] all primes of the order lie within the two limits above
    const HotTable *const *hot = nullptr;  // [order_count], null where no n-gram is hot; null = none
    const int64_t *hot_first = nullptr;    // [layers] the first row of hot n-grams
};

struct HashCall {
    const int64_t *ids;      // [batch, tokens] raw
    int64_t batch, tokens;
    const int64_t *history;  // [batch, longest - 1] raw, -1 = nothing there; null = all of it
    const uint8_t *live;  // [batch, tokens] 0 = takes part in no n-gram, its id is not looked at;
                          // null = all live
    const uint8_t *starts;   // [batch, tokens] 1 = a document begins here; null = none
    int first_layer, layer_count;
    int64_t *out;            // [layer_count, batch, tokens, C]; null = not wanted
    uint8_t *alive = nullptr;  // [batch, tokens] gets 1 where a position is live and its id has a
                               // token; null = not wanted
};

// Returns -1 when the outputs are written. Otherwise nothing is written, and the result names the
// first id outside [0, vocab), sequence by sequence, history first: p >= 0 is its flat position in
// ids, p <= -2 means position -2 - p in history.
using HashFunction = int64_t(const HashPlan &, const HashCall &);

// Writes the row ids of tokens [first, last) of all batch * tokens alone, to `out`: [layer_count,
// last - first, C]. Ids have been checked by the function above.
using HashPartFunction = void(const HashPlan &, const HashCall &, int64_t first, int64_t last);

}  // namespace engraphy
