// The fusion layer for one token, from Python.
#include <memory>

#include "bind.hpp"
#include "cursor.hpp"
#include "kernels.hpp"
#include "plan.hpp"
#include "premises.hpp"
#include "tensor.hpp"

namespace nb = nanobind;

namespace engraphy {
namespace {

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

    int kind() const { return int(plan_.kind); }
    void stand_on(Premises premises) { premises_ = std::move(premises); }
    const Premises &premises() const { return premises_; }

    // x + update for the next token of the cursor's sequences. None, without any change, if that
    // takes other steps.
    nb::object fuse_token(int layer, nb::handle x, nb::bytearray rows, Cursor &cursor) const {
        premises_.fetch();
        TensorView in, to;
        if (is_grad_enabled() || !is_plain_tensor(x.ptr()) || !view_of(x.ptr(), in) ||
            !takes(in) || !fits(layer, in.sizes[0], cursor) || !premises_.hold())
            return nb::none();
        // To be overwritten. A model has just added its last block's output, so the code of a sum
        // is in the caches; that of an empty tensor is not.
        const nb::object out = x + x;
        if (!view_of(out.ptr(), to) || to.values != in.values || to.kind != in.kind)
            return nb::none();
        const int64_t batch = in.sizes[0], layer_bytes = batch * plan_.width * sizeof(float);
        require(int64_t(rows.size()) >= (layer + 1) * layer_bytes,
                "rows must be those of all layers");
        CursorColumns &columns = cursor.windows[layer];
        fuse(batch, in.data, (uintptr_t)rows.data() + layer * layer_bytes, columns.oldest,
             columns.next, columns.stride, 0, to.data, 0);
        columns.advance();
        return out;
    }

  private:
    // More are left to a matrix product, which keeps weights in registers.
    static constexpr int64_t most_sequences = 8;

    // Whether x is [B, 1, S, D], or [B, 1, D] with one stream, of the weights' type.
    bool takes(const TensorView &x) const {
        return int(x.kind) == int(plan_.kind) && x.dimensions >= 3 && x.sizes[1] == 1 &&
               x.sizes[x.dimensions - 1] == plan_.hidden &&
               x.values == x.sizes[0] * plan_.streams * plan_.hidden;
    }

    // Whether the cursor has a token that this layer has not seen, and columns for it.
    bool fits(int layer, int64_t batch, const Cursor &cursor) const {
        if (cursor.ended || batch != cursor.batch || batch > most_sequences) return false;
        if (layer < 0 || layer >= int(cursor.windows.size())) return false;
        const CursorColumns &columns = cursor.windows[layer];
        if (columns.room < 1 || columns.written >= cursor.ids.written) return false;
        return !plan_.taps ||
               (columns.values == plan_.streams * plan_.hidden && columns.wide == is_f64() &&
                columns.columns() == (plan_.taps - 1) * plan_.dilation);
    }

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
    Premises premises_;
};

int traverse(PyObject *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    if (!nb::inst_ready(self)) return 0;
    return nb::inst_ptr<LayerPlan>(self)->premises().traverse(visit, arg);
}
PyType_Slot slots[] = {{Py_tp_traverse, (void *)traverse}, {0, nullptr}};

}  // namespace

void bind_fuse(nb::module_ &m) {
    using nb::arg;
    using Address = uintptr_t;
    nb::class_<LayerPlan>(m, "FusePlan", nb::type_slots(slots))
        .def(nb::init<int, int64_t, int64_t, int64_t, int64_t, int64_t, double, double, bool,
                      Address, Address, Address, Address, Address, Address, Address, Address>(),
             arg("kind"), arg("streams"), arg("hidden"), arg("width"), arg("taps"), arg("dilation"),
             arg("eps"), arg("conv_eps"), arg("unit_offset"), arg("key"), arg("key_bias"),
             arg("value"), arg("value_bias"), arg("query_norm"), arg("key_norm"), arg("conv_norm"),
             arg("conv"))
        .def("fuse", &LayerPlan::fuse, arg("batch"), arg("x"), arg("rows"), arg("window"),
             arg("inputs"), arg("stride"), arg("live"), arg("out"), arg("gate"))
        .def("stand_on",
             [](LayerPlan &self, nb::list empty, nb::list entries, nb::list weights) {
                 self.stand_on(Premises(empty, entries, weights));
             },
             arg("empty"), arg("entries"), arg("weights"))
        .def_prop_ro("kind", &LayerPlan::kind)
        .def("holds", [](const LayerPlan &self) { return self.premises().hold(); })
        .def("fuse_token", &LayerPlan::fuse_token, arg("layer"), arg("x"), arg("rows"),
             arg("cursor"));
}

}  // namespace engraphy
