// What crosses from the front door of inner_update (torch/inner_update.cpp) to its kernels: no torch in here.
//
//   updated[t, p] = params[t, p] - scale * lr[t, p] * grads[t, p]
//
// Letters: T tasks, P parameters of a task.
#pragma once

#include <cstdint>

namespace metafast {

template <class Real>
struct InnerUpdate {
  const Real* params;  // (T, P)
  const Real* grads;   // (T, P)
  const Real* lr;      // [t, p] at lr[t * lr_task + p * lr_param]; null: 1 everywhere
  int64_t lr_task;     // any
  int64_t lr_param;    // 0: one rate for all parameters of a task, or 1
  Real scale;
  int64_t tasks;  // T
  int64_t size;   // P
  Real* updated;  // (T, P), overwritten; overlaps no input
};

}  // namespace metafast
