// One token of each of a few sequences, looked up in all layers by one call: addresses, rows, and
// the ids' place in the state of the sequences.
//
// The plain versions of its three steps are addresses/addresser.py, rows/read.py, memory/past.py.
#include "bind.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "kind.hpp"
#include "plan.hpp"

namespace nb = nanobind;

namespace engraphy {
namespace {

// Whether these bytes of a mapped file are in memory, as far as the system tells.
bool resident(const uint8_t *bytes, int64_t size) {
    static const uintptr_t page = sysconf(_SC_PAGESIZE);
    const uintptr_t end = (uintptr_t)bytes + size;
    for (uintptr_t at = (uintptr_t)bytes & ~(page - 1); at < end; at += page) {
        unsigned char there;
        if (mincore((void *)at, page, &there) || !(there & 1)) return false;
    }
    return true;
}

class TokenReader {
  public:
    // on_disk: layers whose rows may not be in memory: it is asked for each of them, and `read`
    // does nothing unless all are.
    TokenReader(const Plan &plan, const std::string &kind, int64_t d, float scale,
                int64_t row_bytes, std::vector<uintptr_t> shards, std::vector<int64_t> shard_rows,
                std::vector<int64_t> rows, std::vector<int64_t> on_disk)
        : plan_(plan),
          d_(d),
          row_bytes_(row_bytes),
          columns_(plan.sizes().order_count * plan.sizes().heads),
          on_disk_(std::move(on_disk)),
          waits_(std::find(on_disk_.begin(), on_disk_.end(), 1) != on_disk_.end()) {
        const size_t layers = plan.sizes().layers;
        require(shards.size() == layers && shard_rows.size() == layers && rows.size() == layers &&
                    on_disk_.size() == layers,
                "shards, shard_rows, rows and on_disk must be those of the plan's layers");
        require(row_bytes > 0, "sizes must be positive");
        for (size_t i = 0; i < layers; i++) {
            require(shards[i] && shard_rows[i] > 0 && rows[i] > 0,
                    "sizes must be positive, shards present");
            tables_.push_back({kind_of(kind.c_str(), d), d, scale, false,
                               (const uint8_t *const *)shards[i], shard_rows[i], rows[i], nullptr,
                               nullptr, 0, 0});
        }
    }
    TokenReader(const TokenReader &) = delete;

    bool read(uintptr_t ids, int64_t batch, uintptr_t oldest, uintptr_t next, int64_t stride,
              uintptr_t out) const {
        require(ids && batch > 0 && next && out,
                "ids, a column for them and the output must be present");
        const HashPlan &plan = plan_.sizes();
        const int64_t *const token = (const int64_t *)ids, past = plan.longest - 1,
                             count = batch * columns_;
        const Unlocked unlocked(waits_ ? INT64_MAX
                                       : plan.layers * count * d_ * (int64_t)sizeof(float));
        for (int64_t b = 0; b < batch; b++)
            if (token[b] < 0 || token[b] >= plan.vocab || (plan.map && plan.map[token[b]] < 0))
                return false;
        std::vector<int64_t> history(batch * past), row_ids(plan.layers * count);
        for (int64_t b = 0; b < batch; b++)
            std::copy_n((const int64_t *)oldest + b * stride, past, history.data() + b * past);
        const HashCall call = {token,   batch, 1,           history.data(), nullptr,
                               nullptr, 0,     plan.layers, row_ids.data()};
        if (kernels().hash(plan, call) != -1) return false;
        for (int64_t layer = 0; layer < plan.layers; layer++) {
            const RowsCall &table = tables_[layer];
            const int64_t *const asked = row_ids.data() + layer * count;
            if (kernels().first_bad(asked, count, table.rows) != -1) return false;
            for (int64_t i = 0; on_disk_[layer] && i < count; i++)
                if (!resident(table.shards[asked[i] / table.shard_rows] +
                                  asked[i] % table.shard_rows * row_bytes_,
                              row_bytes_))
                    return false;
        }
        for (int64_t layer = 0; layer < plan.layers; layer++) {
            RowsCall table = tables_[layer];
            table.ids = row_ids.data() + layer * count;
            table.out = (uint8_t *)((float *)out + layer * count * d_);
            table.last = count;
            kernels().rows(table);
        }
        for (int64_t b = 0; b < batch; b++) ((int64_t *)next)[b * stride] = token[b];
        return true;
    }

  private:
    const Plan &plan_;
    const int64_t d_, row_bytes_, columns_;
    const std::vector<int64_t> on_disk_;
    const bool waits_;  // for a row that goes between the question and the reading
    std::vector<RowsCall> tables_;
};

}  // namespace

void bind_token(nb::module_ &m) {
    using nb::arg;
    nb::class_<TokenReader>(m, "TokenReader")
        .def(nb::init<const Plan &, const std::string &, int64_t, float, int64_t,
                      std::vector<uintptr_t>, std::vector<int64_t>, std::vector<int64_t>,
                      std::vector<int64_t>>(),
             nb::keep_alive<1, 2>(), arg("plan"), arg("kind"), arg("d"), arg("scale"),
             arg("row_bytes"), arg("shards"), arg("shard_rows"), arg("rows"), arg("on_disk"))
        .def("read", &TokenReader::read, arg("ids"), arg("batch"), arg("oldest"), arg("next"),
             arg("stride"), arg("out"));
}

}  // namespace engraphy
