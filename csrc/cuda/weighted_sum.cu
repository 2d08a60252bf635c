#include <algorithm>

#include "launch.h"
#include "weighted_sum.cuh"
#include "weighted_sum.h"

namespace metafast::METAFAST_GPU {

template <class Real>
void weighted_sum(const WeightedSum<Real>& arguments, CUstream_st* stream) {
  if (arguments.size == 0) return;  // CUDA refuses an empty grid
  constexpr int64_t kBlock = kWeightedSumThreads;
  constexpr int64_t kMostBlocks = 4096;  // more parameters go round the kernel's loop
  const auto blocks = std::min((arguments.size + kBlock - 1) / kBlock, kMostBlocks);
  launch("weighted_sum", weighted_sum_kernel<Real>, dim3(unsigned(blocks)), dim3(kBlock), 0, stream,
         arguments);
}

template void weighted_sum(const WeightedSum<float>&, CUstream_st*);
template void weighted_sum(const WeightedSum<double>&, CUstream_st*);

}  // namespace metafast::METAFAST_GPU
