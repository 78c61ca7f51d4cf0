// What each part of the module adds to it.
#pragma once

#include <nanobind/nanobind.h>

namespace engraphy {

void bind_cache(nanobind::module_ &m);
void bind_fuse(nanobind::module_ &m);
void bind_gather(nanobind::module_ &m);
void bind_guard(nanobind::module_ &m);
void bind_hash(nanobind::module_ &m);
void bind_pread(nanobind::module_ &m);
void bind_rows(nanobind::module_ &m);
void bind_token(nanobind::module_ &m);

}  // namespace engraphy
