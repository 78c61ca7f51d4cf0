// Hot indexes: look-ups, and the levels of a perfect hash. The plain versions are
// addresses/hot.py and addresses/perfect_hash.py.
#include "bind.hpp"

#include <algorithm>
#include <memory>
#include <vector>

#include <nanobind/stl/vector.h>

#include "hot_table.hpp"
#include "kernels.hpp"
#include "threads.hpp"

namespace nb = nanobind;

namespace engraphy {
namespace {

constexpr int64_t few = 1 << 12;  // n-grams that one thread looks up

// N-grams [first, first + count) of int32 ids [N, n], the oldest first, as columns of a tile.
void transpose(const int32_t *ids, int64_t order, int64_t first, int count, int64_t *terms) {
    const int32_t *from = ids + first * order;
    for (int64_t i = 0; i < order; i++)
        for (int j = 0; j < count; j++) terms[i * hot_tile + j] = from[(j + 1) * order - 1 - i];
}

// work(first, count) for the tiles of `count` n-grams, by the threads of `parts` parts.
template <class Work> void each_tile(int64_t count, const Work &work) {
    const int64_t tiles = (count + hot_tile - 1) / hot_tile;
    const int64_t parts = count < few ? 1 : std::min<int64_t>(tiles, 4 * threads());
    computing().each(parts, threads(), [&](int64_t part) {
        for (int64_t i = tiles * part / parts; i < tiles * (part + 1) / parts; i++)
            work(i * hot_tile, int(std::min<int64_t>(hot_tile, count - i * hot_tile)));
    });
}

void find(const HotOrder &order, uintptr_t ids, int64_t count, uintptr_t slots) {
    const HotTable &table = order.table();
    require(count >= 0 && (!count || (ids && slots)), "ids and slots must be present");
    const Unlocked unlocked(count * 64);
    each_tile(count, [&](int64_t first, int n) {
        int64_t terms[max_order * hot_tile];
        transpose((const int32_t *)ids, table.order, first, n, terms);
        kernels().hot_find(table, terms, hot_tile, n, (int64_t *)slots + first);
    });
}

// Writes the records of all keys; `records` is the table's own memory.
void fill(const HotOrder &order, uintptr_t ids, uintptr_t slots, uintptr_t records) {
    const HotTable &table = order.table();
    require(ids && slots && records, "ids, slots and records must be present");
    const bool has_marks = table.fingerprint_bits;
    const int kept = has_marks ? 0 : table.order, width = table.width;
    nb::gil_scoped_release released;
    each_tile(table.keys, [&](int64_t first, int n) {
        int64_t terms[max_order * hot_tile], ranks[hot_tile];
        uint32_t marks[hot_tile];
        transpose((const int32_t *)ids, table.order, first, n, terms);
        kernels().hot_ranks(table, terms, hot_tile, n, ranks, marks);
        for (int j = 0; j < n; j++) {
            if (ranks[j] < 0) continue;
            uint32_t *record = (uint32_t *)records + ranks[j] * width;
            record[0] = (uint32_t)((const int64_t *)slots)[first + j];
            if (has_marks) record[1] = marks[j];
            for (int i = 0; i < kept; i++) record[kept - i] = (uint32_t)terms[i * hot_tile + j];
        }
    });
}

// The levels of a perfect hash while they are made. Hashes [begin, end) of each part are those of
// its keys that have no bit yet.
class Levels {
  public:
    Levels(const int32_t *ids, int64_t count, int64_t order, uint64_t seed)
        : count_(count), hashes_(new uint64_t[count]), parts_(count < few ? 1 : threads()), ends_(parts_ + 1), left_(count) {
        for (int64_t p = 0; p <= parts_; p++) ends_[p] = begin(p);
        computing().each(parts_, threads(), [&](int64_t part) {
            for (int64_t k = begin(part); k < begin(part + 1); k++) {
                uint64_t hash = hot_start(seed);
                for (int64_t i = 0; i < order; i++)
                    hash = hot_mixed(hash, (uint64_t)ids[k * order + i]);
                hashes_[k] = hash;
            }
            ends_[part] = begin(part + 1);
        });
    }

    // Adds a level of so many lines.
    void add(int64_t size) {
        const int level = int(sizes.size());
        words_.assign(size * (hot_words - 1), 0);
        computing().each(parts_, threads(), [&](int64_t part) { mark(part, level, size); });
        computing().each(parts_, threads(), [&](int64_t part) { compact(part, level, size); });
        left_ = 0;
        for (int64_t p = 0; p < parts_; p++) left_ += ends_[p] - begin(p);
        sizes.push_back(size);
        const size_t first = lines.size();
        lines.resize(first + size * hot_words);
        for (int64_t b = 0; b < size; b++) {
            uint32_t *line = lines.data() + first + b * hot_words;
            line[0] = uint32_t(set_);
            for (int w = 0; w < hot_words - 1; w++) {
                const uint64_t word = words_[b * (hot_words - 1) + w];
                line[1 + w] = uint32_t(word) & ~uint32_t(word >> 32);
                set_ += __builtin_popcount(line[1 + w]);
            }
        }
    }

