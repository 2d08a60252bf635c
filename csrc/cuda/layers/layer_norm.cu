#include <algorithm>

#include "../launch.h"
#include "layer_norm.cuh"
#include "table.h"

namespace metafast::METAFAST_GPU {
namespace {

template <class Function, class Real>
void start(const char* name, const Call<Real>& c, bool reduces, const Batch<Real>& results,
           CUstream_st* stream) {
  if (c.tasks == 0 || c.samples == 0 || results.null()) return;  // CUDA refuses an empty grid
  const dim3 grid(unsigned(c.samples), unsigned(std::min(c.tasks, kMostTasks)));
  launch(name, layer_norm_kernel<Function, Real>, grid, dim3(kNormThreads), 0, stream, c,
         LayerNormLaunch(c.in), reduces, results);
}

template <bool kTangent, class Real>
void start_gradient(const char* name, const Call<Real>& c, const Batch<Real>& gradient, CUstream_st* stream) {
  if (c.tasks == 0 || !c.layer.bias || gradient.null()) return;
  const int64_t size = c.in.h * c.in.w * c.in.pixel;
  const dim3 grid(unsigned((size + kNormThreads - 1) / kNormThreads),
                  unsigned(std::min(c.tasks, kMostTasks)));
  launch(name, layer_norm_gradient_kernel<Real, kTangent>, grid, dim3(kNormThreads), 0, stream, c,
         LayerNormLaunch(c.in), gradient);
}

template <class Real>
void layer_norm_fwd(const Call<Real>& c, CUstream_st* stream) {
  start<LayerNormFwd<Real>>("layer_norm_fwd", c, true, c.y, stream);
}
template <class Real>
void layer_norm_bwd(const Call<Real>& c, CUstream_st* stream) {
  start_gradient<false>("layer_norm_gradient", c, c.dw, stream);
  start<LayerNormBwd<Real>>("layer_norm_bwd", c, true, c.dx, stream);
}
template <class Real>
void layer_norm_tfwd(const Call<Real>& c, CUstream_st* stream) {
  start<LayerNormTfwd<Real>>("layer_norm_tfwd", c, !c.tx.null(), c.ty, stream);
}
template <class Real>
void layer_norm_tbwd(const Call<Real>& c, CUstream_st* stream) {
  start_gradient<true>("layer_norm_gradient_tangent", c, c.tdw, stream);
  start<LayerNormTbwd<Real>>("layer_norm_tbwd", c, true, c.tdx, stream);
}

}  // namespace

template <class Real>
LayerFunctions<Real> layers::layer_norm() {
  return {layer_norm_fwd<Real>, layer_norm_bwd<Real>, layer_norm_tfwd<Real>, layer_norm_tbwd<Real>};
}
template LayerFunctions<float> layers::layer_norm();
template LayerFunctions<double> layers::layer_norm();

}  // namespace metafast::METAFAST_GPU
