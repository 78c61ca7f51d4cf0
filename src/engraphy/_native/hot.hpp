// Slots of hot n-grams: what the kernel reads. The plain versions in engraphy/addresses/hot.py and
// perfect_hash.py are its specification.
#pragma once

#include <stdint.h>

namespace engraphy {

constexpr int hot_tile = 64;     // n-grams that are looked up together
constexpr int hot_words = 16;    // of a line: the number of bits set before it, then its bits
constexpr int hot_bits = 480;    // of a line
constexpr int hot_levels = 48;   // the most
constexpr uint64_t hot_gamma = 0x9E3779B97F4A7C15;

// The n-grams of one order.
struct HotTable {
    int order;
    uint64_t seed;
    int level_count;
    const int64_t *sizes;     // [level_count] lines of each level
    const uint32_t *lines;    // [sum of sizes, 16]
    const uint32_t *records;  // [keys, width]: slot, then the ids, the oldest first, or a fingerprint
    int64_t keys;
    int width;
    int fingerprint_bits;     // 0 = the ids are kept
    int64_t slots;            // all slots of the index lie in [0, slots)
};

inline uint64_t hot_start(uint64_t seed) { return (seed + 1) * hot_gamma; }

inline uint64_t hot_mixed(uint64_t hash, uint64_t id) {
    hash = (hash ^ id) * 0xD6E8FEB86659FD93;
    return hash ^ hash >> 32;
}

inline uint64_t hot_level(uint64_t hash, int level) {
    uint64_t z = hash + (uint64_t)(level + 1) * hot_gamma;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

inline int64_t hot_line(uint64_t z, int64_t size) {
    return (int64_t)((z >> 32) * (uint64_t)size >> 32);
}

inline uint32_t hot_bit(uint64_t z) { return (uint32_t)((z & 0xffffffff) * hot_bits >> 32); }

// Numbers of up to hot_tile n-grams; -1 = certainly none of the keys. terms[i * stride + j] is id
// t-i of n-gram j. marks: gets their fingerprints, if there are any.
using HotRanksFunction = void(const HotTable &, const int64_t *terms, int64_t stride, int count,
                              int64_t *ranks, uint32_t *marks);

// Their slots; -1 = not hot.
using HotFindFunction = void(const HotTable &, const int64_t *terms, int64_t stride, int count,
                             int64_t *slots);

}  // namespace engraphy
