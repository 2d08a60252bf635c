// What crosses to the kernels of momentum_update, the step of the rule Momentum: no torch in here.
//
//   velocity'[t, p] = momentum velocity[t, p] + grads[t, p]
//   updated[t, p]   = params[t, p] - lr velocity'[t, p]
//
// Letters: T tasks, P parameters of a task; the step is the same for all, so that T P elements cross.
#pragma once

#include <cstdint>

namespace metafast {

template <class Real>
struct MomentumUpdate {
  const Real* params;    // (T P,)
  const Real* grads;     // (T P,)
  const Real* velocity;  // (T P,); null: 0 everywhere, the first step
  Real lr;
  Real momentum;
  int64_t count;        // T P
  Real* updated;        // (T P,), overwritten; is params or overlaps no input
  Real* next_velocity;  // (T P,), overwritten; is velocity or overlaps no input
};

}  // namespace metafast
