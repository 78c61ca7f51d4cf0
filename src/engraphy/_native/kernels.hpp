// The kernels behind the binding: one table of functions for each instruction set.
//
// Files named *_kernel.cpp are compiled once per level, each time with other compiler flags. So
// they must include no header of the C++ library that has inline functions: the linker would keep
// one copy of each, possibly one that the machine cannot run. They use plain C headers and compiler
// builtins only.
#pragma once

#include <stdint.h>

#include "cache.hpp"
#include "chunk.hpp"
#include "fuse.hpp"
#include "hash.hpp"
#include "hot.hpp"
#include "paged.hpp"
#include "rows.hpp"
#include "update.hpp"

namespace engraphy {

struct Kernels {
    HashFunction *hash;
    HashPartFunction *hash_part;
    HotRanksFunction *hot_ranks;
    HotFindFunction *hot_find;
    FirstBadFunction *first_bad;
    RowsFunction *rows;
    GatherFunction *gather;
    FuseFunction *fuse;
    CacheLookFunction *cache_look;
    CacheKeepFunction *cache_keep;
    CacheHoldFunction *cache_hold;
    CacheWriteFunction *cache_write;
    SurveyFunction *survey;
    UpdateFunction *update;
    ChunkFunction *chunk_forward;
    ChunkFunction *chunk_backward;
    PagedFunction *paged_inputs;
    PagedFunction *paged_outs;
};

// What the kernel files define, each once per level.
#define ENGRAPHY_KERNELS(level)                                                         \
    namespace level {                                                                   \
    HashFunction hash;                                                                  \
    HashPartFunction hash_part;                                                         \
    HotRanksFunction hot_ranks;                                                         \
    HotFindFunction hot_find;                                                           \
    FirstBadFunction first_bad;                                                         \
    RowsFunction read_rows;                                                             \
    GatherFunction gather_rows;                                                         \
    FuseFunction fuse;                                                                  \
    CacheLookFunction cache_look;                                                       \
    CacheKeepFunction cache_keep;                                                       \
    CacheHoldFunction cache_hold;                                                       \
    CacheWriteFunction cache_write;                                                     \
    SurveyFunction survey;                                                              \
    UpdateFunction update_rows;                                                         \
    ChunkFunction chunk_forward;                                                        \
    ChunkFunction chunk_backward;                                                       \
    PagedFunction paged_inputs;                                                         \
    PagedFunction paged_outs;                                                           \
    constexpr Kernels kernels = {hash, hash_part, hot_ranks, hot_find, first_bad, read_rows, \
                                 gather_rows, fuse, cache_look, cache_keep,             \
                                 cache_hold, cache_write, survey, update_rows,           \
                                 chunk_forward, chunk_backward, paged_inputs,           \
                                 paged_outs};                                           \
    }
ENGRAPHY_KERNELS(scalar)
#if defined(__x86_64__)
ENGRAPHY_KERNELS(avx2)
ENGRAPHY_KERNELS(avx512)
#endif
#undef ENGRAPHY_KERNELS

// The table in use. Set before any work by select_level; plain, since it changes only then.
const Kernels &kernels();
const char *current_level();

// Levels that are compiled in and that this CPU can run, weakest first; the list ends with a null
// pointer.
const char *const *available_levels();

// False when the level is not available; then nothing changes.
bool select_level(const char *name);

}  // namespace engraphy
