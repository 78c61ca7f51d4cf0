// What a plan was made for: the objects of Python whose change makes it worthless.
#pragma once

#include <nanobind/nanobind.h>

#include <vector>

#include "tensor.hpp"

namespace engraphy {

class Premises {
  public:
    Premises() = default;

    // empty: dictionaries that have nothing in them. entries: (dictionary, key, what it has there
    // or None). tensors: all of one kind.
    Premises(nanobind::list empty, nanobind::list entries, nanobind::list tensors) {
        for (nanobind::handle dictionary : empty) empty_.push_back(nanobind::borrow(dictionary));
        for (nanobind::handle entry : entries)
            entries_.push_back({entry[0], entry[1], entry[2]});
        for (nanobind::handle tensor : tensors) {
            TensorView view = {};
            usable_ &= view_of(tensor.ptr(), view);
            tensors_.push_back({nanobind::borrow(tensor), view});
        }
    }

    // Brings near what `hold` looks at. Between two tokens a model drives it out of the caches.
    void fetch() const {
        for (const nanobind::object &dictionary : empty_) __builtin_prefetch(dictionary.ptr());
        for (const Entry &entry : entries_) __builtin_prefetch(entry.dictionary.ptr());
        for (const Seen &seen : tensors_) __builtin_prefetch(seen.tensor.ptr());
    }

    // Whether nothing has changed. The caller has the GIL.
    bool hold() const {
        if (!usable_) return false;
        for (const nanobind::object &dictionary : empty_)
            if (PyDict_GET_SIZE(dictionary.ptr())) return false;
        for (const Entry &entry : entries_) {
            PyObject *const found = PyDict_GetItem(entry.dictionary.ptr(), entry.key.ptr());
            if ((found ? found : Py_None) != entry.value.ptr()) return false;
        }
        for (const Seen &seen : tensors_) {
            TensorView now;
            if (!view_of(seen.tensor.ptr(), now)) return false;
            if (now.data != seen.view.data || now.kind != seen.view.kind ||
                now.values != seen.view.values)
                return false;
        }
        return true;
    }

    // For the garbage collector.
    int traverse(visitproc visit, void *arg) const {
        for (const nanobind::object &dictionary : empty_) Py_VISIT(dictionary.ptr());
        for (const Entry &entry : entries_) {
            Py_VISIT(entry.dictionary.ptr());
            Py_VISIT(entry.value.ptr());
        }
        for (const Seen &seen : tensors_) Py_VISIT(seen.tensor.ptr());
        return 0;
    }

  private:
    struct Entry { nanobind::object dictionary, key, value; };
    struct Seen { nanobind::object tensor; TensorView view; };

    std::vector<nanobind::object> empty_;
    std::vector<Entry> entries_;
    std::vector<Seen> tensors_;
    bool usable_ = true;
};

}  // namespace engraphy
