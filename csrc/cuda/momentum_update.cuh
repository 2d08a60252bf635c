// velocity' = momentum * velocity + grads, updated = params - lr * velocity' on CUDA, in one pass;
// overwrites. Any grid covers all elements. Tested by tests/ops/test_momentum_update.py on the emulator, and
// where there is a GPU; in place by tests/simt/test_kernels.py.
#pragma once

#include "../momentum_update.h"
#include "gpu.h"

namespace metafast::METAFAST_GPU {

constexpr int kMomentumThreads = 256;

template <class Real>
__global__ void __launch_bounds__(kMomentumThreads) momentum_update_kernel(MomentumUpdate<Real> a) {
  const int64_t stride = int64_t(blockDim.x) * gridDim.x;
  for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < a.count; at += stride) {
    const Real before = a.velocity == nullptr ? Real(0) : a.velocity[at];
    const Real velocity = a.momentum * before + a.grads[at];
    a.next_velocity[at] = velocity;
    a.updated[at] = a.params[at] - a.lr * velocity;
  }
}

}  // namespace metafast::METAFAST_GPU
