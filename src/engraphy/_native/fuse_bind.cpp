// The fusion layer for one token, from Python.
#include <memory>
#include <stdexcept>

#include "bind.hpp"
#include "kernels.hpp"

namespace nb = nanobind;

namespace engraphy {
namespace {

void fuse_token(int kind, int64_t streams, int64_t hidden, int64_t width, int64_t taps, int64_t dilation, double eps,
                double conv_eps, bool unit_offset, uintptr_t key, uintptr_t key_bias, uintptr_t value,
                uintptr_t value_bias, uintptr_t query_norm, uintptr_t key_norm, uintptr_t conv_norm, uintptr_t conv,
                int64_t batch, uintptr_t x, uintptr_t rows, uintptr_t window, uintptr_t inputs, int64_t stride,
                uintptr_t live, uintptr_t out, uintptr_t gate) {
    if (kind < 0 || kind > int(FuseKind::bf16)) throw std::invalid_argument("unknown kind of values");
    if (batch < 1 || streams < 1 || hidden < 1 || width < 1 || taps < 0 || dilation < 1)
        throw std::invalid_argument("sizes must be positive");
    if (!x || !rows || !key || !value || !query_norm || !key_norm || !out ||
        (taps && !(conv_norm && conv && window && inputs)))
        throw std::invalid_argument("x, rows, weights and outputs must be present");
    const int64_t size = FuseKind(kind) == FuseKind::f64 ? sizeof(double) : sizeof(float);
    const int64_t keys = batch * streams * hidden * size, values = batch * hidden * size;
    const std::unique_ptr<char[]> scratch(new char[keys + values + batch * width * size]);
    const auto at = [](uintptr_t address) { return (void *)address; };
    kernels().fuse({FuseKind(kind), streams, hidden, width, taps, dilation, eps, conv_eps, unit_offset, at(key),
                    at(key_bias), at(value), at(value_bias), at(query_norm), at(key_norm), at(conv_norm), at(conv),
                    batch, at(x), at(rows), (const bool *)live, at(out), at(window), at(inputs), stride, at(gate),
                    scratch.get(), scratch.get() + keys, scratch.get() + keys + values});
}

}  // namespace

void bind_fuse(nb::module_ &m) {
    using nb::arg;
    m.def("fuse_token", &fuse_token, nb::call_guard<nb::gil_scoped_release>(), arg("kind"), arg("streams"),
          arg("hidden"), arg("width"), arg("taps"), arg("dilation"), arg("eps"), arg("conv_eps"), arg("unit_offset"),
          arg("key"), arg("key_bias"), arg("value"), arg("value_bias"), arg("query_norm"), arg("key_norm"),
          arg("conv_norm"), arg("conv"), arg("batch"), arg("x"), arg("rows"), arg("window"), arg("inputs"),
          arg("stride"), arg("live"), arg("out"), arg("gate"));
}

}  // namespace engraphy
