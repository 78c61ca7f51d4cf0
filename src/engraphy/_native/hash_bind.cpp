// HashPlan from Python.
#include "bind.hpp"

#include <nanobind/stl/vector.h>

#include "plan.hpp"

namespace nb = nanobind;

namespace engraphy {

void bind_hash(nb::module_ &m) {
    using nb::arg;
    nb::class_<Plan>(m, "HashPlan")
        .def(nb::init<uintptr_t, int64_t, int64_t, int64_t, std::vector<int>, int, int, uintptr_t,
                      uintptr_t, uintptr_t, nb::list, std::vector<int64_t>>(),
             arg("map"), arg("vocab"), arg("filler"), arg("stop"), arg("orders"), arg("heads"),
             arg("layers"), arg("multipliers"), arg("primes"), arg("offsets"),
             arg("hot") = nb::list(), arg("hot_first") = std::vector<int64_t>())
        .def("rows", &Plan::rows, nb::call_guard<nb::gil_scoped_release>(), arg("ids"),
             arg("batch"), arg("tokens"), arg("history"), arg("live"), arg("starts"), arg("out"),
             arg("layer") = -1, arg("alive") = 0)
        // It never changes, so a copy of the object around it (copy.deepcopy of a model, say) may
        // share it.
        .def("__deepcopy__", [](nb::object self, nb::handle) { return self; });
}

}  // namespace engraphy
