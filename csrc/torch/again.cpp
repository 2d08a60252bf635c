#include "again.h"

#include <ATen/autocast_mode.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <array>

#include "unchanged.h"

namespace metafast {
namespace {

namespace py = pybind11;
using at::Tensor;

// Looked up once: attributes by names that are strings already.
struct Names {
  static py::handle of(const char* name) { return PyUnicode_InternFromString(name); }
  const std::array<py::handle, 4> sides{of("support_x"), of("support_y"), of("query_x"), of("query_y")};
  const py::handle versions = of("_versions"), signature = of("_signature");
  const std::array<py::handle, 4> outcome{of("loss"), of("losses"), of("logits"), of("accuracy")};
};

const Names& names() {
  static const Names found;
  return found;
}

py::object attribute(const py::handle& of, const py::handle& name) {
  PyObject* const found = PyObject_GetAttr(of.ptr(), name.ptr());
  if (found == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(found);
}

// The four tensors, if their contents are those that were checked and of the signature.
std::optional<std::array<Tensor, 4>> tensors_of(const py::handle& episodes, const py::object& signature) {
  const py::object checked = attribute(episodes, names().versions);
  if (!PyTuple_CheckExact(checked.ptr()) || PyTuple_GET_SIZE(checked.ptr()) != 4) return std::nullopt;
  std::array<Tensor, 4> found;
  for (size_t i = 0; i < 4; ++i) {
    const py::object side = attribute(episodes, names().sides[i]);
    if (!THPVariable_Check(side.ptr())) return std::nullopt;
    found[i] = THPVariable_Unpack(side.ptr());
    PyObject* const version = PyTuple_GET_ITEM(checked.ptr(), Py_ssize_t(i));
    int overflow = 0;
    if (!PyLong_CheckExact(version) || found[i].is_inference() || found[i].requires_grad() ||
        found[i]._version() != PyLong_AsLongLongAndOverflow(version, &overflow))
      return std::nullopt;
  }
  const py::object own = attribute(episodes, names().signature);
  if (!own.is(signature) && !own.equal(signature)) return std::nullopt;
  return found;
}

// Frozen for its users: filled in past its __setattr__.
py::object outcome_of(const MetaOutcome& out, const py::type& type) {
  auto* const plain = reinterpret_cast<PyTypeObject*>(type.ptr());
  auto made = py::reinterpret_steal<py::object>(plain->tp_alloc(plain, 0));
  if (!made) throw py::error_already_set();
  const auto set = [&](size_t i, const py::object& value) {
    if (!value || PyObject_GenericSetAttr(made.ptr(), names().outcome[i].ptr(), value.ptr()) != 0)
      throw py::error_already_set();
  };
  const auto wrapped = [](const Tensor& t) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(t)); };
  set(0, wrapped(out.loss));
  set(1, wrapped(out.losses));
  set(2, wrapped(out.logits));
  set(3, out.accuracy ? wrapped(*out.accuracy) : py::none());
  return made;
}

}  // namespace

py::object again(const py::handle& owner, const std::shared_ptr<Engine>& engine, const Inner& inner,
                 const py::tuple& watched, const py::object& signature, const py::type& episodes_type,
                 const py::type& outcome_type, const py::handle& learner, const py::handle& episodes,
                 bool accumulate) {
  if (!learner.is(owner) || !py::type::handle_of(episodes).is(episodes_type) ||
      c10::InferenceMode::is_enabled() || at::autocast::is_autocast_enabled(at::kCPU) ||
      at::autocast::is_autocast_enabled(at::kCUDA) || !unchanged(watched))
    return py::none();
  const auto tensors = tensors_of(episodes, signature);
  if (!tensors) return py::none();
  const py::handle parameters = watched_parameters(watched);
  // What only autograd calls.
  if (accumulate && hooked(parameters)) return py::none();
  std::vector<Tensor> params;
  params.reserve(size_t(PyList_GET_SIZE(parameters.ptr())));
  for (const py::handle p : parameters) params.push_back(THPVariable_Unpack(p.ptr()));
  const Side support{(*tensors)[0], (*tensors)[1]}, query{(*tensors)[2], (*tensors)[3]};
  const auto function = accumulate ? &Engine::accumulate : &Engine::meta_step;
  const MetaOutcome out = [&] {
    const py::gil_scoped_release release;
    return ((*engine).*function)(params, Tensor(), support, query, inner, std::nullopt);
  }();
  return outcome_of(out, outcome_type);
}

}  // namespace metafast
