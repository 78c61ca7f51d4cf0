// The row cache from Python: checks of sizes, threads that share a large call, and the GIL.
#include <algorithm>
#include <memory>
#include <stdexcept>
#include <vector>

#include "bind.hpp"
#include "kernels.hpp"
#include "threads.hpp"

namespace nb = nanobind;

namespace engraphy {
namespace {

CacheMemory memory_of(uintptr_t memory, uintptr_t changes, int64_t sets_count, int64_t row_bytes,
                      int64_t count) {
    if (!memory || !changes || sets_count < 1 || sets_count >> 32 || row_bytes < 1 || count < 0)
        throw std::invalid_argument(
            "there must be memory, sets and bytes of a row, and no negative count");
    return {(uint8_t *)memory, (uint64_t *)changes, sets_count, row_bytes};
}

int64_t look(uintptr_t memory, uintptr_t changes, int64_t sets_count, int64_t row_bytes,
             uintptr_t ids, int64_t count, uintptr_t out, uintptr_t missing) {
    const CacheMemory cache = memory_of(memory, changes, sets_count, row_bytes, count);
    const Unlocked unlocked(count * row_bytes);
    int64_t *const positions = (int64_t *)missing, *const versions = positions + count;
    const int64_t parts = parts_of(count);
    std::vector<int64_t> found(parts);
    const auto begin = [&](int64_t part) { return count * part / parts; };
    computing().each(parts, threads(), [&](int64_t part) {
        found[part] = kernels().cache_look(
            {cache, (const int64_t *)ids, (uint8_t *)out, begin(part), begin(part + 1),
             count * row_bytes >= streamed_from, positions, versions});
    });
    int64_t total = found[0];
    for (int64_t part = 1; part < parts; total += found[part++]) {
        std::copy_n(positions + begin(part), found[part], positions + total);
        std::copy_n(versions + begin(part), found[part], versions + total);
    }
    return total;
}

void keep(uintptr_t memory, uintptr_t changes, int64_t sets_count, int64_t row_bytes, uintptr_t ids,
          uintptr_t versions, uintptr_t reads, uintptr_t from, int64_t count) {
    const CacheMemory cache = memory_of(memory, changes, sets_count, row_bytes, count);
    const std::unique_ptr<bool[]> kept(new bool[count]);
    kernels().cache_keep({cache, (const int64_t *)ids, (const int64_t *)versions,
                          (const int64_t *)reads, (const uint8_t *)from, count, kept.get()});
}

void hold(uintptr_t memory, uintptr_t changes, int64_t sets_count, int64_t row_bytes, uintptr_t ids,
          int64_t count) {
    kernels().cache_hold(memory_of(memory, changes, sets_count, row_bytes, count),
                         (const int64_t *)ids, count);
}

void write(uintptr_t memory, uintptr_t changes, int64_t sets_count, int64_t row_bytes,
           uintptr_t ids, uintptr_t from, int64_t count) {
    kernels().cache_write(memory_of(memory, changes, sets_count, row_bytes, count),
                          (const int64_t *)ids, (const uint8_t *)from, count);
}

}  // namespace

void bind_cache(nb::module_ &m) {
    using nb::arg;
    using Released = nb::call_guard<nb::gil_scoped_release>;
    m.def("cache_look", &look, arg("memory"), arg("changes"), arg("set_count"), arg("row_bytes"),
          arg("ids"), arg("count"), arg("out"), arg("missing"));
    m.def("cache_keep", &keep, Released(), arg("memory"), arg("changes"), arg("set_count"),
          arg("row_bytes"), arg("ids"), arg("versions"), arg("reads"), arg("from_rows"),
          arg("count"));
    m.def("cache_hold", &hold, Released(), arg("memory"), arg("changes"), arg("set_count"),
          arg("row_bytes"), arg("ids"), arg("count"));
    m.def("cache_write", &write, Released(), arg("memory"), arg("changes"), arg("set_count"),
          arg("row_bytes"), arg("ids"), arg("from_rows"), arg("count"));
}

}  // namespace engraphy
