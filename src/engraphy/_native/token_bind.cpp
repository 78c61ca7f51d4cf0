// One token of each of a few sequences, looked up in all layers by one call: addresses, rows, and
// the ids' place in the state of the sequences.
//
// The plain versions of its three steps are addresses/addresser.py, rows/read.py, memory/past.py.
#include "bind.hpp"

#include <algorithm>
#include <atomic>
#include <vector>

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "cursor.hpp"
#include "guard.hpp"
#include "kind.hpp"
#include "plan.hpp"
#include "resident.hpp"
#include "tensor.hpp"

namespace nb = nanobind;

namespace engraphy {
namespace {

class TokenReader {
  public:
    // on_disk: layers whose rows may not be in memory: it is asked for each of them, and `read`
    // does nothing unless all are. ends: of each layer, the last bytes of the files behind its
    // shards; none if there are no files. pins: (store, weak reference to its first shard) of each
    // layer, or none.
    TokenReader(const Plan &plan, const std::string &kind, int64_t d, float scale,
                int64_t row_bytes, std::vector<uintptr_t> shards, std::vector<int64_t> shard_rows,
                std::vector<int64_t> rows, std::vector<int64_t> on_disk,
                std::vector<std::vector<uintptr_t>> ends, nb::list pins)
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
        for (nb::handle pin : pins) pins_.push_back({pin[0], pin[1]});
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

    // Rows of all layers for the next token of the cursor's sequences, float32 [layers, B, E].
    // None, without any change, if that takes other steps. `read_scoped` leaves it to the caller to
    // advance the cursor.
    nb::object read_scoped(nb::handle ids, const Cursor &cursor) const {
        Answer answer;
        return read(ids, cursor, answer);
    }

    nb::object read_pinned(nb::handle ids, Cursor &cursor) {
        std::vector<nb::object> pins;  // what is pinned stays mapped until the end of the call
        pins.reserve(pins_.size());
        for (const Pin &pin : pins_) {
            pins.push_back(pin.store.attr(pinned_));
            const nb::object &shards = pins.back();
            if (!PyTuple_GET_SIZE(shards.ptr()) ||
                !pin.first().is(PyTuple_GET_ITEM(shards.ptr(), 0)))
                return nb::none();
        }
        if (pins.empty()) return nb::none();
        Answer answer;
        const nb::object rows = read(ids, cursor, answer);
        if (rows.is_none()) return rows;
        if (answer == unsure) {
            const int64_t damages = damage_count();
            for (const Pin &pin : pins_) pin.store.attr("check_memory")();
            trust(damages);
        }
        cursor.ids.advance();
        return rows;
    }

    void trust(int64_t damages) { trusted_ = damages; }

  private:
    enum Answer { not_read, unsure, whole };
    struct Pin { nb::object store, first; };  // first: a weak reference to its first shard

    nb::object read(nb::handle ids, const Cursor &cursor, Answer &answer) const {
        const HashPlan &plan = plan_.sizes();
        TensorView view;
        if (!is_plain_tensor(ids.ptr()) || !view_of(ids.ptr(), view) ||
            view.kind != TensorKind::i64 || view.dimensions != 2 ||
            view.sizes[0] != cursor.batch || view.sizes[1] != 1 || !cursor.ready())
            return nb::none();
        require(cursor.ids.columns() == plan.longest - 1, "the cursor must be of the plan's order");
        const int64_t batch = cursor.batch;
        const int64_t bytes = plan.layers * batch * columns_ * d_ * sizeof(float);
        const nb::object rows = nb::steal(PyByteArray_FromStringAndSize(nullptr, bytes));
        if (!rows) throw nb::python_error();
        float *const out = (float *)PyByteArray_AS_STRING(rows.ptr());
        {
            const Unlocked unlocked(waits_ ? INT64_MAX : bytes);
            answer = read_rows((const int64_t *)view.data, batch, cursor.ids, out);
        }
        if (answer == not_read) return nb::none();
        return rows;
    }

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
            const uint8_t *const row = row_of(table, row_ids[i], row_bytes_);
            if (on_disk_[layer] && !is_resident(row, row_bytes_)) return false;
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
    std::vector<Pin> pins_;
    const nb::object pinned_ = nb::steal(PyUnicode_InternFromString("pinned"));
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
                 Cursor cursor = {batch, columns_of(ids), {}, false};
                 require(batch > 0 && cursor.ids.next, "batch and columns must be present");
                 for (const Numbers &window : windows) cursor.windows.push_back(columns_of(window));
                 new (self) Cursor(std::move(cursor));
             },
             arg("batch"), arg("ids"), arg("windows"))
        .def_ro("batch", &Cursor::batch)
        .def("ready", &Cursor::ready)
        .def("tokens", [](const Cursor &self) { return self.ids.written; })
        .def("has_windows", [](const Cursor &self) { return !self.windows.empty(); })
        .def("advance", [](Cursor &self) { self.ids.advance(); })
        .def("end", [](Cursor &self) { self.ended = true; })
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
                      std::vector<int64_t>, std::vector<std::vector<uintptr_t>>, nb::list>(),
             nb::keep_alive<1, 2>(), arg("plan"), arg("kind"), arg("d"), arg("scale"),
             arg("row_bytes"), arg("shards"), arg("shard_rows"), arg("rows"), arg("on_disk"),
             arg("ends"), arg("pins"))
        .def("read_pinned", &TokenReader::read_pinned, arg("ids"), arg("cursor"))
        .def("read_scoped", &TokenReader::read_scoped, arg("ids"), arg("cursor"))
        .def("trust", &TokenReader::trust, arg("damages"));
}

}  // namespace engraphy
