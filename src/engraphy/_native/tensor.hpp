// Tensors of torch as native calls see them. Python says once how to ask (`know_tensors`).
//
// Asking goes through the C functions that DLPack defines for an exchange between libraries
// (https://dmlc.github.io/dlpack/latest/c_api.html), so no header and no library of torch is
// needed. Where torch has none, before 2.10, its Python methods are called.
#pragma once

#include <nanobind/nanobind.h>
#include <stdint.h>

namespace engraphy {

enum class TensorKind { f32, f64, bf16, i64, other };  // the first ones as FuseKind

struct TensorView {
    uintptr_t data;
    TensorKind kind;
    int dimensions;
    int64_t sizes[4];
    int64_t values;
};

// Fills the view. False unless it is a contiguous tensor of at most 4 dimensions in CPU memory.
bool view_of(PyObject *tensor, TensorView &view);

// Whether its type is torch.Tensor itself.
bool is_plain_tensor(PyObject *object);

bool is_grad_enabled();

}  // namespace engraphy
