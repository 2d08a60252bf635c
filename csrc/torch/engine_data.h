// What the engine's files share: the CPU's functions, and parts of tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../cpu/isa.h"
#include "../cpu/job.h"

namespace metafast {

// Those of the instruction set in use.
template <class Real>
const cpu::EngineFunctions<Real>& engine_functions() {
  static constexpr cpu::IsaTables<cpu::EngineTable> kTables = METAFAST_ISA_TABLES(cpu::kEngine);
  return cpu::functions_for<Real>(kTables.current());
}

template <class Real>
const Real* data_or_null(const at::Tensor& t) {
  return t.defined() && t.numel() > 0 ? t.const_data_ptr<Real>() : nullptr;
}

// f(tensor, where its part begins of a vector that has the tensors' numbers one after the other).
template <class F>
void for_parts(const std::vector<at::Tensor>& tensors, const F& f) {
  int64_t at = 0;
  for (const at::Tensor& t : tensors) {
    f(t, at);
    at += t.numel();
  }
}

}  // namespace metafast
