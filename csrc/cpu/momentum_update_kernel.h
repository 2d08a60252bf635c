// velocity' = momentum * velocity + grads, updated = params - lr * velocity' for a range of elements, in one
// pass; overwrites. Compiled once per instruction set: the loops are plain, the compiler makes them wide.
// Tested by tests/ops/test_momentum_update.py.
#pragma once

#ifndef METAFAST_ISA
#error "define METAFAST_ISA, the instruction set's namespace, before including a kernel"
#endif

#include "momentum_update.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// `count` elements; without a velocity the first step's, from 0.
template <class Real, bool kFirst>
void update_with_momentum(const Real* __restrict params, const Real* __restrict grads,
                          [[maybe_unused]] const Real* __restrict velocity, Real lr,
                          [[maybe_unused]] Real momentum, int64_t count, Real* __restrict updated,
                          Real* __restrict next_velocity) {
  for (int64_t i = 0; i < count; ++i) {
    Real next = grads[i];
    if constexpr (!kFirst) next += momentum * velocity[i];
    next_velocity[i] = next;
    updated[i] = params[i] - lr * next;
  }
}

template <class Real>
void momentum_update(const MomentumUpdate<Real>& a, int64_t begin, int64_t end) {
  const auto run =
      a.velocity == nullptr ? update_with_momentum<Real, true> : update_with_momentum<Real, false>;
  run(a.params + begin, a.grads + begin, a.velocity == nullptr ? nullptr : a.velocity + begin, a.lr,
      a.momentum, end - begin, a.updated + begin, a.next_velocity + begin);
}

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
