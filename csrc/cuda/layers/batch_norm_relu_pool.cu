#include "batch_norm_relu_pool.cuh"
#include "norm_launch.h"
#include "table.h"

namespace metafast::METAFAST_GPU {
namespace {

template <class Real>
Domain pixels(const Call<Real>& c) {
  return {c.samples, c.in.h, c.in.w};
}
template <class Real>
Domain outputs(const Call<Real>& c) {
  return {c.samples, c.out.h, c.out.w};
}
// Those that are not whole too.
template <class Real>
Domain windows(const Call<Real>& c) {
  const int64_t k = c.layer.kernel_h;
  return {c.samples, (c.in.h + k - 1) / k, (c.in.w + k - 1) / k};
}

// With the common window known at compile time.
template <template <class, int> class Function, class Real>
void start(const char* name, const Call<Real>& c, bool reduces, const Domain& reduced, bool applies,
           const Domain& applied, CUstream_st* stream) {
  const auto with =
      c.layer.kernel_h == 2 ? start_norm<Function<Real, 2>, Real> : start_norm<Function<Real, 0>, Real>;
  with(name, c, reduces, reduced, applies, applied, stream);
}

template <class Real>
void batch_norm_relu_pool_fwd(const Call<Real>& c, CUstream_st* stream) {
  start<PooledNormFwd>("batch_norm_relu_pool_fwd", c, true, pixels(c), true, outputs(c), stream);
}
template <class Real>
void batch_norm_relu_pool_bwd(const Call<Real>& c, CUstream_st* stream) {
  start<PooledNormBwd>("batch_norm_relu_pool_bwd", c, true, outputs(c), !c.dx.null(), windows(c), stream);
}
template <class Real>
void batch_norm_relu_pool_tfwd(const Call<Real>& c, CUstream_st* stream) {
  start<PooledNormTfwd>("batch_norm_relu_pool_tfwd", c, !c.tx.null(), pixels(c), true, outputs(c), stream);
}
template <class Real>
void batch_norm_relu_pool_tbwd(const Call<Real>& c, CUstream_st* stream) {
  start<PooledNormTbwd>("batch_norm_relu_pool_tbwd", c, true, outputs(c), !c.tdx.null(), windows(c), stream);
}

}  // namespace

template <class Real>
LayerFunctions<Real> layers::batch_norm_relu_pool() {
  return {batch_norm_relu_pool_fwd<Real>, batch_norm_relu_pool_bwd<Real>, batch_norm_relu_pool_tfwd<Real>,
          batch_norm_relu_pool_tbwd<Real>};
}
template LayerFunctions<float> layers::batch_norm_relu_pool();
template LayerFunctions<double> layers::batch_norm_relu_pool();

}  // namespace metafast::METAFAST_GPU
