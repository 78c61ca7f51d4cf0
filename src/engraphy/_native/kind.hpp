// The kinds of rows by their names.
#pragma once

#include <cstring>
#include <stdexcept>

#include "kernels.hpp"

namespace engraphy {

inline constexpr const char *kind_names[] = {"f32",        "f16",  "bf16", "fp8",
                                             "fp8_scaled", "int8", "int4"};  // as in RowKind

inline RowKind kind_of(const char *name, int64_t d) {
    for (int i = 0; i < int(sizeof(kind_names) / sizeof(kind_names[0])); i++) {
        if (std::strcmp(kind_names[i], name)) continue;
        const RowKind kind = RowKind(i);
        const int multiple = kind == RowKind::fp8 ? fp8_block : kind == RowKind::int4 ? 2 : 1;
        if (d < 1 || d % multiple)
            throw std::invalid_argument("d must be positive and fit the kind");
        return kind;
    }
    throw std::invalid_argument("unknown kind of rows");
}

}  // namespace engraphy
