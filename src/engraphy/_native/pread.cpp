#include "pread.hpp"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <mutex>

namespace engraphy {
namespace {

constexpr int64_t page = 4096;
constexpr int64_t longest_read =
    1 << 17;  // give or take a row: what is longer is work for several threads
constexpr int too_early = -1;              // instead of an errno

// Returns 0, an errno, or too_early.
int read_whole(int file, uint8_t *into, int64_t begin, int64_t length, int64_t wanted) {
    for (int64_t done = 0; done < wanted;) {
        const ssize_t found = pread(file, into + done, length - done, begin + done);
        if (found < 0 && errno == EINTR) continue;
        if (found < 0) return errno;
        if (found == 0) return too_early;
        done += found;
    }
    return 0;
}

}  // namespace

struct RowFiles::Wanted {
    int64_t id, place;  // row `id` goes to row `place` of the output
    bool operator<(const Wanted &other) const { return id < other.id; }
};

struct RowFiles::Read {
    int64_t file, begin, length;
    int64_t first, last;  // of the sorted rows
};

RowFiles::RowFiles(const std::vector<int> &files, const std::vector<int64_t> &sizes,
                   int64_t file_rows, int64_t row_bytes, int64_t offset, int threads,
                   bool whole_pages)
    : files_(files),
      sizes_(sizes),
      file_rows_(file_rows),
      row_bytes_(row_bytes),
      offset_(offset),
      threads_(threads),
      whole_pages_(whole_pages),
      kept_(new std::atomic<uint8_t *>[threads] {}) {}

RowFiles::~RowFiles() {
    for (int i = 0; i < threads_; i++)
        if (uint8_t *const memory = kept_[i].load()) munmap(memory, scratch_bytes());
}

// A read begins in a window and ends with a row that does, both at whole pages.
size_t RowFiles::scratch_bytes() const {
    return (longest_read + row_bytes_ + 3 * page - 1) / page * page;
}

// Null memory if the system has none.
uint8_t *RowFiles::take_scratch() {
    for (int i = 0; i < threads_; i++)
        if (kept_[i].load(std::memory_order_relaxed))
            if (uint8_t *const memory = kept_[i].exchange(nullptr, std::memory_order_acquire))
                return memory;
    const int access = PROT_READ | PROT_WRITE, kind = MAP_PRIVATE | MAP_ANONYMOUS;
    void *const memory = mmap(nullptr, scratch_bytes(), access, kind, -1, 0);
    return memory == MAP_FAILED ? nullptr : (uint8_t *)memory;
}

void RowFiles::keep_scratch(uint8_t *memory) {
    for (int i = 0; i < threads_; i++) {
        uint8_t *none = nullptr;
        if (!kept_[i].load(std::memory_order_relaxed) &&
            kept_[i].compare_exchange_strong(none, memory, std::memory_order_release))
            return;
    }
    munmap(memory, scratch_bytes());
}

// One read ends where the next row begins neither in its last page nor in the page after it, and
// where a window of longest_read bytes of the file ends.
std::vector<RowFiles::Read> RowFiles::plan(const std::vector<Wanted> &rows) const {
    std::vector<Read> reads;
    int64_t previous = 0;
    for (int64_t i = 0; i < int64_t(rows.size()); i++) {
        const int64_t file = rows[i].id / file_rows_,
                      begin = offset_ + rows[i].id % file_rows_ * row_bytes_;
        const int64_t last_page = (previous + row_bytes_ - 1) / page;
        if (i == 0 || file != reads.back().file || begin / page > last_page + 1 ||
            begin / longest_read != previous / longest_read)
            reads.push_back({file, begin, 0, i, i});
        reads.back().length = begin + row_bytes_ - reads.back().begin;
        reads.back().last = i + 1;
        previous = begin;
    }
    if (whole_pages_)
        for (Read &read : reads) {
            const int64_t end = (read.begin + read.length + page - 1) / page * page;
            read.begin = read.begin / page * page;
            read.length = end - read.begin;
        }
    return reads;
}

int RowFiles::perform(const Read &read, const Wanted *rows, uint8_t *out, uint8_t *bytes) const {
    const int64_t wanted =
        std::min(read.length, sizes_[read.file] - read.begin);  // the last page may not be whole
    if (const int code = read_whole(files_[read.file], bytes, read.begin, read.length, wanted))
        return code;
    for (int64_t i = read.first; i < read.last; i++) {
        const int64_t begin = offset_ + rows[i].id % file_rows_ * row_bytes_;
        memcpy(out + rows[i].place * row_bytes_, bytes + (begin - read.begin), row_bytes_);
    }
    return 0;
}

ReadReport RowFiles::read(const int64_t *ids, int64_t count, uint8_t *out) {
    std::vector<Wanted> rows(count);
    for (int64_t i = 0; i < count; i++) {
        memcpy(&rows[i].id, ids + i, sizeof(int64_t));  // ids may begin at any byte
        rows[i].place = i;
    }
    if (!std::is_sorted(rows.begin(), rows.end())) std::sort(rows.begin(), rows.end());
    const std::vector<Read> reads = plan(rows);

    std::atomic<bool> failed{false};
    std::mutex noting;
    ReadFailure failure;
    const auto note = [&](const Read &read, int code) {
        std::lock_guard lock(noting);
        if (!failed.exchange(true)) failure = {int(read.file), code == too_early ? 0 : code};
    };
    std::atomic<int64_t> finished{0};
    pool_.shared(int64_t(reads.size()), threads_, [&](ThreadPool::Parts &parts) {
        uint8_t *const bytes = take_scratch();
        if (!bytes) return;  // others may have some
        int64_t i, count = 0;
        for (; (i = parts.next()) >= 0; count++) {
            if (failed.load(std::memory_order_relaxed)) continue;
            if (const int code = perform(reads[i], rows.data(), out, bytes)) note(reads[i], code);
        }
        keep_scratch(bytes);
        finished += count;
    });
    if (finished.load() != int64_t(reads.size())) note(reads[0], ENOMEM);

    ReadReport report{int64_t(reads.size()), 0, failure};
    for (const Read &read : reads) report.bytes += read.length;
    return report;
}

}  // namespace engraphy