    int64_t left() const { return left_; }

    std::vector<uint64_t> left_hashes() const {
        std::vector<uint64_t> hashes;
        for (int64_t p = 0; p < parts_; p++)
            hashes.insert(hashes.end(), &hashes_[begin(p)], &hashes_[ends_[p]]);
        return hashes;
    }

    std::vector<int64_t> sizes;
    std::vector<uint32_t> lines;

  private:
    int64_t begin(int64_t part) const { return count_ * part / parts_; }

    // Where the keys of a tile fall in a level: words of words_, and bits of their lower halves.
    struct Places {
        Places(uint64_t *words, const uint64_t *hashes, int64_t left, int level, int64_t size)
            : count(int(std::min<int64_t>(hot_tile, left))) {
            for (int j = 0; j < count; j++) {
                const uint64_t z = hot_level(hashes[j], level);
                const uint32_t bit = hot_bit(z);
                word[j] = words + hot_line(z, size) * (hot_words - 1) + bit / 32;
                once[j] = uint64_t{1} << bit % 32;
                __builtin_prefetch(word[j], 1);
            }
        }

        const int count;
        uint64_t *word[hot_tile];
        uint64_t once[hot_tile];
    };

    // A word is 32 bits that some key falls on, and above them those that several do. Which key
    // came first makes no difference, nor is there a branch on it.
    void mark(int64_t part, int level, int64_t size) {
        for (int64_t k = begin(part); k < ends_[part]; k += hot_tile) {
            const Places to(words_.data(), &hashes_[k], ends_[part] - k, level, size);
            for (int j = 0; j < to.count; j++) {
                const uint64_t once = to.once[j];
                if (parts_ == 1) {
                    const uint64_t before = *to.word[j];
                    *to.word[j] = before | once | (before & once) << 32;
                } else if (__atomic_fetch_or(to.word[j], once, __ATOMIC_RELAXED) & once) {
                    __atomic_fetch_or(to.word[j], once << 32, __ATOMIC_RELAXED);
                }
            }
        }
    }

    void compact(int64_t part, int level, int64_t size) {
        int64_t kept = begin(part);
        for (int64_t k = begin(part); k < ends_[part]; k += hot_tile) {
            const Places to(words_.data(), &hashes_[k], ends_[part] - k, level, size);
            for (int j = 0; j < to.count; j++) {
                hashes_[kept] = hashes_[k + j];
                kept += (*to.word[j] >> 32 & to.once[j]) != 0;
            }
        }
        ends_[part] = kept;
    }

    const int64_t count_;
    const std::unique_ptr<uint64_t[]> hashes_;  // written before they are read: no vector
    std::vector<uint64_t> words_;
    const int64_t parts_;
    std::vector<int64_t> ends_;
    int64_t left_;
    int64_t set_ = 0;  // bits of all levels
};

template <class T> nb::object bytes_of(const std::vector<T> &values) {
    const nb::object made = nb::steal(
        PyByteArray_FromStringAndSize((const char *)values.data(), values.size() * sizeof(T)));
    if (!made) throw nb::python_error();
    return made;
}

nb::tuple levels(uintptr_t ids, int64_t count, int64_t order, uint64_t seed, int64_t room,
                 int64_t of) {
    require(count >= 0 && order > 0 && order <= max_order && room > 0 && of > 0 && (!count || ids),
            "sizes must be positive, ids present");
    std::vector<int64_t> sizes;
    std::vector<uint32_t> lines;
    std::vector<uint64_t> left;
    {
        nb::gil_scoped_release released;
        Levels made((const int32_t *)ids, count, order, seed);
        while (made.left() && made.sizes.size() < hot_levels) {
            const int64_t whole = of * hot_bits;
            made.add((room * made.left() + whole - 1) / whole);
        }
        left = made.left_hashes();
        sizes = std::move(made.sizes);
        lines = std::move(made.lines);
    }
    return nb::make_tuple(sizes, bytes_of(lines), bytes_of(left));
}

}  // namespace

void bind_hot(nb::module_ &m) {
    using nb::arg;
    m.def("hot_levels", &levels, arg("ids"), arg("count"), arg("order"), arg("seed"), arg("room"),
          arg("of"));
    nb::class_<HotOrder>(m, "HotOrder")
        .def(nb::init<int, uint64_t, std::vector<int64_t>, uintptr_t, uintptr_t, int64_t, int,
                      int64_t, nb::object>(),
             arg("order"), arg("seed"), arg("sizes"), arg("lines"), arg("records"), arg("keys"),
             arg("fingerprint_bits"), arg("slots"), arg("owner"))
        .def("find", &find, arg("ids"), arg("count"), arg("slots"))
        .def("fill", &fill, arg("ids"), arg("slots"), arg("records"));
}

}  // namespace engraphy
