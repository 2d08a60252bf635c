#include "norm_launch.h"
#include "table.h"

namespace metafast::METAFAST_GPU {
namespace {

template <class Function, class Real>
void start(const char* name, const Call<Real>& c, bool reduces, bool applies, CUstream_st* stream) {
  const Domain pixels(c.samples, c.in.h, c.in.w);
  start_norm<Function>(name, c, reduces, pixels, applies, pixels, stream);
}

template <class Real>
void batch_norm_fwd(const Call<Real>& c, CUstream_st* stream) {
  start<BatchNormFwd<Real>>("batch_norm_fwd", c, true, true, stream);
}
template <class Real>
void batch_norm_bwd(const Call<Real>& c, CUstream_st* stream) {
  start<BatchNormBwd<Real>>("batch_norm_bwd", c, true, !c.dx.null(), stream);
}
template <class Real>
void batch_norm_tfwd(const Call<Real>& c, CUstream_st* stream) {
  start<BatchNormTfwd<Real>>("batch_norm_tfwd", c, !c.tx.null(), true, stream);
}
template <class Real>
void batch_norm_tbwd(const Call<Real>& c, CUstream_st* stream) {
  start<BatchNormTbwd<Real>>("batch_norm_tbwd", c, true, !c.tdx.null(), stream);
}

}  // namespace

template <class Real>
LayerFunctions<Real> layers::batch_norm() {
  return {batch_norm_fwd<Real>, batch_norm_bwd<Real>, batch_norm_tfwd<Real>, batch_norm_tbwd<Real>};
}
template LayerFunctions<float> layers::batch_norm();
template LayerFunctions<double> layers::batch_norm();

}  // namespace metafast::METAFAST_GPU
