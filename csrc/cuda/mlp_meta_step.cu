#include <algorithm>
#include <string>

#include "launch.h"
#include "mlp_meta_step.cuh"
#include "mlp_meta_step.h"

namespace metafast::METAFAST_GPU {

template <class Real>
void mlp_meta_step(const MlpMetaStep<Real>& arguments, CUstream_st* stream) {
  if (arguments.tasks == 0) return;  // CUDA refuses an empty grid
  const int64_t samples = std::max(arguments.support.samples, arguments.query.samples);
  int64_t least = 2 * arguments.shape.size();
  for (int l = 1; l <= arguments.shape.layers; ++l) least += 2 * samples * arguments.shape.widths[l];
  const auto refuse = [](int64_t elements) {
    throw std::invalid_argument(
        "mlp_meta_step: expected a task that fits into a block's shared memory, got one of " +
        std::to_string(elements * int64_t(sizeof(Real))) + " bytes");
  };
  if (least > 1 << 20) refuse(least);  // the layout counts in int
  const MlpLayout layout(arguments.shape, int(samples));
  const size_t bytes = size_t(layout.size) * sizeof(Real);
  if (!allow_shared(mlp_meta_step_kernel<Real>, bytes)) refuse(layout.size);
  launch("mlp_meta_step", mlp_meta_step_kernel<Real>, dim3(unsigned(arguments.tasks)), dim3(kMlpThreads),
         bytes, stream, arguments, layout);
}

template void mlp_meta_step(const MlpMetaStep<float>&, CUstream_st*);
template void mlp_meta_step(const MlpMetaStep<double>&, CUstream_st*);

}  // namespace metafast::METAFAST_GPU
