#include "unchanged.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

namespace metafast {
namespace {

namespace py = pybind11;

// Where the lists lie in a Watched.
enum Field : Py_ssize_t {
  kTables,
  kKeys,
  kValues,
  kEmpty,
  kSized,
  kSizes,
  kOrdered,
  kOrders,
  kTyped,
  kKinds,
  kModules,
  kTypes,
  kAttributes,
  kParameters,
  kRequiresGrad,
  kClasses,
  kForwards,
  kFields
};

// Without counting references, of lists that stand still.
PyObject* item(PyObject* list, Py_ssize_t i) { return PyList_GET_ITEM(list, i); }

// A borrowed reference, null where there is no such key.
PyObject* entry(PyObject* table, PyObject* key) {
  PyObject* const found = PyDict_GetItemWithError(table, key);
  if (found == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return found;
}

bool equal(PyObject* a, PyObject* b) {
  const int found = PyObject_RichCompareBool(a, b, Py_EQ);
  if (found < 0) throw py::error_already_set();
  return found != 0;
}

bool has_keys(PyObject* table, PyObject* keys) {
  if (PyDict_Size(table) != PyList_GET_SIZE(keys)) return false;
  Py_ssize_t position = 0, i = 0;
  for (PyObject* key = nullptr; PyDict_Next(table, &position, &key, nullptr) != 0; ++i) {
    if (!equal(key, item(keys, i))) return false;
  }
  return true;
}

bool has_type(PyObject* value, PyObject* type) { return reinterpret_cast<PyObject*>(Py_TYPE(value)) == type; }

bool has_attributes(PyObject* of, PyObject* attributes) {
  const auto found = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(of, nullptr));
  if (!found) throw py::error_already_set();
  return found.ptr() == attributes;
}

bool has_types(PyObject* table, PyObject* types) {
  if (PyDict_Size(table) != PyList_GET_SIZE(types)) return false;
  Py_ssize_t position = 0, i = 0;
  for (PyObject* value = nullptr; PyDict_Next(table, &position, nullptr, &value) != 0; ++i) {
    if (!has_type(value, item(types, i))) return false;
  }
  return true;
}

bool any(PyObject* hooks) {
  const int found = hooks == nullptr ? 0 : PyObject_IsTrue(hooks);
  if (found < 0) throw py::error_already_set();
  return found != 0;
}

}  // namespace

bool unchanged(const py::tuple& watched) {
  if (PyTuple_GET_SIZE(watched.ptr()) != kFields) throw py::type_error("watched: expected a Watched");
  // Whether same(list's i-th item, the other's) holds for all i.
  const auto all = [&](Field first, Field second, const auto& same) {
    PyObject *const a = PyTuple_GET_ITEM(watched.ptr(), first), *const b =
                                                                    PyTuple_GET_ITEM(watched.ptr(), second);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(a); ++i) {
      if (!same(item(a, i), item(b, i))) return false;
    }
    return true;
  };
  PyObject *const values = PyTuple_GET_ITEM(watched.ptr(), kValues), *const empty = PyTuple_GET_ITEM(
                                                                         watched.ptr(), kEmpty);
  Py_ssize_t at = 0;
  if (!all(kTables, kKeys,
           [&](PyObject* table, PyObject* key) { return entry(table, key) == item(values, at++); }))
    return false;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(empty); ++i) {
    if (PyDict_Size(item(empty, i)) != 0) return false;
  }
  return all(kSized, kSizes,
             [](PyObject* table, PyObject* size) { return PyDict_Size(table) == PyLong_AsSsize_t(size); }) &&
         all(kOrdered, kOrders, has_keys) && all(kTyped, kKinds, has_types) &&
         all(kModules, kTypes, has_type) && all(kModules, kAttributes, has_attributes) &&
         all(kParameters, kRequiresGrad,
             [](PyObject* parameter, PyObject* requires_grad) {
               return THPVariable_Unpack(parameter).requires_grad() == (requires_grad == Py_True);
             }) &&
         all(kClasses, kForwards, [](PyObject* type, PyObject* forward) {
           return equal(py::getattr(type, "forward").ptr(), forward);
         });
}

py::handle watched_parameters(const py::tuple& watched) {
  return PyTuple_GET_ITEM(watched.ptr(), kParameters);
}

bool hooked(const py::handle& tensors) {
  for (const py::handle tensor : tensors) {
    if (!THPVariable_Check(tensor.ptr())) throw py::type_error("hooked: expected tensors");
    const auto* const variable = reinterpret_cast<const THPVariable*>(tensor.ptr());
    if (any(variable->backward_hooks) || any(variable->post_accumulate_grad_hooks)) return true;
  }
  return false;
}

}  // namespace metafast
