#include "avg_pool.cuh"
#include "elements.h"
#include "table.h"

namespace metafast::METAFAST_GPU {
namespace {

template <class Real>
void forward(const char* name, const Call<Real>& c, Batch<const Real> x, Batch<Real> y, CUstream_st* stream) {
  const AvgPool p(c);
  launch_elements(name, avg_pool_forward_kernel<Real>, c.tasks, p.count(c.out), stream, p, x, y);
}

template <class Real>
void gather(const char* name, const Call<Real>& c, Batch<const Real> dy, Batch<Real> dx,
            CUstream_st* stream) {
  const AvgPool p(c);
  launch_elements(name, avg_pool_gather_kernel<Real>, c.tasks, p.count(c.in), stream, p, dy, dx);
}

template <class Real>
void avg_pool_fwd(const Call<Real>& c, CUstream_st* stream) {
  forward("avg_pool_fwd", c, c.x, c.y, stream);
}

template <class Real>
void avg_pool_bwd(const Call<Real>& c, CUstream_st* stream) {
  if (!c.dx.null()) gather("avg_pool_bwd", c, c.dy, c.dx, stream);
}

template <class Real>
void avg_pool_tfwd(const Call<Real>& c, CUstream_st* stream) {
  if (c.tx.null()) return clear_output_tangent("avg_pool_tfwd", c, stream);
  forward("avg_pool_tfwd", c, c.tx, c.ty, stream);
}

template <class Real>
void avg_pool_tbwd(const Call<Real>& c, CUstream_st* stream) {
  if (!c.tdx.null()) gather("avg_pool_tbwd", c, c.tdy, c.tdx, stream);
}

}  // namespace

template <class Real>
LayerFunctions<Real> layers::avg_pool() {
  return {avg_pool_fwd<Real>, avg_pool_bwd<Real>, avg_pool_tfwd<Real>, avg_pool_tbwd<Real>};
}

template LayerFunctions<float> layers::avg_pool();
template LayerFunctions<double> layers::avg_pool();

}  // namespace metafast::METAFAST_GPU
