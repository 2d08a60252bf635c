// What crosses to the kernels of weighted_sum, the meta-gradient's sum over tasks: no torch in here.
//
//   out[p] = sum_t weights[t] x[t, p]
//
// Letters: T tasks, P parameters of a task.
#pragma once

#include <cstdint>

namespace metafast {

template <class Real>
struct WeightedSum {
  const Real* x;        // (T, P)
  const Real* weights;  // (T,); null: 1 everywhere
  int64_t tasks;        // T
  int64_t size;         // P
  Real* out;            // (P,), overwritten; overlaps no input
};

}  // namespace metafast
