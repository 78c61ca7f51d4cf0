// Slots of hot n-grams, compiled once per instruction set (kernels.hpp says what that forbids).
//
// Each n-gram needs a line a level and then its record, one after the other. The n-grams of a tile
// do not wait for each other: all lines of a level are asked for before the first is looked at. Which
// of them have their bit is chance, so no branch depends on it.
#include <stdint.h>
#include <string.h>

#include "hot.hpp"
#include "kernels.hpp"

namespace engraphy::ENGRAPHY_LEVEL {
namespace {

// Bits that are set before `bit` of a line, in all lines before it too. All words are counted:
// to stop where the bit is would be a branch that nobody can predict.
inline int64_t before(const uint32_t *line, uint32_t bit) {
    const uint32_t place = bit + 32, last = place / 64;  // behind the count
    uint64_t words[hot_words / 2], word;
    memcpy(words, line, sizeof(words));
    memcpy(&word, line + 2 * last, sizeof(word));
    word &= ((uint64_t)1 << place % 64) - 1;
    const uint64_t count = words[0] & 0xffffffff;
    int64_t bits = __builtin_popcountll(word);
    for (uint32_t i = 0; i < hot_words / 2 - 1; i++)
        bits += __builtin_popcountll(words[i] & -(uint64_t)(i < last));
    return (int64_t)count + bits - __builtin_popcountll(count);
}

void hashes_of(const HotTable &table, const int64_t *terms, int64_t stride, int count,
               uint64_t *hashes) {
    for (int j = 0; j < count; j++) hashes[j] = hot_start(table.seed);
    for (int i = table.order - 1; i >= 0; i--) {
        const int64_t *ids = terms + i * stride;
        for (int j = 0; j < count; j++) hashes[j] = hot_mixed(hashes[j], (uint64_t)ids[j]);
    }
}

// The slots at these ranks, where the record is that of the n-gram; else -1. A slot that the index
// does not have is one of a damaged file. known: the order, 0 = it is read from the table.
template <int known> void keep_equal(const HotTable &table, const int64_t *terms, int64_t stride,
                                     int count, int64_t *slots) {
    const int order = known ? known : table.order;
    for (int j = 0; j < count; j++) {
        const int64_t rank = slots[j];
        const uint32_t *record = table.records + (rank < 0 ? 0 : rank) * (order + 1);
        bool same = (rank >= 0) & (record[0] < table.slots);
        for (int i = 0; i < order; i++)
            same &= record[order - i] == (uint64_t)terms[i * stride + j];
        slots[j] = same ? (int64_t)record[0] : -1;
    }
}

// The same where records keep fingerprints.
void keep_marked(const HotTable &table, const uint32_t *marks, int count, int64_t *slots) {
    for (int j = 0; j < count; j++) {
        const int64_t rank = slots[j];
        const uint32_t *record = table.records + (rank < 0 ? 0 : rank) * table.width;
        const bool same = (rank >= 0) & (record[0] < table.slots) & (record[1] == marks[j]);
        slots[j] = same ? (int64_t)record[0] : -1;
    }
}

}  // namespace

void hot_ranks(const HotTable &table, const int64_t *terms, int64_t stride, int count,
               int64_t *ranks, uint32_t *marks) {
    uint64_t hashes[hot_tile], z[hot_tile];
    const uint32_t *lines[hot_tile];
    uint32_t bits[hot_tile];
    int left[hot_tile], hits[hot_tile], left_count = count;
    hashes_of(table, terms, stride, count, hashes);
    if (table.fingerprint_bits)
        for (int j = 0; j < count; j++)
            marks[j] = (uint32_t)(hot_level(hashes[j], hot_levels) >> (64 - table.fingerprint_bits));
    for (int j = 0; j < count; j++) z[j] = hot_level(hashes[j], 0);
    const uint32_t *level_lines = table.lines;
    for (int j = 0; j < count; j++) {
        lines[j] = level_lines + hot_line(z[j], table.sizes[0]) * hot_words;
        bits[j] = hot_bit(z[j]);
        __builtin_prefetch(lines[j]);
        left[j] = j;
        ranks[j] = -1;
    }
    for (int level = 0; level < table.level_count && left_count; level++) {
        level_lines += table.sizes[level] * hot_words;
        int hit_count = 0, rest = 0;
        for (int a = 0; a < left_count; a++) {
            const int j = left[a];
            const int hit = lines[j][1 + bits[j] / 32] >> bits[j] % 32 & 1;
            hits[hit_count] = left[rest] = j;
            hit_count += hit;
            rest += 1 - hit;
        }
        left_count = level + 1 < table.level_count ? rest : 0;
        const int64_t size = left_count ? table.sizes[level + 1] : 0;
        for (int a = 0; a < left_count; a++) {
            const int j = left[a];
            const uint64_t hash = hot_level(hashes[j], level + 1);
            lines[j] = level_lines + hot_line(hash, size) * hot_words;
            bits[j] = hot_bit(hash);
            __builtin_prefetch(lines[j]);
        }
        for (int a = 0; a < hit_count; a++) {
            const int j = hits[a];
            const int64_t rank = before(lines[j], bits[j]);
            if (rank >= table.keys) continue;  // of a damaged file
            const uint32_t *record = table.records + rank * table.width;
            __builtin_prefetch(record);
            __builtin_prefetch(record + table.width - 1);
            ranks[j] = rank;
        }
    }
}

void hot_find(const HotTable &table, const int64_t *terms, int64_t stride, int count,
              int64_t *slots) {
    uint32_t marks[hot_tile];
    hot_ranks(table, terms, stride, count, slots, marks);
    if (table.fingerprint_bits) return keep_marked(table, marks, count, slots);
    switch (table.order) {
    case 2: return keep_equal<2>(table, terms, stride, count, slots);
    case 3: return keep_equal<3>(table, terms, stride, count, slots);
    case 4: return keep_equal<4>(table, terms, stride, count, slots);
    default: return keep_equal<0>(table, terms, stride, count, slots);
    }
}

}  // namespace engraphy::ENGRAPHY_LEVEL
