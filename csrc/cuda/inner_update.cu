#include <algorithm>

#include "inner_update.cuh"
#include "inner_update.h"
#include "launch.h"

namespace metafast::METAFAST_GPU {

template <class Real>
void inner_update(const InnerUpdate<Real>& arguments, CUstream_st* stream) {
  if (arguments.tasks == 0 || arguments.size == 0) return;  // CUDA refuses an empty grid
  constexpr int64_t kBlock = kInnerUpdateThreads;
  constexpr int64_t kMostBlocks = 4096;  // of parameters; more go round the kernel's loop
  const auto blocks = std::min((arguments.size + kBlock - 1) / kBlock, kMostBlocks);
  const auto tasks = std::min(arguments.tasks, kMostTasks);
  launch("inner_update", inner_update_kernel<Real>, dim3(unsigned(blocks), unsigned(tasks)), dim3(kBlock), 0,
         stream, arguments);
}

template void inner_update(const InnerUpdate<float>&, CUstream_st*);
template void inner_update(const InnerUpdate<double>&, CUstream_st*);

}  // namespace metafast::METAFAST_GPU
