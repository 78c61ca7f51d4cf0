// Checks of what Python passes in: sizes and addresses that kernels rely on.
#pragma once

#include <stdexcept>

namespace engraphy {

// Raises ValueError in Python unless the condition holds.
inline void require(bool condition, const char *message) {
    if (!condition) throw std::invalid_argument(message);
}

}  // namespace engraphy
