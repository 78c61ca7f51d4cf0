// HotOrder as a Python object: a table of hot n-grams over the memory of arrays that it keeps.
#pragma once

#include <nanobind/nanobind.h>

#include <vector>

#include "hash.hpp"
#include "hot.hpp"
#include "require.hpp"

namespace engraphy {

class HotOrder {
  public:
    HotOrder(int order, uint64_t seed, std::vector<int64_t> sizes, uintptr_t lines,
             uintptr_t records, int64_t keys, int fingerprint_bits, int64_t slots,
             nanobind::object owner)
        : sizes_(std::move(sizes)), owner_(std::move(owner)) {
        require(order >= 1 && order <= max_order && !sizes_.empty() &&
                    int(sizes_.size()) <= hot_levels && lines && records && keys > 0 && slots > 0 &&
                    fingerprint_bits >= 0 && fingerprint_bits <= 32,
                "order, levels, keys and slots must be positive, arrays present");
        for (int64_t size : sizes_) require(size > 0, "levels must have lines");
        table_ = {order,
                  seed,
                  int(sizes_.size()),
                  sizes_.data(),
                  (const uint32_t *)lines,
                  (const uint32_t *)records,
                  keys,
                  1 + (fingerprint_bits ? 1 : order),
                  fingerprint_bits,
                  slots};
    }
    HotOrder(const HotOrder &) = delete;

    const HotTable &table() const { return table_; }

  private:
    const std::vector<int64_t> sizes_;
    const nanobind::object owner_;  // keeps the arrays alive
    HotTable table_;
};

}  // namespace engraphy
