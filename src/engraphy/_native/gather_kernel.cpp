// Rows of mapped memory as they are, compiled once per instruction set (kernels.hpp says what that
// forbids).
//
// Rows some way ahead are prefetched (mapped.hpp). A large output of whole cache lines is written
// past the caches, so that it does not evict what is in them. That pays only if each row begins and
// ends with a line: joining other rows into lines first costs more than it gains. The usual row
// sizes are constants for the compiler, so that copies become straight code.
#include <stdint.h>

#include "copy.hpp"
#include "kernels.hpp"
#include "mapped.hpp"

namespace engraphy::ENGRAPHY_LEVEL {
namespace {

template <bool past> ALWAYS void each_row(const GatherCall &call, int64_t row_bytes) {
    uint8_t *out = call.out + call.first * row_bytes;
    ComingRows<GatherCall> rows(call, row_bytes);
    for (int64_t i = call.first; i < call.last; i++, out += row_bytes) {
        const uint8_t *row = rows.at(i);
        if (!past && i + 1 < call.last) prefetch_to_write(out + row_bytes, row_bytes);
        copy_to<past>(out, row, row_bytes);
    }
}

template <bool past> void all_rows(const GatherCall &call) {
    switch (call.row_bytes) {
    case 64: return each_row<past>(call, 64);
    case 128: return each_row<past>(call, 128);
    case 256: return each_row<past>(call, 256);
    case 512: return each_row<past>(call, 512);
    case 160: return each_row<false>(call, 160);  // no whole lines: never streamed
    case 264: return each_row<false>(call, 264);
    default: return each_row<past>(call, call.row_bytes);
    }
}

}  // namespace

void gather_rows(const GatherCall &call) {
    if (call.stream && call.row_bytes % line == 0 && (uintptr_t)call.out % line == 0) {
        all_rows<true>(call);
        streamed();
    } else {
        all_rows<false>(call);
    }
}

}  // namespace engraphy::ENGRAPHY_LEVEL
