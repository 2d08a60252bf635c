#include "unchanged.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

namespace metafast {
namespace {

namespace py = pybind11;

// Without counting references, of lists that stand still.
PyObject* item(const py::list& list, Py_ssize_t i) { return PyList_GET_ITEM(list.ptr(), i); }

// A borrowed reference, null where there is no such key.
PyObject* entry(PyObject* table, PyObject* key) {
  PyObject* const found = PyDict_GetItemWithError(table, key);
  if (found == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return found;
}

bool has_keys(PyObject* table, PyObject* keys) {
  if (PyDict_Size(table) != PyList_GET_SIZE(keys)) return false;
  Py_ssize_t position = 0, i = 0;
  for (PyObject* key = nullptr; PyDict_Next(table, &position, &key, nullptr) != 0; ++i) {
    const int equal = PyObject_RichCompareBool(key, PyList_GET_ITEM(keys, i), Py_EQ);
    if (equal < 0) throw py::error_already_set();
    if (equal == 0) return false;
  }
  return true;
}

Py_ssize_t count(const py::list& list) { return PyList_GET_SIZE(list.ptr()); }

bool any(PyObject* hooks) {
  const int found = hooks == nullptr ? 0 : PyObject_IsTrue(hooks);
  if (found < 0) throw py::error_already_set();
  return found != 0;
}

}  // namespace

bool entries_are(const py::list& tables, const py::list& keys, const py::list& values, const py::list& empty,
                 const py::list& sized, const py::list& sizes, const py::list& ordered,
                 const py::list& orders) {
  for (Py_ssize_t i = 0; i < count(tables); ++i) {
    if (entry(item(tables, i), item(keys, i)) != item(values, i)) return false;
  }
  for (Py_ssize_t i = 0; i < count(empty); ++i) {
    if (PyDict_Size(item(empty, i)) != 0) return false;
  }
  for (Py_ssize_t i = 0; i < count(sized); ++i) {
    if (PyDict_Size(item(sized, i)) != PyLong_AsSsize_t(item(sizes, i))) return false;
  }
  for (Py_ssize_t i = 0; i < count(ordered); ++i) {
    if (!has_keys(item(ordered, i), item(orders, i))) return false;
  }
  return true;
}

bool modules_are(const py::list& modules, const py::list& types, const py::list& parameters,
                 const py::list& requires_grad, const py::list& classes, const py::list& forwards) {
  for (Py_ssize_t i = 0; i < count(modules); ++i) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(item(modules, i))) != item(types, i)) return false;
  }
  for (Py_ssize_t i = 0; i < count(parameters); ++i) {
    if (THPVariable_Unpack(item(parameters, i)).requires_grad() != (item(requires_grad, i) == Py_True))
      return false;
  }
  for (Py_ssize_t i = 0; i < count(classes); ++i) {
    const py::object forward = py::getattr(item(classes, i), "forward");
    if (!forward.equal(py::handle(item(forwards, i)))) return false;
  }
  return true;
}

bool hooked(const py::iterable& tensors) {
  for (const py::handle tensor : tensors) {
    if (!THPVariable_Check(tensor.ptr())) throw py::type_error("hooked: expected tensors");
    const auto* const variable = reinterpret_cast<const THPVariable*>(tensor.ptr());
    if (any(variable->backward_hooks) || any(variable->post_accumulate_grad_hooks)) return true;
  }
  return false;
}

}  // namespace metafast
