// snapshot(): the containers of a nested state copied, in one pass, at the speed of pointers.
//
// async_save with an optimizer's fence must fix what the state is before it returns, in well under a millisecond for
// 10,000 tensors. Tensors that the optimizer owns stay as they are until its next step, so copying the dicts and lists
// around them is enough. What is neither a guarded tensor nor immutable is returned for the caller to deal with.
#include <vector>

#include "bind/bind.h"

namespace snapstone::bind {
namespace {

constexpr int kDepthMax = 200;

class PointerSet {
 public:
  PointerSet() : slots_(1024, nullptr) {}

  void insert(const void* pointer) {
    if (count_ * 2 >= slots_.size()) grow();
    const void*& slot = find(pointer);
    count_ += slot == nullptr ? 1 : 0;
    slot = pointer;
  }
  bool contains(const void* pointer) { return find(pointer) != nullptr; }

 private:
  const void*& find(const void* pointer) {
    const std::size_t mask = slots_.size() - 1;
    std::size_t at = (reinterpret_cast<std::uintptr_t>(pointer) * 0x9E3779B97F4A7C15ull >> 20) & mask;
    while (slots_[at] != nullptr && slots_[at] != pointer) at = (at + 1) & mask;
    return slots_[at];
  }
  void grow() {
    std::vector<const void*> old(slots_.size() * 2, nullptr);
    old.swap(slots_);
    for (const void* pointer : old) {
      if (pointer != nullptr) find(pointer) = pointer;
    }
  }

  std::vector<const void*> slots_;
  std::size_t count_ = 0;
};

class Snapshot {
 public:
  explicit Snapshot(const py::tuple& tensor_types) {
    for (const py::handle type : tensor_types) tensor_types_.push_back(reinterpret_cast<PyTypeObject*>(type.ptr()));
  }

  // Every tensor inside dicts (of any subclass), lists and tuples is guarded.
  void guard(PyObject* value, int depth) {
    if (depth > kDepthMax) return;
    if (is_tensor(value)) {
      guarded_.insert(value);
    } else if (PyDict_Check(value)) {
      PyObject *key, *item;
      Py_ssize_t position = 0;
      while (PyDict_Next(value, &position, &key, &item)) guard(item, depth + 1);
    } else if (PyList_CheckExact(value) || PyTuple_CheckExact(value)) {
      for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(value); ++i)
        guard(PySequence_Fast_GET_ITEM(value, i), depth + 1);
    }
  }

  py::object copy(PyObject* value, int depth) {
    if (depth > kDepthMax) throw py::value_error("the state is nested more than 200 levels deep, or contains itself");
    return PyDict_CheckExact(value) ? copy_dict(value, depth) : copy_list(value, depth);
  }

  py::list rest;  // (copied container, key or index, value)

 private:
  py::object copy_dict(PyObject* value, int depth) {
    auto result = py::reinterpret_steal<py::object>(PyDict_Copy(value));
    if (!result) throw py::error_already_set();
    PyObject *key, *item;
    Py_ssize_t position = 0;
    while (PyDict_Next(value, &position, &key, &item)) {
      if (guarded_.contains(item)) continue;  // before anything looks into the object: most are cold in cache
      if (is_container(item)) {
        if (PyDict_SetItem(result.ptr(), key, copy(item, depth + 1).ptr()) != 0) throw py::error_already_set();
      } else if (!is_settled(item)) {
        rest.append(
            py::make_tuple(result, py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(item)));
      }
    }
    return result;
  }

  py::object copy_list(PyObject* value, int depth) {
    auto result = py::reinterpret_steal<py::object>(PyList_GetSlice(value, 0, PyList_GET_SIZE(value)));
    if (!result) throw py::error_already_set();
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(result.ptr()); ++i) {
      PyObject* item = PyList_GET_ITEM(result.ptr(), i);
      if (guarded_.contains(item)) continue;
      if (is_container(item)) {
        if (PyList_SetItem(result.ptr(), i, copy(item, depth + 1).release().ptr()) != 0) throw py::error_already_set();
      } else if (!is_settled(item)) {
        rest.append(py::make_tuple(result, i, py::reinterpret_borrow<py::object>(item)));
      }
    }
    return result;
  }

  static bool is_container(PyObject* value) { return PyDict_CheckExact(value) || PyList_CheckExact(value); }

  bool is_tensor(PyObject* value) const {
    for (PyTypeObject* type : tensor_types_) {
      if (Py_TYPE(value) == type) return true;
    }
    return false;
  }

  static bool is_scalar(PyObject* value) {
    return value == Py_None || PyBool_Check(value) || PyLong_CheckExact(value) || PyFloat_CheckExact(value) ||
           PyUnicode_CheckExact(value) || PyBytes_CheckExact(value);
  }

  // Scalars and tuples of them, such as the betas of Adam.
  static bool is_settled(PyObject* value) {
    if (!PyTuple_CheckExact(value)) return is_scalar(value);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i) {
      if (!is_scalar(PyTuple_GET_ITEM(value, i))) return false;
    }
    return true;
  }

  std::vector<PyTypeObject*> tensor_types_;
  PointerSet guarded_;
};

py::tuple snapshot(const py::dict& state, const py::list& guards, const py::tuple& tensor_types) {
  Snapshot walk(tensor_types);
  for (const py::handle guard : guards) walk.guard(guard.ptr(), 0);
  if (!PyDict_CheckExact(state.ptr())) throw py::type_error("the state is not a plain dict");
  py::object copy = walk.copy(state.ptr(), 0);
  return py::make_tuple(copy, walk.rest);
}

}  // namespace

void bind_state(py::module_& module) {
  module.def("snapshot", &snapshot, py::arg("state"), py::arg("guards"), py::arg("tensor_types"),
             "(copy of the nested dicts and lists, [(copied container, key, value), ...] of what is neither guarded "
             "nor immutable)");
}

}  // namespace snapstone::bind
