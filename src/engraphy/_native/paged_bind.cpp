// The fusion layer over a paged cache of conv inputs, from Python.
#include <algorithm>
#include <memory>

#include "bind.hpp"
#include "kernels.hpp"
#include "require.hpp"
#include "threads.hpp"

namespace nb = nanobind;

namespace engraphy {
namespace {

constexpr int64_t piece = 16;  // tokens, the unit of work

using Address = uintptr_t;

// PagedPlan as a Python object. It keeps addresses: the weights stay the caller's.
class PagedFusion {
  public:
    PagedFusion(bool bf16, int64_t streams, int64_t hidden, int64_t taps, double eps,
                double conv_eps, Address scale, Address conv_norm, Address conv)
        : plan_{bf16,
                streams,
                hidden,
                taps,
                eps,
                conv_eps,
                (const float *)scale,
                (const float *)conv_norm,
                (const float *)conv} {
        require(streams >= 1 && hidden >= 1, "sizes must be positive");
        require(taps >= 0 && taps <= most_taps, "too many taps");
        require(scale && (!taps || (conv_norm && conv)), "weights must be present");
    }
    PagedFusion(const PagedFusion &) = delete;

    void fuse(int64_t tokens, Address x, Address key, Address value, int64_t stride, Address live,
              Address offsets, Address cache, int64_t cache_values, Address out,
              int threads) const {
        require(tokens >= 1 && stride >= plan_.hidden, "sizes must be positive");
        require(x && key && value && out && (!plan_.taps || (offsets && cache)),
                "arrays must be present");
        const int64_t last = cache_values - plan_.streams * plan_.hidden;
        const int64_t *at = (const int64_t *)offsets;
        for (int64_t i = 0; i < tokens * plan_.taps; i++) {
            const int64_t least = i % plan_.taps == plan_.taps - 1 ? 0 : -1;
            require(at[i] >= least && at[i] <= last, "lines must be in the cache");
        }
        const std::unique_ptr<float[]> gate(new float[tokens * plan_.streams]);
        const PagedCall call{plan_,
                             tokens,
                             (const void *)x,
                             (const void *)key,
                             (const void *)value,
                             stride,
                             (const bool *)live,
                             at,
                             (float *)cache,
                             gate.get(),
                             (void *)out};
        const Unlocked unlocked(tokens * (plan_.streams + 1) * plan_.hidden * sizeof(float));
        for (PagedFunction *pass : {kernels().paged_inputs, kernels().paged_outs}) {
            const int64_t pieces = (tokens + piece - 1) / piece;
            computing().each(pieces, int(std::min<int64_t>(threads, pieces)), [&](int64_t i) {
                pass(call, i * piece, std::min((i + 1) * piece, tokens));
            });
        }
    }

  private:
    const PagedPlan plan_;
};

}  // namespace

void bind_paged(nb::module_ &m) {
    using nb::arg;
    nb::class_<PagedFusion>(m, "PagedFusion")
        .def(nb::init<bool, int64_t, int64_t, int64_t, double, double, Address, Address, Address>(),
             nb::kw_only(), arg("bf16"), arg("streams"), arg("hidden"), arg("taps"), arg("eps"),
             arg("conv_eps"), arg("scale"), arg("conv_norm"), arg("conv"))
        .def("fuse", &PagedFusion::fuse, nb::kw_only(), arg("tokens"), arg("x"), arg("key"),
             arg("value"), arg("stride"), arg("live"), arg("offsets"), arg("cache"),
             arg("cache_values"), arg("out"), arg("threads"));
}

}  // namespace engraphy
