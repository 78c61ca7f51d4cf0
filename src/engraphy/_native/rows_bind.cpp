// Reading rows from Python: checks of what would read or write out of bounds, and the GIL.
#include "bind.hpp"

#include <stdexcept>

#include "kind.hpp"
#include "threads.hpp"

namespace nb = nanobind;

namespace engraphy {
namespace {

int64_t out_bytes(int64_t count, int64_t d, bool to_bf16) { return count * d * (to_bf16 ? 2 : 4); }

// By as many threads as it is worth; ids have been checked.
void read_parts(RowsCall whole, int64_t count) {
    const int64_t parts = parts_of(count);
    whole.stream = out_bytes(count, whole.d, whole.to_bf16) >= streamed_from;
    computing().each(parts, threads(), [&](int64_t part) {
        RowsCall call = whole;
        call.first = count * part / parts;
        call.last = count * (part + 1) / parts;
        kernels().rows(call);
    });
}

int64_t read_rows(const char *kind, int64_t d, float scale, uintptr_t shards, int64_t shard_rows,
                  int64_t rows, uintptr_t ids, int64_t count, bool to_bf16, uintptr_t out,
                  bool waits) {
    if (shard_rows < 1 || rows < 0 || count < 0 || (count && !ids))
        throw std::invalid_argument(
            "shard_rows must be positive, rows and count not negative, ids present");
    const RowsCall call = {kind_of(kind, d),
                           d,
                           scale,
                           to_bf16,
                           (const uint8_t *const *)shards,
                           shard_rows,
                           rows,
                           (const int64_t *)ids,
                           (uint8_t *)out,
                           0,
                           0};
    const Unlocked unlocked(waits ? INT64_MAX : out_bytes(count, d, to_bf16));
    const int64_t bad = kernels().first_bad(call.ids, count, rows);
    if (bad == -1) read_parts(call, count);
    return bad;
}

int64_t first_bad(uintptr_t ids, int64_t count, int64_t rows) {
    if (count < 0 || rows < 0) throw std::invalid_argument("count and rows must not be negative");
    const Unlocked unlocked(count * sizeof(int64_t));
    return kernels().first_bad((const int64_t *)ids, count, rows);
}

void decode_rows(const char *kind, int64_t d, float scale, uintptr_t raw, int64_t count,
                 bool to_bf16, uintptr_t out) {
    if (count < 0) throw std::invalid_argument("count must not be negative");
    const Unlocked unlocked(out_bytes(count, d, to_bf16));
    const uint8_t *const shard = (const uint8_t *)raw;
    read_parts(
        {kind_of(kind, d), d, scale, to_bf16, &shard, count, count, nullptr, (uint8_t *)out, 0, 0},
        count);
}

uintptr_t address(nb::handle array) {
    Py_buffer view;
    if (PyObject_GetBuffer(array.ptr(), &view, PyBUF_SIMPLE)) throw nb::python_error();
    const uintptr_t at = (uintptr_t)view.buf;
    PyBuffer_Release(&view);
    return at;
}

}  // namespace

void bind_rows(nb::module_ &m) {
    using nb::arg;
    m.def("read_rows", &read_rows, arg("kind"), arg("d"), arg("scale"), arg("shards"),
          arg("shard_rows"), arg("rows"), arg("ids"), arg("count"), arg("to_bf16"), arg("out"),
          arg("waits"));
    m.def("decode_rows", &decode_rows, arg("kind"), arg("d"), arg("scale"), arg("raw"),
          arg("count"), arg("to_bf16"), arg("out"));
    m.def("first_bad", &first_bad, arg("ids"), arg("count"), arg("rows"));
    m.def("address", &address, arg("array"));
}

}  // namespace engraphy
