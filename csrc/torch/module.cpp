// metafast._C: what is no tensor operator. Operators register themselves when the library is loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cpu/isa.h"
#include "build_info.h"  // written by setup.py: kBuildInfo, JSON

PYBIND11_MODULE(_C, m) {
  m.doc() = "metafast's compiled kernels; metafast._native is the way in.";
  m.def("build_info", [] { return metafast::kBuildInfo; }, "What setup.py decided, as JSON.");
  m.def("isas", metafast::cpu::supported, "Instruction sets of this build that run here, ascending.");
  m.def("isa", metafast::cpu::current_name, "The instruction set in use.");
  m.def("use_isa", metafast::cpu::use, pybind11::arg("isa"), "Force an instruction set, for tests.");
}
