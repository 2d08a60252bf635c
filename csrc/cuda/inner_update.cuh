// updated = params - scale * lr * grads on CUDA; overwrites. A grid of parameter blocks x tasks, any size of
// it covers all elements. Tested by tests/ops/test_inner_update.py on the
// emulator, and where there is a GPU.
#pragma once

#include "../inner_update.h"
#include "gpu.h"

namespace metafast::METAFAST_GPU {

constexpr int kInnerUpdateThreads = 256;

template <class Real>
__global__ void __launch_bounds__(kInnerUpdateThreads) inner_update_kernel(InnerUpdate<Real> a) {
  const int64_t stride = int64_t(blockDim.x) * gridDim.x;
  const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t task = blockIdx.y; task < a.tasks; task += gridDim.y) {
    for (int64_t param = first; param < a.size; param += stride) {
      const int64_t at = task * a.size + param;
      const Real lr = a.lr == nullptr ? Real(1) : a.lr[task * a.lr_task + param * a.lr_param];
      a.updated[at] = a.params[at] - a.scale * lr * a.grads[at];
    }
  }
}

}  // namespace metafast::METAFAST_GPU
