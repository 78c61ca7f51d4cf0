// HashPlan as a Python object. It copies what it is built from, so its life depends on no array,
// and never changes.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <vector>

#include "hot_table.hpp"
#include "kernels.hpp"
#include "require.hpp"

namespace engraphy {

class Plan {
  public:
    Plan(uintptr_t map, int64_t vocab, int64_t filler, int64_t stop, std::vector<int> orders,
         int heads, int layers, uintptr_t multipliers, uintptr_t primes, uintptr_t offsets,
         nanobind::list hot, std::vector<int64_t> hot_first)
        : orders_(std::move(orders)) {
        require(
            vocab > 0 && filler >= 0 && heads > 0 && layers > 0 && !orders_.empty(),
            "vocab, heads, layers and the number of orders must be positive, filler not negative");
        int longest = 0;
        for (int order : orders_) {
            require(order >= 1 && order <= max_order, "orders must lie in 1..32");
            longest = order > longest ? order : longest;
        }
        if (map) map_.assign((const int32_t *)map, (const int32_t *)map + vocab);
        const size_t count = size_t(layers) * orders_.size() * heads;
        multipliers_.assign((const int64_t *)multipliers,
                            (const int64_t *)multipliers + size_t(layers) * longest);
        primes_.assign((const uint64_t *)primes, (const uint64_t *)primes + count);
        offsets_.assign((const uint64_t *)offsets, (const uint64_t *)offsets + count);
        inverses_.resize(count);
        fast_.assign(size_t(layers) * orders_.size(), 1);
        for (size_t i = 0; i < count; i++) {
            const int64_t prime = int64_t(primes_[i]);
            require(prime > 0, "primes must be positive");
            inverses_[i] = 1.0 / double(prime);
            if (prime <= fast_above || prime >= fast_below) fast_[i / heads] = 0;
        }
        plan_ = {map ? map_.data() : nullptr,
                 vocab,
                 stop,
                 filler,
                 longest,
                 heads,
                 int(orders_.size()),
                 orders_.data(),
                 layers,
                 multipliers_.data(),
                 primes_.data(),
                 inverses_.data(),
                 offsets_.data(),
                 fast_.data()};
        for (nanobind::handle part : hot) add_hot(part);
        hot_first_ = std::move(hot_first);
        if (hot_.empty()) return;
        require(hot_.size() == orders_.size() && hot_first_.size() == size_t(layers),
                "hot must have a part or None for each order, hot_first a row for each layer");
        plan_.hot = hot_.data();
        plan_.hot_first = hot_first_.data();
    }
    Plan(const Plan &) = delete;

    int64_t rows(uintptr_t ids, int64_t batch, int64_t tokens, uintptr_t history, uintptr_t live,
                 uintptr_t starts, uintptr_t out, int layer, uintptr_t alive) const {
        require(batch >= 0 && tokens >= 0 && layer >= -1 && layer < plan_.layers,
                "batch and tokens must not be negative, layer must be -1 or an index of the plan's "
                "layers");
        const HashCall call = {(const int64_t *)ids,
                               batch,
                               tokens,
                               (const int64_t *)history,
                               (const uint8_t *)live,
                               (const uint8_t *)starts,
                               layer < 0 ? 0 : layer,
                               layer < 0 ? plan_.layers : 1,
                               (int64_t *)out,
                               (uint8_t *)alive};
        return kernels().hash(plan_, call);
    }

    const HashPlan &sizes() const { return plan_; }

    // Rows that the addresses of a layer reach.
    int64_t rows_of(int layer) const {
        uint64_t rows = 0;
        const size_t columns = orders_.size() * plan_.heads;
        for (size_t c = layer * columns; c < (layer + 1) * columns; c++)
            rows = std::max(rows, offsets_[c] + primes_[c]);
        for (const HotTable *table : hot_)
            if (table)
                rows = std::max(rows, uint64_t(hot_first_[layer] + table->slots * plan_.heads));
        return int64_t(rows);
    }

  private:
    void add_hot(nanobind::handle part) {
        kept_.push_back(nanobind::borrow(part));
        if (part.is_none()) {
            hot_.push_back(nullptr);
            return;
        }
        const HotTable &table = nanobind::cast<const HotOrder &>(part).table();
        require(hot_.size() < orders_.size() && table.order == orders_[hot_.size()],
                "hot must have the plan's orders");
        hot_.push_back(&table);
    }

    std::vector<int> orders_;
    std::vector<int32_t> map_;
    std::vector<int64_t> multipliers_;
    std::vector<uint64_t> primes_, offsets_;
    std::vector<double> inverses_;
    std::vector<uint8_t> fast_;
    std::vector<const HotTable *> hot_;
    std::vector<int64_t> hot_first_;
    std::vector<nanobind::object> kept_;  // what hot_ points into
    HashPlan plan_;
};

}  // namespace engraphy
