// The row cache, compiled once per instruction set (kernels.hpp says what that forbids).
//
// Readers take no lock. A writer makes two versions odd while it works, and even again afterwards:
// that of the whole cache (`changes`) and that of each set it changes. A reader
//   1. loads `changes` (acquire) before it looks at anything,
//   2. copies,
//   3. loads `changes` again, behind a fence, so that on no machine this load overtakes the copies.
// If both loads give the same even number, everything read between them is consistent: it was there
// when that number was stored (release), and a reader that sees any part of the next change also
// sees its odd number (release fence). If the loads differ, the reader checks the version of the
// row's set in the same way, and repeats look-up and copy until that version is stable. Until then
// copied rows may be torn, and tags may mix two states. So the reader trusts nothing it has read,
// and no address that it computes leaves the set. Readers write only `reads`, a byte at a time. A
// count that is lost, or added to the next row in that way, does no harm.
//
// A reader waits for memory twice per row: for its set, then for the row itself. Both are
// prefetched some way ahead. A few rows take each step together, and little is stored about a row
// on its way: loads of one step between stores of another, which wait for memory, were measured to
// take far longer.
#include <sched.h>
#include <stdint.h>

#include "copy.hpp"
#include "kernels.hpp"
#include "mapped.hpp"

namespace engraphy::ENGRAPHY_LEVEL {
namespace {

constexpr int block = 8;            // rows that take a step together, a power of two
constexpr int ways = cache_ways, least_small = 4, most_reads = 3;
constexpr uint8_t main_queue = 16;  // added to the order of rows in the main queue
constexpr int patience = 200;       // looks at a set that is being changed, then sched_yield

struct Place {
    CacheSet *set;
    uint16_t print;
};

inline Place place_of(const CacheMemory &memory, int64_t id) {
    uint64_t mixed = (uint64_t)id * 0x9E3779B97F4A7C15u;
    mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93u;
    const uint16_t print = (uint16_t)mixed;
    const int64_t number = (mixed >> 32) * (uint64_t)memory.count >> 32;
    return {(CacheSet *)(memory.begin + number * memory.set_bytes()), print ? print : (uint16_t)1};
}

inline void prefetch_set(const CacheSet *set) {
    for (int at = 0; at < (int)sizeof(CacheSet); at += line)
        __builtin_prefetch((const uint8_t *)set + at);
}

// The first way that has the tag; -1 if none has.
inline int way_of(const CacheSet &set, int32_t tag) {
#if defined(__AVX512F__)
    const uint32_t same =
        _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(set.tags), _mm512_set1_epi32(tag));
    return same ? __builtin_ctz(same) : -1;
#elif defined(__AVX2__)
    const __m256i wanted = _mm256_set1_epi32(tag);
    uint32_t same = 0;
    for (int w = 0; w < ways; w += 8) {
        const __m256i equal =
            _mm256_cmpeq_epi32(_mm256_loadu_si256((const __m256i *)(set.tags + w)), wanted);
        same |= (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(equal)) << w;
    }
    return same ? __builtin_ctz(same) : -1;
#else
    int way = -1;
    for (int w = ways - 1; w >= 0; w--) way = set.tags[w] == tag ? w : way;
    return way;
#endif
}

inline uint8_t *row_of(const CacheMemory &memory, CacheSet &set, int way) {
    return (uint8_t *)&set + sizeof(CacheSet) + way * memory.row_bytes;
}

template <bool past> ALWAYS void put(uint8_t *out, const uint8_t *row, int64_t row_bytes) {
    past ? stream(out, row, row_bytes) : copy(out, row, row_bytes);
}

inline int32_t tag_of(int64_t id) { return (int32_t)(id + 1); }

// `changes`. During a change: its value before, which it never has again, so `unchanged` fails.
inline uint64_t changes_of(const CacheMemory &memory) {
    return __atomic_load_n(memory.changes, __ATOMIC_ACQUIRE) & ~(uint64_t)1;
}

// Whether everything read since `changes_of` returned `seen` is consistent.
inline bool unchanged(const CacheMemory &memory, uint64_t seen) {
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    return __atomic_load_n(memory.changes, __ATOMIC_RELAXED) == seen;
}

inline void count_read(CacheSet &set, int way) {
    const uint8_t before = __atomic_load_n(set.reads + way, __ATOMIC_RELAXED);
    if (before < most_reads) __atomic_store_n(set.reads + way, before + 1, __ATOMIC_RELAXED);
}

// Prefetches the row and returns its address; null if it is missing. Either may be outdated.
inline const uint8_t *find(const CacheMemory &memory, int64_t id) {
    CacheSet &set = *place_of(memory, id).set;
    const int way = way_of(set, tag_of(id));
    if (way < 0) return nullptr;
    count_read(set, way);
    return prefetched(row_of(memory, set, way), memory.row_bytes);
}

// Looks up and copies the row until its set did not change meanwhile. Returns -1 if the row was
// copied, or the set's version if it is missing.
template <bool past> int64_t settle(const CacheMemory &memory, int64_t id, uint8_t *out) {
    CacheSet &set = *place_of(memory, id).set;
    for (int tries = 1;; tries++) {
        const uint32_t version = __atomic_load_n(&set.version, __ATOMIC_ACQUIRE);
        if (!(version & 1)) {
            const int way = way_of(set, tag_of(id));
            if (way >= 0) put<past>(out, row_of(memory, set, way), memory.row_bytes);
            __atomic_thread_fence(__ATOMIC_ACQUIRE);
            if (__atomic_load_n(&set.version, __ATOMIC_RELAXED) == version)
                return way < 0 ? (int64_t)version : -1;
        }
        if (tries % patience == 0) sched_yield();
    }
}

template <bool past> ALWAYS int64_t look(const CacheLook &call, int64_t row_bytes) {
    const CacheMemory memory = {call.memory.begin, call.memory.changes, call.memory.count,
                                row_bytes};
    const int64_t first = call.first, last = call.last;
    int64_t *missing = call.missing + first, *versions = call.versions + first;
    uint64_t seen = changes_of(memory);
    const uint8_t *coming[2 * block] = {};
    const auto each = [&](int64_t begin, auto step) {
        for (int64_t i = begin < first ? first : begin; i < begin + block && i < last; i++)
            step(i, ((const I64 *)call.ids)[i], coming[i & (2 * block - 1)]);
    };
    for (int64_t begin = first - 2 * block; begin < last; begin += block) {
        each(begin + 2 * block,
             [&](int64_t, int64_t id, auto &) { prefetch_set(place_of(memory, id).set); });
        each(begin + block, [&](int64_t, int64_t id, auto &row) { row = find(memory, id); });
        each(begin, [&](int64_t i, int64_t id, auto &row) {
            uint8_t *const out = call.out + i * row_bytes;
            if (row) put<past>(out, row, row_bytes);
            const bool same = unchanged(memory, seen);
            if (row && same) return;
            if (const int64_t version = settle<past>(memory, id, out); version >= 0) {
                *missing++ = i;
                *versions++ = version;
            }
            if (same) return;
            for (const uint8_t *&old : coming) old = nullptr;
            seen = changes_of(memory);
        });
    }
    return missing - (call.missing + first);
}

// The usual row sizes as constants, as in gather_kernel.cpp.
template <bool past> int64_t look_for(const CacheLook &call) {
    switch (call.memory.row_bytes) {
    case 64: return look<past>(call, 64);
    case 128: return look<past>(call, 128);
    case 256: return look<past>(call, 256);
    case 512: return look<past>(call, 512);
    case 160: return look<false>(call, 160);  // no whole lines: never past the caches
    case 264: return look<false>(call, 264);
    default: return look<past>(call, call.memory.row_bytes);
    }
}

// Keeps a version odd while its owner is being changed: a set, or the whole cache around it. There
// is one writer at a time, so versions need no atomic exchange.
template <class Version> class Change {
  public:
    explicit Change(Version &version) : version_(version), before_(version) {
        __atomic_store_n(&version_, before_ + 1, __ATOMIC_RELAXED);
        __atomic_thread_fence(__ATOMIC_RELEASE);
    }
    ~Change() { __atomic_store_n(&version_, before_ + 2, __ATOMIC_RELEASE); }
    Change(const Change &) = delete;

  private:
    Version &version_;
    const Version before_;
};

// Moves some ways (bits) to the end of the order; they keep their order.
void to_the_end(CacheSet &set, uint32_t moved) {
    uint8_t by_age[ways], rank = 0;
    const bool fresh =
        set.order[0] % ways == set.order[1] % ways;  // zeros, in the order of their ways
    for (int w = 0; w < ways; w++) by_age[fresh ? w : set.order[w] % ways] = w;
    for (uint32_t last = 0; last < 2; last++)
        for (int age = 0; age < ways; age++) {
            const int w = by_age[age];
            if ((moved >> w & 1) == last)
                set.order[w] = set.order[w] / main_queue * main_queue + rank++;
        }
}

// The way that leaves the main queue. In S3-FIFO the oldest row moves to the end with one read less
// until one without reads is found; this computes the result of all steps at once.
int least_read(CacheSet &set) {
    uint8_t reads[ways];  // readers go on counting
    for (int w = 0; w < ways; w++) reads[w] = __atomic_load_n(set.reads + w, __ATOMIC_RELAXED);
    int way = -1;
    for (int w = 0; w < ways; w++) {
        if (set.order[w] < main_queue) continue;
        if (way < 0 || reads[w] < reads[way] ||
            (reads[w] == reads[way] && set.order[w] < set.order[way]))
            way = w;
    }
    uint32_t passed = 0;
    for (int w = 0; w < ways; w++) {
        if (set.order[w] < main_queue) continue;
        const bool older = set.order[w] < set.order[way];
        passed |= (uint32_t)older << w;
        __atomic_store_n(set.reads + w, (uint8_t)(reads[w] - reads[way] - older), __ATOMIC_RELAXED);
    }
    to_the_end(set, passed);
    return way;
}

// A free way; evicts a row if there is none.
int free_way(const CacheMemory &memory, CacheSet &set) {
    if (const int way = way_of(set, 0); way >= 0) return way;
    for (;;) {
        int oldest = -1, small = 0;
        for (int w = 0; w < ways; w++) {
            if (set.order[w] >= main_queue) continue;
            small++;
            if (oldest < 0 || set.order[w] < set.order[oldest]) oldest = w;
        }
        if (small < least_small) return least_read(set);
        if (!__atomic_load_n(set.reads + oldest, __ATOMIC_RELAXED)) {
            set.ghosts[set.ghost_next] = place_of(memory, set.tags[oldest] - 1).print;
            set.ghost_next = (set.ghost_next + 1) % cache_ghosts;
            return oldest;
        }
        to_the_end(set, 1u << oldest);  // of the main queue
        set.order[oldest] += main_queue;
        __atomic_store_n(set.reads + oldest, (uint8_t)0, __ATOMIC_RELAXED);
    }
}

void insert(const CacheMemory &memory, int64_t id, int64_t reads, const uint8_t *row) {
    const auto [at, print] = place_of(memory, id);
    CacheSet &set = *at;
    const Change change(set.version);
    bool known = false;
    for (int g = 0; g < cache_ghosts && !known; g++)
        if (set.ghosts[g] == print) {
            set.ghosts[g] = 0;
            known = true;
        }
    const int way = free_way(memory, set);
    set.tags[way] = tag_of(id);
    __atomic_store_n(set.reads + way, (uint8_t)(reads - 1 < most_reads ? reads - 1 : most_reads),
                     __ATOMIC_RELAXED);
    copy(row_of(memory, set, way), row, memory.row_bytes);
    to_the_end(set, 1u << way);
    set.order[way] = set.order[way] % main_queue + known * main_queue;
}

// work(i, set of ids[i]) for all of them, one after the other.
template <class Work>
void each_set(const CacheMemory &memory, const int64_t *ids, int64_t count, Work work) {
    for (int64_t i = 0; i < count + block; i++) {
        if (i < count) prefetch_set(place_of(memory, ((const I64 *)ids)[i]).set);
        if (i >= block) work(i - block, *place_of(memory, ((const I64 *)ids)[i - block]).set);
    }
}

}  // namespace

