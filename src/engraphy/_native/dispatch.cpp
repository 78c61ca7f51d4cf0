// Which instruction set the kernels use. The environment variable that forces one is read in
// Python: an exception here, while the module is loaded, would look like a missing module.
#include <cstring>

#include "kernels.hpp"

namespace engraphy {
namespace {

struct Level {
    const char *name;
    Kernels kernels;
};

// PREFETCHW needs no look: a CPU without it that runs these levels passes over it.
bool runs_here(const char *name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    if (!std::strcmp(name, "avx2")) return avx2;
    if (!std::strcmp(name, "avx512"))
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#endif
    return !std::strcmp(name, "scalar");
}

constexpr Level compiled[] = {
    {"scalar", scalar::kernels},
#if defined(__x86_64__)
    {"avx2", avx2::kernels},
    {"avx512", avx512::kernels},
#endif
};
constexpr int compiled_count = sizeof(compiled) / sizeof(compiled[0]);

const Level *find(const char *name) {
    for (const Level &level : compiled)
        if (!std::strcmp(level.name, name)) return &level;
    return nullptr;
}

const Level *current = &compiled[0];

}  // namespace

const Kernels &kernels() { return current->kernels; }
const char *current_level() { return current->name; }

const char *const *available_levels() {
    static const char *names[compiled_count + 1] = {};
    int n = 0;
    for (const Level &level : compiled)
        if (runs_here(level.name)) names[n++] = level.name;
    return names;
}

bool select_level(const char *name) {
    const Level *level = find(name);
    if (!level || !runs_here(name)) return false;
    current = level;
    return true;
}

}  // namespace engraphy
