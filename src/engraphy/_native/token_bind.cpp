// One token of each of a few sequences, looked up in all layers by one call: addresses, rows, and
// the ids' place in the state of the sequences.
//
// The plain versions of its three steps are addresses/addresser.py, rows/read.py, memory/past.py.
#include "bind.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "cursor.hpp"
#include "guard.hpp"
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
    // does nothing unless all are. ends: of each layer, the last bytes of the files behind its
    // shards; none if there are no files.
    TokenReader(const Plan &plan, const std::string &kind, int64_t d, float scale,
                int64_t row_bytes, std::vector<uintptr_t> shards, std::vector<int64_t> shard_rows,
                std::vector<int64_t> rows, std::vector<int64_t> on_disk,
                std::vector<std::vector<uintptr_t>> ends)
        : plan_(plan),
          d_(d),
          row_bytes_(row_bytes),
          columns_(plan.sizes().order_count * plan.sizes().heads),
          on_disk_(std::move(on_disk)),
          ends_(std::move(ends)),
          waits_(std::find(on_disk_.begin(), on_disk_.end(), 1) != on_disk_.end()) {
        const size_t layers = plan.sizes().layers;
        require(shards.size() == layers && shard_rows.size() == layers && rows.size() == layers &&
                    on_disk_.size() == layers && ends_.size() == layers,
                "shards, shard_rows, rows, on_disk and ends must be those of the plan's layers");
        require(row_bytes > 0, "sizes must be positive");
        for (size_t i = 0; i < layers; i++) {
            require(shards[i] && shard_rows[i] > 0 && rows[i] > 0,
                    "sizes must be positive, shards present");
            require(ends_[i].empty() || int64_t(ends_[i].size()) * shard_rows[i] >= rows[i],
                    "each shard must have an end, or none");
            guarded_ |= !ends_[i].empty();
            tables_.push_back({kind_of(kind.c_str(), d), d, scale, false,
                               (const uint8_t *const *)shards[i], shard_rows[i], rows[i], nullptr,
                               nullptr, 0, 0});
        }
    }
    TokenReader(const TokenReader &) = delete;

    // What became of a token.
    enum Answer { not_read, unsure, whole };

    int read(uintptr_t ids, int64_t batch, nb::bytearray out, Cursor &cursor, bool advance) const {
        const HashPlan &plan = plan_.sizes();
        const int64_t count = batch * columns_, bytes = plan.layers * count * d_ * sizeof(float);
        require(ids && batch > 0 && batch == cursor.batch && int64_t(out.size()) == bytes,
                "ids and rows must be those of the cursor's sequences");
        require(cursor.ids.columns() == plan.longest - 1, "the cursor must be of the plan's order");
        if (!cursor.ready()) return not_read;
        float *const rows = (float *)out.data();
        Answer answer;
        {
            const Unlocked unlocked(waits_ ? INT64_MAX : bytes);
            answer = read_rows((const int64_t *)ids, batch, cursor.ids, rows);
        }
        if (advance && answer == whole) cursor.ids.advance();
        return answer;
    }

    void trust(int64_t damages) { trusted_ = damages; }

  private:
    Answer read_rows(const int64_t *token, int64_t batch, const CursorColumns &columns,
                     float *out) const {
        const HashPlan &plan = plan_.sizes();
        const int64_t past = plan.longest - 1, count = batch * columns_;
        const int64_t *const oldest = (const int64_t *)columns.oldest;
        for (int64_t b = 0; b < batch; b++)
            if (token[b] < 0 || token[b] >= plan.vocab || (plan.map && plan.map[token[b]] < 0))
                return not_read;
        std::vector<int64_t> history(batch * past), row_ids(plan.layers * count);
        for (int64_t b = 0; b < batch; b++)
            std::copy_n(oldest + b * columns.stride, past, history.data() + b * past);
        const HashCall call = {token,   batch, 1,           history.data(), nullptr,
                               nullptr, 0,     plan.layers, row_ids.data()};
        if (kernels().hash(plan, call) != -1) return not_read;
        if (guarded_) keep_guard_armed();
        for (int64_t layer = 0; layer < plan.layers; layer++)
            if (!readable(layer, row_ids.data() + layer * count, count)) return not_read;
        for (int64_t layer = 0; layer < plan.layers; layer++) {
            RowsCall table = tables_[layer];
            table.ids = row_ids.data() + layer * count;
            table.out = (uint8_t *)(out + layer * count * d_);
            table.last = count;
            kernels().rows(table);
        }
        for (int64_t b = 0; b < batch; b++)
            ((int64_t *)columns.next)[b * columns.stride] = token[b];
        return were_whole(row_ids.data(), count) ? whole : unsure;
    }

    // Whether these rows of a layer exist and are in memory. Brings them near, with the ends of
    // their files.
    bool readable(int64_t layer, const int64_t *row_ids, int64_t count) const {
        const RowsCall &table = tables_[layer];
        if (kernels().first_bad(row_ids, count, table.rows) != -1) return false;
        for (int64_t i = 0; i < count; i++) {
            const int64_t shard = row_ids[i] / table.shard_rows;
            const uint8_t *const row =
                table.shards[shard] + row_ids[i] % table.shard_rows * row_bytes_;
            if (on_disk_[layer] && !resident(row, row_bytes_)) return false;
            for (int64_t at = 0; at < row_bytes_; at += 64) __builtin_prefetch(row + at);
            if (!ends_[layer].empty()) __builtin_prefetch((void *)ends_[layer][shard]);
        }
        return true;
    }

    // After the read: whether the files that these rows were read from had not been cut.
    bool were_whole(const int64_t *row_ids, int64_t count) const {
        bool all = true;
        for (size_t layer = 0; layer < ends_.size(); layer++)
            for (int64_t i = 0; !ends_[layer].empty() && i < count; i++) {
                const int64_t row = row_ids[layer * count + i];
                all &= ends_whole(ends_[layer][row / tables_[layer].shard_rows]);
            }
        return all && (!guarded_ || damage_count() == trusted_.load());
    }

    const Plan &plan_;
    const int64_t d_, row_bytes_, columns_;
    const std::vector<int64_t> on_disk_;
    const std::vector<std::vector<uintptr_t>> ends_;
    const bool waits_;  // for a row that goes between the question and the reading
    bool guarded_ = false;  // whether there are files
    std::atomic<int64_t> trusted_{-1};  // damages of the process, none of them to these files
    std::vector<RowsCall> tables_;
};

