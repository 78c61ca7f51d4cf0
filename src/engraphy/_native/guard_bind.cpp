// The guard from Python. Nothing here waits, so the GIL is kept.
#include <stdexcept>
#include <vector>

#include <nanobind/stl/vector.h>

#include "bind.hpp"
#include "guard.hpp"

namespace nb = nanobind;

namespace engraphy {
namespace {

// The last bytes of guarded files. Files that were unmapped since are left out: the GIL is kept,
// and `unguard` comes before.
class FileEnds {
  public:
    FileEnds(const std::vector<int> &slots, const std::vector<uintptr_t> &last_bytes) {
        if (slots.size() != last_bytes.size())
            throw std::invalid_argument("slots and last_bytes must be of the same files");
        for (size_t i = 0; i < slots.size(); i++)
            files_.push_back({last_bytes[i], slots[i], version_of(slots[i])});
    }

    bool whole(int64_t damages) const {
        bool all = true;
        for (const File &file : files_)
            if (version_of(file.slot) == file.version) __builtin_prefetch((void *)file.last_byte);
        for (const File &file : files_)
            if (version_of(file.slot) == file.version) all &= ends_whole(file.last_byte);
        return all && damage_count() == damages;
    }

  private:
    struct File {
        uintptr_t last_byte;
        int slot;
        uint32_t version;
    };
    std::vector<File> files_;
};

}  // namespace

void bind_guard(nb::module_ &m) {
    using nb::arg;
    m.def("guard", [](uintptr_t begin, uintptr_t size, bool writable) {
        const int slot = guard(begin, size, writable);
        if (slot < 0) throw std::runtime_error("too many mapped files are guarded");
        return slot;
    }, arg("begin"), arg("size"), arg("writable"));
    m.def("unguard", &unguard, arg("slot"));
    m.def("damaged", &damaged, arg("slot"));
    m.def("damage_count", &damage_count);
    m.def("arm_guard", &arm_guard);
    nb::class_<FileEnds>(m, "FileEnds")
        .def(nb::init<const std::vector<int> &, const std::vector<uintptr_t> &>(), arg("slots"),
             arg("last_bytes"))
        .def("whole", &FileEnds::whole, arg("damages"));
}

}  // namespace engraphy
