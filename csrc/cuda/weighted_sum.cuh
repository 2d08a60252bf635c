// out = sum over tasks of weights * x on CUDA; overwrites. A thread sums a parameter's T terms in the order
// of the tasks, so that the bits depend on nothing else; any grid covers all parameters. Tested by
// tests/simt/test_kernels.py.
#pragma once

#include "../weighted_sum.h"
#include "gpu.h"

namespace metafast::METAFAST_GPU {

constexpr int kWeightedSumThreads = 256;

template <class Real>
__global__ void __launch_bounds__(kWeightedSumThreads) weighted_sum_kernel(WeightedSum<Real> a) {
  const int64_t stride = int64_t(blockDim.x) * gridDim.x;
  for (int64_t param = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; param < a.size; param += stride) {
    Real sum = 0;
    for (int64_t task = 0; task < a.tasks; ++task) {
      const Real weight = a.weights == nullptr ? Real(1) : a.weights[task];
      sum += weight * a.x[task * a.size + param];
    }
    a.out[param] = sum;
  }
}

}  // namespace metafast::METAFAST_GPU
