// The kinds of rows by their names.
#pragma once

#include <cstring>
#include <stdexcept>

#include "kernels.hpp"

namespace engraphy {

struct KindName {
    const char *name;
    int multiple;  // d has to be a multiple of it
};

inline constexpr KindName kind_names[] = {
    {"f32", 1},    {"f16", 1},    {"bf16", 1},  {"fp8", fp8_block}, {"fp8_scaled", 1},
    {"int8", 1},   {"int4", 2},   {"q8_0", 32}, {"q4_0", 32},       {"iq4_nl", 32},
    {"mxfp4", 32}, {"q2_k", 256}, {"q3_k", 256}, {"q4_k", 256}, {"q5_k", 256},
};  // as in RowKind

inline RowKind kind_of(const char *name, int64_t d) {
    for (int i = 0; i < int(sizeof(kind_names) / sizeof(kind_names[0])); i++) {
        if (std::strcmp(kind_names[i].name, name)) continue;
        if (d < 1 || d % kind_names[i].multiple)
            throw std::invalid_argument("d must be positive and fit the kind");
        return RowKind(i);
    }
    throw std::invalid_argument("unknown kind of rows");
}

}  // namespace engraphy
