#include <algorithm>

#include "launch.h"
#include "momentum_update.cuh"
#include "momentum_update.h"

namespace metafast::METAFAST_GPU {

template <class Real>
void momentum_update(const MomentumUpdate<Real>& arguments, CUstream_st* stream) {
  if (arguments.count == 0) return;  // CUDA refuses an empty grid
  constexpr int64_t kBlock = kMomentumThreads;
  constexpr int64_t kMostBlocks = 4096;  // more elements go round the kernel's loop
  const auto blocks = std::min((arguments.count + kBlock - 1) / kBlock, kMostBlocks);
  launch("momentum_update", momentum_update_kernel<Real>, dim3(unsigned(blocks)), dim3(kBlock), 0, stream,
         arguments);
}

template void momentum_update(const MomentumUpdate<float>&, CUstream_st*);
template void momentum_update(const MomentumUpdate<double>&, CUstream_st*);

}  // namespace metafast::METAFAST_GPU
