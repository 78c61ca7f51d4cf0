#include "tensor.hpp"

#include "bind.hpp"
#include "plan.hpp"

namespace nb = nanobind;

namespace engraphy {
namespace {

// DLTensor of DLPack 1.
struct Exchanged {
    void *data;
    int32_t device, device_number;
    int32_t dimensions;
    uint8_t code, bits;
    uint16_t lanes;
    const int64_t *sizes, *strides;
    uint64_t offset;
};
constexpr int on_cpu = 1;                              // DLDeviceType
constexpr int integer = 0, real = 2, brain_real = 4;  // DLDataTypeCode

// DLPackExchangeAPI.
struct Exchange {
    uint32_t major, minor;
    const Exchange *previous;
    void *allocate, *managed_from_object, *managed_to_object;
    int (*view)(void *object, Exchanged *);  // does not own; -1 = a Python error is set
    void *stream;
};

// Held until the process ends.
PyObject *tensor_type = nullptr, *grad_enabled = nullptr;
PyObject *kinds[4] = {};  // torch's dtypes, as TensorKind
const Exchange *exchange = nullptr;

TensorKind kind_of(const Exchanged &tensor) {
    if (tensor.lanes != 1) return TensorKind::other;
    if (tensor.code == real && tensor.bits == 32) return TensorKind::f32;
    if (tensor.code == real && tensor.bits == 64) return TensorKind::f64;
    if (tensor.code == brain_real && tensor.bits == 16) return TensorKind::bf16;
    if (tensor.code == integer && tensor.bits == 64) return TensorKind::i64;
    return TensorKind::other;
}

bool exchanged(PyObject *tensor, TensorView &view) {
    Exchanged found;
    if (exchange->view(tensor, &found)) {
        PyErr_Clear();
        return false;
    }
    if (found.device != on_cpu || found.dimensions > 4) return false;
    view.data = (uintptr_t)found.data + found.offset;
    view.kind = kind_of(found);
    view.dimensions = found.dimensions;
    view.values = 1;
    for (int i = found.dimensions - 1; i >= 0; i--) {
        const int64_t size = view.sizes[i] = found.sizes[i];
        if (size != 1 && found.strides[i] != view.values) return false;
        view.values *= size;
    }
    return true;
}

bool asked(nb::handle tensor, TensorView &view) {
    if (!nb::cast<bool>(tensor.attr("is_cpu"))) return false;
    if (!nb::cast<bool>(tensor.attr("is_contiguous")())) return false;
    const nb::object dtype = tensor.attr("dtype");
    const nb::tuple shape = nb::tuple(tensor.attr("shape"));
    if (shape.size() > 4) return false;
    view.data = nb::cast<uintptr_t>(tensor.attr("data_ptr")());
    view.kind = TensorKind::other;
    for (int i = 0; i < int(TensorKind::other); i++)
        if (dtype.ptr() == kinds[i]) view.kind = TensorKind(i);
    view.dimensions = int(shape.size());
    view.values = 1;
    for (int i = 0; i < view.dimensions; i++) {
        view.sizes[i] = nb::cast<int64_t>(shape[i]);
        view.values *= view.sizes[i];
    }
    return true;
}

}  // namespace

bool view_of(PyObject *tensor, TensorView &view) {
    return exchange ? exchanged(tensor, view) : tensor_type && asked(tensor, view);
}

bool is_plain_tensor(PyObject *object) { return (PyObject *)Py_TYPE(object) == tensor_type; }

bool is_grad_enabled() {
    return !grad_enabled || nb::cast<bool>(nb::handle(grad_enabled)());
}

void bind_tensor(nb::module_ &m) {
    using nb::arg;
    m.def(
        "know_tensors",
        [](nb::object type, nb::list dtypes, nb::object is_enabled, nb::object capsule) {
            require(dtypes.size() == 4, "dtypes must be four");
            const void *found = nullptr;
            if (!capsule.is_none()) {
                found = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
                if (!found) throw nb::python_error();
            }
            exchange = (const Exchange *)found;
            while (exchange && exchange->major != 1) exchange = exchange->previous;
            if (exchange && !exchange->view) exchange = nullptr;
            for (int i = 0; i < 4; i++) kinds[i] = nb::object(dtypes[i]).release().ptr();
            tensor_type = type.release().ptr();
            grad_enabled = is_enabled.release().ptr();
            return exchange != nullptr;
        },
        arg("tensor"), arg("dtypes"), arg("is_grad_enabled"), arg("exchange").none());
}

}  // namespace engraphy
