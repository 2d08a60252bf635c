// updated = params - scale * lr * grads for a range of elements; overwrites. Compiled once per instruction
// set: the loops are plain, the compiler makes them wide. Tested by tests/ops/test_inner_update.py.
#pragma once

#ifndef METAFAST_ISA
#error "define METAFAST_ISA, the instruction set's namespace, before including a kernel"
#endif

#include "inner_update.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// `count` elements with one rate.
template <class Real>
void update_with_rate(const Real* __restrict params, const Real* __restrict grads, Real rate, int64_t count,
                      Real* __restrict updated) {
  for (int64_t i = 0; i < count; ++i) updated[i] = params[i] - rate * grads[i];
}

// `count` elements with a rate each.
template <class Real>
void update_with_rates(const Real* __restrict params, const Real* __restrict grads, const Real* __restrict lr,
                       Real scale, int64_t count, Real* __restrict updated) {
  for (int64_t i = 0; i < count; ++i) updated[i] = params[i] - scale * lr[i] * grads[i];
}

template <class Real>
void inner_update(const InnerUpdate<Real>& a, int64_t begin, int64_t end) {
  if (a.lr == nullptr) {
    return update_with_rate(a.params + begin, a.grads + begin, a.scale, end - begin, a.updated + begin);
  }
  for (int64_t at = begin; at < end;) {  // the part of one task after the other
    const int64_t task = at / a.size, param = at % a.size;
    const int64_t task_end = (task + 1) * a.size;
    const int64_t count = (task_end < end ? task_end : end) - at;
    const Real* lr = a.lr + task * a.lr_task + param * a.lr_param;
    if (a.lr_param == 0) {
      update_with_rate(a.params + at, a.grads + at, a.scale * *lr, count, a.updated + at);
    } else {
      update_with_rates(a.params + at, a.grads + at, lr, a.scale, count, a.updated + at);
    }
    at += count;
  }
}

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
