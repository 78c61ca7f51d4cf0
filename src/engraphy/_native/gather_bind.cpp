// Rows of mapped memory, as they are, from Python; and the number of threads for this and for
// reading them as numbers.
#include <stdexcept>

#include "bind.hpp"
#include "kernels.hpp"
#include "threads.hpp"

namespace nb = nanobind;

namespace engraphy {
namespace {

void gather_rows(uintptr_t shards, int64_t shard_rows, int64_t rows, int64_t row_bytes,
                 uintptr_t ids, int64_t count, uintptr_t out, bool waits) {
    if (shard_rows < 1 || rows < 0 || row_bytes < 1 || count < 0 || (count && !ids))
        throw std::invalid_argument(
            "sizes must be positive, rows and count not negative, ids present");
    const Unlocked unlocked(waits ? INT64_MAX : count * row_bytes);
    const int64_t parts = parts_of(count);
    const bool stream = count * row_bytes >= streamed_from;
    computing().each(parts, threads(), [&](int64_t part) {
        kernels().gather({(const uint8_t *const *)shards, shard_rows, rows, row_bytes,
                          (const int64_t *)ids, (uint8_t *)out, count * part / parts,
                          count * (part + 1) / parts, stream});
    });
}

}  // namespace

void bind_gather(nb::module_ &m) {
    using nb::arg;
    m.def("gather_rows", &gather_rows, arg("shards"), arg("shard_rows"), arg("rows"),
          arg("row_bytes"), arg("ids"), arg("count"), arg("out"), arg("waits"));
    m.def("threads", &threads);
    m.def("set_threads", [](int count) {
        if (count < 1) throw std::invalid_argument("count must be positive");
        set_threads(count);
    }, arg("count"));
}

}  // namespace engraphy
