// The guard from Python. Nothing here waits, so the GIL is kept.
#include <stdexcept>

#include "bind.hpp"
#include "guard.hpp"

namespace nb = nanobind;

namespace engraphy {

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
}

}  // namespace engraphy
