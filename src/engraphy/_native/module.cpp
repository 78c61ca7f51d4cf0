// The Python module engraphy._native._core. Nothing here may throw while it is loaded.
#include <nanobind/stl/string.h>

#include "bind.hpp"
#include "kernels.hpp"

namespace nb = nanobind;

NB_MODULE(_core, m) {
    nb::set_leak_warnings(
        false);  // objects may be alive when the interpreter exits: that is no leak
    m.doc() = "Native kernels of Engraphy; see _core.pyi.";
    m.def("levels", [] {
        nb::list names;
        for (const char *const *name = engraphy::available_levels(); *name; name++)
            names.append(*name);
        return nb::tuple(names);
    });
    m.def("level", [] { return engraphy::current_level(); });
    m.def("set_level", [](const std::string &name) { return engraphy::select_level(name.c_str()); },
          nb::arg("name"));
    engraphy::bind_batch(m);
    engraphy::bind_cache(m);
    engraphy::bind_chunk(m);
    engraphy::bind_fuse(m);
    engraphy::bind_gather(m);
    engraphy::bind_guard(m);
    engraphy::bind_hot(m);  // before the plan, which takes what it defines
    engraphy::bind_hash(m);
    engraphy::bind_paged(m);
    engraphy::bind_pread(m);
    engraphy::bind_rows(m);
    engraphy::bind_tensor(m);
    engraphy::bind_token(m);
    engraphy::bind_update(m);
}
