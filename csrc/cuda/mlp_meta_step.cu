#include <algorithm>
#include <string>

#include "launch.h"
#include "mlp_meta_step.cuh"
#include "mlp_meta_step.h"

namespace metafast::METAFAST_GPU {

namespace {

// Elements of shared memory that a task takes, or, where they are too many for the layout's int, fewer than
// that but more than any device has.
int64_t elements_of(const MlpShape& shape, int64_t samples) {
  int64_t least = 2 * int64_t(shape.size());
  for (int l = 1; l <= shape.layers; ++l) least += 2 * samples * shape.widths[l];
  return least > 1 << 20 ? least : MlpLayout(shape, int(samples)).size;
}

}  // namespace

template <class Real>
bool fits_mlp_meta_step(const MlpShape& shape, int64_t samples) {
  return allow_shared(mlp_meta_step_kernel<Real>, size_t(elements_of(shape, samples)) * sizeof(Real));
}

template <class Real>
void mlp_meta_step(const MlpMetaStep<Real>& arguments, CUstream_st* stream) {
  if (arguments.tasks == 0) return;  // CUDA refuses an empty grid
  const int64_t samples = std::max(arguments.support.samples, arguments.query.samples);
  const size_t bytes = size_t(elements_of(arguments.shape, samples)) * sizeof(Real);
  if (!allow_shared(mlp_meta_step_kernel<Real>, bytes)) {
    throw std::invalid_argument(
        "mlp_meta_step: expected a task that fits into a block's shared memory, got one of " +
        std::to_string(bytes) + " bytes");
  }
  launch("mlp_meta_step", mlp_meta_step_kernel<Real>, dim3(unsigned(arguments.tasks)), dim3(kMlpThreads),
         bytes, stream, arguments, MlpLayout(arguments.shape, int(samples)));
}

#define METAFAST_MLP_META_STEP(Real)                                \
  template bool fits_mlp_meta_step<Real>(const MlpShape&, int64_t); \
  template void mlp_meta_step(const MlpMetaStep<Real>&, CUstream_st*);
METAFAST_MLP_META_STEP(float)
METAFAST_MLP_META_STEP(double)
#undef METAFAST_MLP_META_STEP

}  // namespace metafast::METAFAST_GPU
