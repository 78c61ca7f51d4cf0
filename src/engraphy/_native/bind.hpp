// What each part of the module adds to it.
#pragma once

#include <nanobind/nanobind.h>
#include <stdint.h>

#include <optional>

namespace engraphy {

// Releases the GIL for work on so many bytes of memory, unless they are few: with other threads
// about, handing it over and getting it back would take longer than the work.
class Unlocked {
  public:
    explicit Unlocked(int64_t bytes) {
        if (bytes > 512 << 10) released_.emplace();
    }

  private:
    std::optional<nanobind::gil_scoped_release> released_;
};

void bind_batch(nanobind::module_ &m);
void bind_cache(nanobind::module_ &m);
void bind_chunk(nanobind::module_ &m);
void bind_fuse(nanobind::module_ &m);
void bind_gather(nanobind::module_ &m);
void bind_guard(nanobind::module_ &m);
void bind_hash(nanobind::module_ &m);
void bind_hot(nanobind::module_ &m);
void bind_paged(nanobind::module_ &m);
void bind_pread(nanobind::module_ &m);
void bind_rows(nanobind::module_ &m);
void bind_tensor(nanobind::module_ &m);
void bind_token(nanobind::module_ &m);
void bind_update(nanobind::module_ &m);

}  // namespace engraphy
