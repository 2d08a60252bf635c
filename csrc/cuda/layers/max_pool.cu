#include "elements.h"
#include "max_pool.cuh"
#include "table.h"

namespace metafast::METAFAST_GPU {
namespace {

bool taps_are_bytes(const Layer& l) { return l.kernel_h * l.kernel_w <= 256; }

template <class Real>
void gather(const char* name, const Call<Real>& c, Batch<const Real> dy, Batch<Real> dx,
            CUstream_st* stream) {
  const Pool p(c);
  const auto kernel = taps_are_bytes(c.layer) ? max_pool_gather_kernel<Real, uint8_t>
                                              : max_pool_gather_kernel<Real, uint32_t>;
  launch_elements(name, kernel, c.tasks, p.count(c.in), stream, p, dy, c.saved, dx);
}

template <class Real>
void max_pool_fwd(const Call<Real>& c, CUstream_st* stream) {
  const Pool p(c);
  const auto kernel = taps_are_bytes(c.layer) ? max_pool_forward_kernel<Real, uint8_t>
                                              : max_pool_forward_kernel<Real, uint32_t>;
  launch_elements("max_pool_fwd", kernel, c.tasks, p.count(c.out), stream, p, c.x, c.y, c.saved);
}

template <class Real>
void max_pool_bwd(const Call<Real>& c, CUstream_st* stream) {
  if (!c.dx.null()) gather("max_pool_bwd", c, c.dy, c.dx, stream);
}

template <class Real>
void max_pool_tfwd(const Call<Real>& c, CUstream_st* stream) {
  if (c.tx.null()) return clear_output_tangent("max_pool_tfwd", c, stream);
  const Pool p(c);
  const auto kernel = taps_are_bytes(c.layer) ? max_pool_tangent_kernel<Real, uint8_t>
                                              : max_pool_tangent_kernel<Real, uint32_t>;
  launch_elements("max_pool_tfwd", kernel, c.tasks, p.count(c.out), stream, p, c.tx, c.saved, c.ty);
}

template <class Real>
void max_pool_tbwd(const Call<Real>& c, CUstream_st* stream) {
  if (!c.tdx.null()) gather("max_pool_tbwd", c, c.tdy, c.tdx, stream);
}

}  // namespace

template <class Real>
LayerFunctions<Real> layers::max_pool() {
  return {max_pool_fwd<Real>, max_pool_bwd<Real>, max_pool_tfwd<Real>, max_pool_tbwd<Real>};
}

template LayerFunctions<float> layers::max_pool();
template LayerFunctions<double> layers::max_pool();

}  // namespace metafast::METAFAST_GPU
