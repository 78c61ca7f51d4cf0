// The fusion layer for one token, from Python.
#include <memory>
#include <stdexcept>

#include "bind.hpp"
#include "cursor.hpp"
#include "kernels.hpp"

namespace nb = nanobind;

namespace engraphy {
namespace {

void require(bool condition, const char *message) {
    if (!condition) throw std::invalid_argument(message);
}

// FusePlan as a Python object. It keeps addresses: the weights stay the caller's.
class LayerPlan {
  public:
    LayerPlan(int kind, int64_t streams, int64_t hidden, int64_t width, int64_t taps,
              int64_t dilation, double eps, double conv_eps, bool unit_offset, uintptr_t key,
              uintptr_t key_bias, uintptr_t value, uintptr_t value_bias, uintptr_t query_norm,
              uintptr_t key_norm, uintptr_t conv_norm, uintptr_t conv) {
        require(kind >= 0 && kind <= int(FuseKind::bf16), "unknown kind of values");
        require(streams >= 1 && hidden >= 1 && width >= 1 && taps >= 0 && dilation >= 1,
                "sizes must be positive");
        require(key && value && query_norm && key_norm && (!taps || (conv_norm && conv)),
                "weights must be present");
        plan_.kind = FuseKind(kind);
        plan_.streams = streams;
        plan_.hidden = hidden;
        plan_.width = width;
        plan_.taps = taps;
        plan_.dilation = dilation;
        plan_.eps = eps;
        plan_.conv_eps = conv_eps;
        plan_.unit_offset = unit_offset;
        plan_.key = (const void *)key;
        plan_.key_bias = (const void *)key_bias;
        plan_.value = (const void *)value;
        plan_.value_bias = (const void *)value_bias;
        plan_.query_norm = (const void *)query_norm;
        plan_.key_norm = (const void *)key_norm;
        plan_.conv_norm = (const void *)conv_norm;
        plan_.conv = (const void *)conv;
    }
    LayerPlan(const LayerPlan &) = delete;

    void fuse(int64_t batch, uintptr_t x, uintptr_t rows, uintptr_t window, uintptr_t inputs,
              int64_t stride, uintptr_t live, uintptr_t out, uintptr_t gate) const {
        require(batch >= 1, "sizes must be positive");
        const Unlocked unlocked(plan_.width * (plan_.streams + 1) * plan_.hidden * stored());
        fuse_unlocked(batch, x, rows, window, inputs, stride, live, out, gate);
    }

    // The next token of the cursor's sequences. False, without any change, if the cursor has no
    // columns for it.
    bool fuse_next(int layer, int64_t batch, uintptr_t x, int64_t values, nb::bytearray rows,
                   uintptr_t out, Cursor &cursor) const {
        if (layer < 0 || layer >= int(cursor.windows.size())) return false;
        CursorColumns &columns = cursor.windows[layer];
        const int64_t size = plan_.streams * plan_.hidden;
        if (batch != cursor.batch || batch > most_sequences || values != batch * size) return false;
        if (columns.room < 1 || columns.written >= cursor.ids.written) return false;
        if (plan_.taps && (columns.values != size || columns.wide != is_f64() ||
                           columns.columns() != (plan_.taps - 1) * plan_.dilation))
            return false;
        const int64_t layer_bytes = batch * plan_.width * sizeof(float);
        require(int64_t(rows.size()) >= (layer + 1) * layer_bytes, "rows must be those of all layers");
        fuse(batch, x, (uintptr_t)rows.data() + layer * layer_bytes, columns.oldest, columns.next,
             columns.stride, 0, out, 0);
        columns.advance();
        return true;
    }

  private:
    // More are left to a matrix product, which keeps weights in registers.
    static constexpr int64_t most_sequences = 8;

    bool is_f64() const { return plan_.kind == FuseKind::f64; }
    int64_t stored() const {
        return is_f64() ? sizeof(double) : plan_.kind == FuseKind::f32 ? sizeof(float) : 2;
    }

    void fuse_unlocked(int64_t batch, uintptr_t x, uintptr_t rows, uintptr_t window,
                       uintptr_t inputs, int64_t stride, uintptr_t live, uintptr_t out,
                       uintptr_t gate) const {
        require(x && rows && out && (!plan_.taps || (window && inputs)),
                "x, rows, outputs and the conv's columns must be present");
        const int64_t size = is_f64() ? sizeof(double) : sizeof(float);
        const int64_t keys = batch * plan_.streams * plan_.hidden * size;
        const int64_t values = batch * plan_.hidden * size;
        const int64_t widened = batch * plan_.width * size;
        const int64_t mixed = plan_.hidden * size;
        const std::unique_ptr<char[]> scratch(new char[keys + values + widened + mixed]);
        char *const at = scratch.get();
        kernels().fuse({plan_, batch, (const void *)x, (const float *)rows, (const bool *)live,
                        (void *)out, (const void *)window, (void *)inputs, stride, (void *)gate, at,
                        at + keys, at + keys + values, at + keys + values + widened});
    }

    FusePlan plan_;
};

}  // namespace

void bind_fuse(nb::module_ &m) {
    using nb::arg;
    using Address = uintptr_t;
    nb::class_<LayerPlan>(m, "FusePlan")
        .def(nb::init<int, int64_t, int64_t, int64_t, int64_t, int64_t, double, double, bool,
                      Address, Address, Address, Address, Address, Address, Address, Address>(),
             arg("kind"), arg("streams"), arg("hidden"), arg("width"), arg("taps"), arg("dilation"),
             arg("eps"), arg("conv_eps"), arg("unit_offset"), arg("key"), arg("key_bias"),
             arg("value"), arg("value_bias"), arg("query_norm"), arg("key_norm"), arg("conv_norm"),
             arg("conv"))
        .def("fuse", &LayerPlan::fuse, arg("batch"), arg("x"), arg("rows"), arg("window"),
             arg("inputs"), arg("stride"), arg("live"), arg("out"), arg("gate"))
        .def("fuse_next", &LayerPlan::fuse_next, arg("layer"), arg("batch"), arg("x"),
             arg("values"), arg("rows"), arg("out"), arg("cursor"));
}

}  // namespace engraphy
