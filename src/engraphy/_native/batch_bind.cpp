// A chunk of tokens, looked up by one call: addresses and rows, a tile of tokens at a time. The row
// ids of a tile never leave the first-level cache, unless they are wanted.
//
// The plain versions of its steps are addresses/addresser.py and rows/read.py.
#include "bind.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "kind.hpp"
#include "plan.hpp"
#include "resident.hpp"
#include "threads.hpp"

namespace nb = nanobind;

namespace engraphy {
namespace {

constexpr int64_t tile = 64;  // tokens

class BatchReader {
  public:
    // For the layers from first_layer on, as many as there are shards.
    BatchReader(const Plan &plan, int first_layer, const std::string &kind, int64_t d, float scale,
                std::vector<uintptr_t> shards, std::vector<int64_t> shard_rows,
                std::vector<int64_t> rows)
        : plan_(plan), first_layer_(first_layer), d_(d) {
        const HashPlan &sizes = plan.sizes();
        const size_t layers = shards.size();
        require(first_layer >= 0 && layers > 0 && first_layer + layers <= size_t(sizes.layers) &&
                    shard_rows.size() == layers && rows.size() == layers,
                "shards, shard_rows and rows must be those of layers of the plan");
        for (size_t i = 0; i < layers; i++) {
            require(shards[i] && shard_rows[i] > 0 && rows[i] > 0,
                    "sizes must be positive, shards present");
            // So no row id has to be checked.
            require(plan.rows_of(first_layer + int(i)) <= rows[i],
                    "a layer must have the rows that its addresses name");
            tables_.push_back({kind_of(kind.c_str(), d), d, scale, false,
                               (const uint8_t *const *)shards[i], shard_rows[i], rows[i], nullptr,
                               nullptr, 0, 0});
        }
    }
    BatchReader(const BatchReader &) = delete;

    void read(uintptr_t ids, int64_t batch, int64_t tokens, uintptr_t history, uintptr_t live,
              uintptr_t starts, std::vector<uintptr_t> outs, bool to_bf16, uintptr_t row_ids,
              bool waits) const {
        const int layers = int(tables_.size());
        require(batch >= 0 && tokens >= 0 && outs.size() == tables_.size(),
                "batch and tokens must not be negative, outputs one a layer");
        const int64_t count = batch * tokens;
        require(!count || (ids && std::find(outs.begin(), outs.end(), 0) == outs.end()),
                "ids and outputs must be present");
        const Call call = {{(const int64_t *)ids, batch, tokens, (const int64_t *)history,
                            (const uint8_t *)live, (const uint8_t *)starts, first_layer_, layers,
                            nullptr},
                           outs.data(),
                           to_bf16,
                           (int64_t *)row_ids};
        const int64_t rows = layers * count * columns(), bytes = rows * d_ * (to_bf16 ? 2 : 4);
        const Unlocked unlocked(waits ? INT64_MAX : bytes);
        const int64_t tiles = (count + tile - 1) / tile;
        const int64_t parts = std::min<int64_t>(parts_of(rows), tiles);
        const int64_t scratch = layers * tile * columns();
        std::vector<int64_t> scratches(parts * scratch);  // not by the threads: see threads.hpp
        computing().each(parts, threads(), [&](int64_t part) {
            for (int64_t i = tiles * part / parts; i < tiles * (part + 1) / parts; i++)
                read_tile(call, i * tile, std::min(count, (i + 1) * tile),
                          scratches.data() + part * scratch);
        });
    }

    // Whether all rows of these tokens are in memory, as far as the system tells.
    bool resident(uintptr_t ids, int64_t batch, int64_t tokens, uintptr_t history, uintptr_t live,
                  uintptr_t starts, int64_t row_bytes) const {
        const int64_t count = batch * tokens;
        require(batch >= 0 && tokens >= 0 && row_bytes > 0, "sizes must be positive");
        require(!count || ids, "ids must be present");
        const int layers = int(tables_.size());
        std::vector<int64_t> row_ids(layers * count * columns());
        const HashCall hash = {(const int64_t *)ids, batch, tokens, (const int64_t *)history,
                               (const uint8_t *)live, (const uint8_t *)starts, first_layer_, layers,
                               row_ids.data()};
        kernels().hash_part(plan_.sizes(), hash, 0, count);
        for (size_t i = 0; i < row_ids.size(); i++) {
            const RowsCall &table = tables_[i / (count * columns())];
            if (!is_resident(row_of(table, row_ids[i], row_bytes), row_bytes)) return false;
        }
        return true;
    }

  private:
    struct Call {
        HashCall hash;
        const uintptr_t *outs;
        bool to_bf16;
        int64_t *row_ids;  // null = not wanted
    };

    int64_t columns() const { return int64_t(plan_.sizes().order_count) * plan_.sizes().heads; }

    void read_tile(const Call &call, int64_t first, int64_t last, int64_t *row_ids) const {
        const int64_t count = (last - first) * columns(), begin = first * columns();
        HashCall hash = call.hash;
        hash.out = row_ids;
        kernels().hash_part(plan_.sizes(), hash, first, last);
        const int64_t all = hash.batch * hash.tokens * columns();
        for (int l = 0; l < hash.layer_count; l++, row_ids += count) {
            if (call.row_ids)
                std::memcpy(call.row_ids + l * all + begin, row_ids, count * sizeof(int64_t));
            RowsCall table = tables_[l];
            table.ids = row_ids;
            table.last = count;
            table.to_bf16 = call.to_bf16;
            const int64_t row_size = d_ * (call.to_bf16 ? 2 : 4);
            table.out = (uint8_t *)call.outs[l] + begin * row_size;
            table.stream = all * row_size >= streamed_from;
            kernels().rows(table);
        }
    }

    const Plan &plan_;
    const int first_layer_;
    const int64_t d_;
    std::vector<RowsCall> tables_;
};

}  // namespace

void bind_batch(nb::module_ &m) {
    using nb::arg;
    nb::class_<BatchReader>(m, "BatchReader")
        .def(nb::init<const Plan &, int, const std::string &, int64_t, float,
                      std::vector<uintptr_t>, std::vector<int64_t>, std::vector<int64_t>>(),
             nb::keep_alive<1, 2>(), arg("plan"), arg("first_layer"), arg("kind"), arg("d"),
             arg("scale"), arg("shards"), arg("shard_rows"), arg("rows"))
        .def("read", &BatchReader::read, arg("ids"), arg("batch"), arg("tokens"), arg("history"),
             arg("live"), arg("starts"), arg("outs"), arg("to_bf16"), arg("row_ids"), arg("waits"))
        .def("resident", &BatchReader::resident, arg("ids"), arg("batch"), arg("tokens"),
             arg("history"), arg("live"), arg("starts"), arg("row_bytes"));
}

}  // namespace engraphy
