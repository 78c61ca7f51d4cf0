// Rows of files, read with pread by several blocking threads. The plain version in
// engraphy/store/pread_plain.py is its specification: the same reads, the same rows.
#pragma once

#include <stdint.h>

#include <memory>
#include <vector>

#include "threads.hpp"

namespace engraphy {

struct ReadFailure {
    int file = -1;  // -1: none
    int code = 0;   // errno; 0: the file ended too early
};

struct ReadReport {
    int64_t reads = 0, bytes = 0;  // what the system was asked for, if nothing failed
    ReadFailure failure;
};

class RowFiles {
  public:
    // files, sizes: open file descriptors, which stay the caller's, and the bytes of each file. Row
    // r is the row r % file_rows of file r / file_rows; the first one of a file begins at `offset`.
    // threads: reads under way at a time. whole_pages: as direct reads need them.
    RowFiles(const std::vector<int> &files, const std::vector<int64_t> &sizes, int64_t file_rows,
             int64_t row_bytes, int64_t offset, int threads, bool whole_pages);
    ~RowFiles();

    // Rows ids[0..count), which the caller has checked, to out [count, row_bytes].
    ReadReport read(const int64_t *ids, int64_t count, uint8_t *out);

  private:
    struct Wanted;
    struct Read;
    std::vector<Read> plan(const std::vector<Wanted> &rows) const;
    int perform(const Read &read, const Wanted *rows, uint8_t *out, uint8_t *bytes) const;
    size_t scratch_bytes() const;
    uint8_t *take_scratch();
    void keep_scratch(uint8_t *memory);

    const std::vector<int> files_;
    const std::vector<int64_t> sizes_;
    const int64_t file_rows_, row_bytes_, offset_;
    const int threads_;
    const bool whole_pages_;
    // What threads read into, kept from call to call; without a lock, which a fork could leave
    // held.
    const std::unique_ptr<std::atomic<uint8_t *>[]> kept_;
    ThreadPool pool_;
};

}  // namespace engraphy
