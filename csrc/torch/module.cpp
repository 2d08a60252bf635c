// metafast._C: what is no tensor operator. Operators register themselves when the library is loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "../cpu/isa.h"
#include "again.h"
#include "build_info.h"  // written by setup.py: kBuildInfo, JSON
#include "engine.h"
#include "simt.h"
#include "unchanged.h"

#ifdef METAFAST_WITH_SIMT
#include "../simt/emulator.h"
#endif

namespace py = pybind11;
using at::Tensor;
using metafast::Engine;
using metafast::Inner;
using metafast::Side;
using Params = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

namespace {

using Outcome = std::tuple<Tensor, Tensor, Tensor, MaybeTensor>;

Outcome as_tuple(metafast::MetaOutcome&& out) {
  return {std::move(out.loss), std::move(out.losses), std::move(out.logits), std::move(out.accuracy)};
}

const Tensor& or_none(const MaybeTensor& t) {
  static const Tensor none;
  return t ? *t : none;
}

using MetaFunction = metafast::MetaOutcome (Engine::*)(const Params&, const Tensor&, const Side&, const Side&,
                                                       const Inner&, const MaybeTensor&);

template <MetaFunction function>
Outcome meta(Engine& engine, const Params& params, const MaybeTensor& constants, const Tensor& support_x,
             const Tensor& support_y, const Tensor& query_x, const Tensor& query_y, int64_t steps,
             double rate, const MaybeTensor& rates, bool first_order, int64_t batch,
             const std::vector<double>& query_weights, int64_t truncate, const std::vector<Tensor>& lstm,
             double p, const MaybeTensor& moves, const MaybeTensor& weights, int64_t ways,
             const std::string& metric) {
  const py::gil_scoped_release release;
  const Inner inner{steps,    rate, rates, first_order, batch, query_weights,
                    truncate, lstm, p,     moves,       ways,  metric};
  return as_tuple((engine.*function)(params, or_none(constants), {support_x, support_y}, {query_x, query_y},
                                     inner, weights));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "metafast's compiled kernels; metafast._native is the way in.";
  m.def("build_info", [] { return metafast::kBuildInfo; }, "What setup.py decided, as JSON.");
  m.def("isas", metafast::cpu::supported, "Instruction sets of this build that run here, ascending.");
  m.def("isa", metafast::cpu::current_name, "The instruction set in use.");
  m.def("unchanged", metafast::unchanged, "Whether all that metafast/engine/guard.py watches is as it was.");
  m.def("hooked", metafast::hooked, "Whether one of the tensors has hooks, which only autograd calls.");
  m.def("use_isa", metafast::cpu::use, py::arg("isa"), "Force an instruction set, for tests.");

  m.def(
      "one_launch_where_fit", [](bool on) { metafast::one_launch_where_fit = on; }, py::arg("on"),
      "On a GPU, plain meta-steps of small MLPs are one launch: on unless told otherwise.");

#ifdef METAFAST_WITH_SIMT
  m.def("force_simt", [](bool on) { metafast::simt_forced = on; }, "CPU tensors go to the emulated kernels.");
  m.def(
      "simt_library_products", [](bool on) { metafast::simt_library_products = on; }, py::arg("on"),
      "There products of plain matrices go by ATen, as large ones do on a GPU.");
  m.def("simt_order", emulator::set_order, py::arg("order"), "The order that threads and blocks run in.");
  m.def("simt_blocks", emulator::blocks, "Blocks that the emulator has run so far.");
  m.def("simt_launches", emulator::launches, "Kernels that the emulator has begun so far.");
  m.attr("SIMT_ORDERS") = emulator::kOrders;
#endif

  py::class_<Inner>(m, "PlainInner",
                    "An inner loop of phi - rate g from learned parameters, one rate for all.")
      .def(py::init([](int64_t steps, double rate, bool first_order, int64_t batch,
                       const std::vector<double>& query_weights, int64_t truncate) {
             Inner inner{};
             inner.steps = steps, inner.rate = rate, inner.first_order = first_order, inner.batch = batch;
             inner.query_weights = query_weights, inner.truncate = truncate;
             return inner;
           }),
           py::arg("steps"), py::arg("rate"), py::arg("first_order"), py::arg("batch"),
           py::arg("query_weights"), py::arg("truncate"));

  const auto release = py::call_guard<py::gil_scoped_release>();
  py::class_<Engine, std::shared_ptr<Engine>>(m, "Engine",
                                              "A lowered network in one dtype; metafast/engine/native.py.")
      .def(py::init([](const std::vector<int64_t>& ints, const std::vector<double>& numbers,
                       at::ScalarType dtype) { return std::make_shared<Engine>(ints, numbers, dtype); }),
           py::arg("ints"), py::arg("numbers"), py::arg("dtype"))
      .def(
          "outputs",
          [](Engine& e, const Tensor& phi, const MaybeTensor& constants, const Tensor& x) {
            return e.outputs(phi, or_none(constants), x);
          },
          release)
      .def(
          "pullback",
          [](Engine& e, const Tensor& phi, const MaybeTensor& constants, const Tensor& x,
             const Tensor& cotangent) { return e.pullback(phi, or_none(constants), x, cotangent); },
          release)
      .def(
          "gradient",
          [](Engine& e, const Tensor& phi, const MaybeTensor& constants, const Tensor& x, const Tensor& y) {
            return e.gradient(phi, or_none(constants), {x, y});
          },
          release)
      .def(
          "hvp",
          [](Engine& e, const Tensor& phi, const MaybeTensor& constants, const Tensor& x, const Tensor& y,
             const Tensor& vector) { return e.hvp(phi, or_none(constants), {x, y}, vector); },
          release)
      .def("meta_step", meta<&Engine::meta_step>)
      .def("accumulate", meta<&Engine::accumulate>)
      .def("workspace", &Engine::workspace, py::arg("support"), py::arg("query"), py::arg("steps"),
           "Bytes of a thread's workspace for a meta-step, and of them the tape of parameters.")
      .def(
          "together",
          [](const Engine& e, int64_t tasks, int64_t support, int64_t query) {
            return e.together(tasks, support, query, true, true).most;
          },
          py::arg("tasks"), py::arg("support"), py::arg("query"),
          "How many tasks of a meta-step of one plain inner step share what they do with theta; 0: none do.")
      .def("shares_tasks", &Engine::shares_tasks, py::arg("tasks"), py::arg("samples"), py::arg("threads"),
           "Whether so many tasks run one after the other, each on all threads.")
      .def("layouts", &Engine::layouts, "Workspace layouts kept, of the latest sizes of episodes.")
      .def("winograd_from", &Engine::winograd_from,
           "The fewest samples with which each convolution goes by Winograd's algorithm, 0: never.");
  m.def("again", metafast::again, "A meta-step like one before: metafast/engine/again.py.");
}
