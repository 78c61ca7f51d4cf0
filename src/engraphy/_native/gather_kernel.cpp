// Rows of mapped memory as they are, compiled once per instruction set (kernels.hpp says what that
// forbids).
//
// Rows some way ahead are prefetched. A large output of whole cache lines is written past the
// caches, so that it does not evict what is in them. That pays only if each row begins and ends
// with a line: joining other rows into lines first costs more than it gains. The usual row sizes
// are constants for the compiler, so that copies become straight code.
#include <stdint.h>

#include "copy.hpp"
#include "kernels.hpp"
#include "mapped.hpp"

namespace engraphy::ENGRAPHY_LEVEL {
namespace {

template <bool past> ALWAYS void each_row(const GatherCall &call, int64_t row_bytes) {
    constexpr int most = 16;
    const int ahead = row_bytes <= line ? most : 8;  // rows that are on their way
    const int64_t last = call.last;
    uint8_t *out = call.out + call.first * row_bytes;
    const uint8_t *coming[most];
    for (int64_t i = call.first; i < call.first + ahead && i < last; i++)
        coming[i % ahead] = prefetched(row_at(call, i, row_bytes), row_bytes);
    for (int64_t i = call.first; i < last; i++, out += row_bytes) {
        const uint8_t *row = coming[i % ahead];
        if (i + ahead < last)
            coming[i % ahead] = prefetched(row_at(call, i + ahead, row_bytes), row_bytes);
        if (past) stream(out, row, row_bytes);
        else copy(out, row, row_bytes);
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
