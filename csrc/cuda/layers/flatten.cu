#include "elements.h"
#include "flatten.cuh"
#include "table.h"

namespace metafast::METAFAST_GPU {
namespace {

template <class Real>
void start(const char* name, void (*kernel)(Flatten, Batch<const Real>, Batch<Real>), const Call<Real>& c,
           Batch<const Real> from, Batch<Real> to, CUstream_st* stream) {
  const Flatten f(c);
  launch_blocks(name, kernel, c.tasks, f.tiles(), kFlattenThreads, stream, f, from, to);
}

template <class Real>
void flatten_fwd(const Call<Real>& c, CUstream_st* stream) {
  start("flatten_fwd", flatten_kernel<Real>, c, c.x, c.y, stream);
}

template <class Real>
void flatten_bwd(const Call<Real>& c, CUstream_st* stream) {
  if (!c.dx.null()) start("flatten_bwd", flatten_back_kernel<Real>, c, c.dy, c.dx, stream);
}

template <class Real>
void flatten_tfwd(const Call<Real>& c, CUstream_st* stream) {
  if (c.tx.null()) return clear_output_tangent("flatten_tfwd", c, stream);
  start("flatten_tfwd", flatten_kernel<Real>, c, c.tx, c.ty, stream);
}

template <class Real>
void flatten_tbwd(const Call<Real>& c, CUstream_st* stream) {
  if (!c.tdx.null()) start("flatten_tbwd", flatten_back_kernel<Real>, c, c.tdy, c.tdx, stream);
}

}  // namespace

template <class Real>
LayerFunctions<Real> layers::flatten() {
  return {flatten_fwd<Real>, flatten_bwd<Real>, flatten_tfwd<Real>, flatten_tbwd<Real>};
}

template LayerFunctions<float> layers::flatten();
template LayerFunctions<double> layers::flatten();

}  // namespace metafast::METAFAST_GPU