// Columns from Python: oldest, next, stride, bytes, room, values, wide.
CursorColumns columns_of(const std::vector<int64_t> &numbers) {
    require(numbers.size() == 7, "columns must be seven numbers");
    CursorColumns columns = {(uintptr_t)numbers[0], (uintptr_t)numbers[1], numbers[2],
                             numbers[3],            numbers[4],            numbers[5],
                             numbers[6] != 0};
    require(columns.room >= 0 && columns.bytes >= 0, "room and bytes must not be negative");
    return columns;
}

}  // namespace

void bind_token(nb::module_ &m) {
    using nb::arg;
    using Numbers = std::vector<int64_t>;
    nb::class_<Cursor>(m, "Cursor")
        .def("__init__",
             [](Cursor *self, int64_t batch, const Numbers &ids,
                const std::vector<Numbers> &windows) {
                 Cursor cursor = {batch, columns_of(ids), {}};
                 require(batch > 0 && cursor.ids.next, "batch and columns must be present");
                 for (const Numbers &window : windows) cursor.windows.push_back(columns_of(window));
                 new (self) Cursor(std::move(cursor));
             },
             arg("batch"), arg("ids"), arg("windows"))
        .def("ready", &Cursor::ready)
        .def("tokens", [](const Cursor &self) { return self.ids.written; })
        .def("has_windows", [](const Cursor &self) { return !self.windows.empty(); })
        .def("advance", [](Cursor &self) { self.ids.advance(); })
        .def("take", [](Cursor &self) {
            Numbers counts = {self.ids.written};
            self.ids.written = 0;
            for (CursorColumns &window : self.windows) {
                counts.push_back(window.written);
                window.written = 0;
            }
            return counts;
        });
    nb::class_<TokenReader>(m, "TokenReader")
        .def(nb::init<const Plan &, const std::string &, int64_t, float, int64_t,
                      std::vector<uintptr_t>, std::vector<int64_t>, std::vector<int64_t>,
                      std::vector<int64_t>, std::vector<std::vector<uintptr_t>>>(),
             nb::keep_alive<1, 2>(), arg("plan"), arg("kind"), arg("d"), arg("scale"),
             arg("row_bytes"), arg("shards"), arg("shard_rows"), arg("rows"), arg("on_disk"),
             arg("ends"))
        .def("read", &TokenReader::read, arg("ids"), arg("batch"), arg("out"), arg("cursor"),
             arg("advance"))
        .def("trust", &TokenReader::trust, arg("damages"));
}

}  // namespace engraphy
