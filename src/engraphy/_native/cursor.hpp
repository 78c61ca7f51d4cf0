// Where a few sequences go on by one token each: the columns that a decoded token reads and writes,
// of ids and of each layer's conv inputs.
//
// Python's state (memory/state.py) makes a cursor over its buffers, and learns from it how many
// columns were written. It gives the cursor up before it touches a buffer in any other way.
#pragma once

#include <stdint.h>

#include <vector>

namespace engraphy {

// Columns of a buffer: those that are read, and behind them the one that is written next.
struct CursorColumns {
    uintptr_t oldest, next;  // of the first sequence
    int64_t stride;          // values from one sequence's columns to the next one's
    int64_t bytes;           // from one column to the next
    int64_t room;            // columns that may still be written
    int64_t values;          // of a column, in one sequence
    bool wide;               // float64, else float32; of conv inputs alone
    int64_t written = 0;

    int64_t columns() const { return bytes ? int64_t(next - oldest) / bytes : 0; }
    void advance() {
        oldest += bytes;
        next += bytes;
        room--;
        written++;
    }
};

struct Cursor {
    int64_t batch;
    CursorColumns ids;
    std::vector<CursorColumns> windows;  // of each layer; empty if their columns cannot be used
    bool ended = false;                  // whether it was given up

    // Whether there is a column for one more token everywhere. A window may be behind the ids.
    bool ready() const {
        bool all = !ended && ids.room > 0;
        for (const CursorColumns &window : windows)
            all &= window.room > ids.written - window.written;
        return all;
    }
};

}  // namespace engraphy
