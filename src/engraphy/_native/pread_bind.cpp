// Reading rows of files from Python: checks of what would read or write out of bounds, and the GIL.
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "bind.hpp"
#include "pread.hpp"

namespace nb = nanobind;

namespace engraphy {
namespace {

class RowReader {
  public:
    RowReader(const std::vector<int> &files, const std::vector<int64_t> &sizes, int64_t file_rows,
              int64_t row_bytes, int64_t offset, int threads, bool whole_pages)
        : files_(files, sizes, file_rows, row_bytes, offset, threads, whole_pages) {
        if (files.empty() || files.size() != sizes.size() || file_rows < 1 || row_bytes < 1 ||
            offset < 0 || threads < 1)
            throw std::invalid_argument(
                "sizes and threads must be positive, and there must be a size for each file");
    }

    nb::tuple read(uintptr_t ids, int64_t count, uintptr_t out) {
        ReadReport report;
        {
            nb::gil_scoped_release unlocked;
            report = files_.read((const int64_t *)ids, count, (uint8_t *)out);
        }
        return nb::make_tuple(report.reads, report.bytes, report.failure.file, report.failure.code);
    }

  private:
    RowFiles files_;
};

}  // namespace

void bind_pread(nb::module_ &m) {
    using nb::arg;
    nb::class_<RowReader>(m, "RowReader")
        .def(nb::init<const std::vector<int> &, const std::vector<int64_t> &, int64_t, int64_t,
                      int64_t, int, bool>(),
             arg("files"), arg("sizes"), arg("file_rows"), arg("row_bytes"), arg("offset"),
             arg("threads"), arg("whole_pages"))
        .def("read", &RowReader::read, arg("ids"), arg("count"), arg("out"));
}

}  // namespace engraphy
