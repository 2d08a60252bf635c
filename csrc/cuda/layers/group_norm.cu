#include <algorithm>

#include "../launch.h"
#include "group_norm.cuh"
#include "table.h"

namespace metafast::METAFAST_GPU {
namespace {

template <class Function, class Real>
void start(const char* name, const Call<Real>& c, bool reduces, const Batch<Real>& results,
           CUstream_st* stream) {
  const int64_t samples = c.tasks * c.samples;
  if (samples == 0 || (!reduces && results.null())) return;  // CUDA refuses an empty grid
  // As many as fill a warp's lanes.
  const int64_t groups = std::max<int64_t>(1, kMostGroups * c.layer.groups / c.in.c);
  const dim3 grid(unsigned((c.layer.groups + groups - 1) / groups), unsigned(std::min(samples, kMostTasks)));
  launch(name, group_norm_kernel<Function, Real>, grid, dim3(kNormThreads), 0, stream, c,
         Domain(1, c.in.h, c.in.w), unsigned(groups), reduces, results);
}

template <class Real>
void start_gradient(const char* name, const Call<Real>& c, const Batch<Real>& kept,
                    const Batch<Real>& gradient, CUstream_st* stream) {
  if (c.tasks == 0 || !c.layer.bias || gradient.null()) return;
  const dim3 grid(unsigned((c.in.pixel + kNormThreads - 1) / kNormThreads),
                  unsigned(std::min(c.tasks, kMostTasks)));
  launch(name, group_norm_gradient_kernel<Real>, grid, dim3(kNormThreads), 0, stream, c,
         Batch<const Real>(kept), gradient);
}

template <class Real>
void group_norm_fwd(const Call<Real>& c, CUstream_st* stream) {
  start<GroupNormFwd<Real>>("group_norm_fwd", c, true, c.y, stream);
}
template <class Real>
void group_norm_bwd(const Call<Real>& c, CUstream_st* stream) {
  start<GroupNormBwd<Real>>("group_norm_bwd", c, true, c.dx, stream);
  start_gradient("group_norm_gradient", c, c.saved, c.dw, stream);
}
template <class Real>
void group_norm_tfwd(const Call<Real>& c, CUstream_st* stream) {
  start<GroupNormTfwd<Real>>("group_norm_tfwd", c, !c.tx.null(), c.ty, stream);
}
template <class Real>
void group_norm_tbwd(const Call<Real>& c, CUstream_st* stream) {
  start<GroupNormTbwd<Real>>("group_norm_tbwd", c, true, c.tdx, stream);
  start_gradient("group_norm_gradient_tangent", c, c.tsaved, c.tdw, stream);
}

}  // namespace

template <class Real>
LayerFunctions<Real> layers::group_norm() {
  return {group_norm_fwd<Real>, group_norm_bwd<Real>, group_norm_tfwd<Real>, group_norm_tbwd<Real>};
}
template LayerFunctions<float> layers::group_norm();
template LayerFunctions<double> layers::group_norm();

}  // namespace metafast::METAFAST_GPU