int64_t cache_look(const CacheLook &call) {
    const bool past =
        call.stream && call.memory.row_bytes % line == 0 && (uintptr_t)call.out % line == 0;
    const int64_t missing = past ? look_for<true>(call) : look_for<false>(call);
    if (past) streamed();
    return missing;
}

void cache_keep(const CacheKeep &call) {
    const CacheMemory &memory = call.memory;
    const Change change(*memory.changes);
    each_set(memory, call.ids, call.count, [&](int64_t i, CacheSet &set) {
        call.kept[i] = set.version == call.versions[i] && set.taken < ways;
        set.taken += call.kept[i];
    });
    each_set(memory, call.ids, call.count, [&](int64_t i, CacheSet &set) {
        if (!call.kept[i]) return;
        set.taken = 0;
        insert(memory, ((const I64 *)call.ids)[i], call.reads[i], call.rows + i * memory.row_bytes);
    });
}

void cache_hold(const CacheMemory &memory, const int64_t *ids, int64_t count) {
    const Change change(*memory.changes);
    each_set(memory, ids, count, [&](int64_t i, CacheSet &set) {
        const Change change(set.version);
        set.taken = ways;
        const int32_t tag = tag_of(((const I64 *)ids)[i]);
        if (const int way = way_of(set, tag); way >= 0) set.tags[way] = -tag;
    });
}

void cache_write(const CacheMemory &memory, const int64_t *ids, const uint8_t *rows,
                 int64_t count) {
    const Change change(*memory.changes);
    each_set(memory, ids, count, [&](int64_t i, CacheSet &set) {
        const Change change(set.version);
        set.taken = 0;
        const int32_t tag = tag_of(((const I64 *)ids)[i]);
        const int held = way_of(set, -tag), way = held < 0 ? way_of(set, tag) : held;
        if (way < 0) return;
        set.tags[way] = rows ? tag : 0;
        if (rows) copy(row_of(memory, set, way), rows + i * memory.row_bytes, memory.row_bytes);
    });
}

}  // namespace engraphy::ENGRAPHY_LEVEL
