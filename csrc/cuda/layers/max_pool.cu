#include "elements.h"
#include "max_pool.cuh"
#include "table.h"

namespace metafast::METAFAST_GPU {
namespace {

// f(a number of the type that `saved` has taps in).
template <class F>
void with_tap(const Layer& l, const F& f) {
  l.kernel_h* l.kernel_w <= 256 ? f(uint8_t()) : f(uint32_t());
}

template <class Real>
void gather(const char* name, const Call<Real>& c, Batch<const Real> dy, Batch<Real> dx,
            CUstream_st* stream) {
  const Pool p(c);
  with_tap(c.layer, [&](auto tap) {
    launch_elements(name, max_pool_gather_kernel<Real, decltype(tap)>, c.tasks, p.count(c.in), stream, p, dy,
                    c.saved, dx);
  });
}

template <class Real>
void max_pool_fwd(const Call<Real>& c, CUstream_st* stream) {
  const Pool p(c);
  with_tap(c.layer, [&](auto tap) {
    launch_elements("max_pool_fwd", max_pool_forward_kernel<Real, decltype(tap)>, c.tasks, p.count(c.out),
                    stream, p, c.x, c.y, c.saved);
  });
}

template <class Real>
void max_pool_bwd(const Call<Real>& c, CUstream_st* stream) {
  if (!c.dx.null()) gather("max_pool_bwd", c, c.dy, c.dx, stream);
}

template <class Real>
void max_pool_tfwd(const Call<Real>& c, CUstream_st* stream) {
  if (c.tx.null()) return clear_output_tangent("max_pool_tfwd", c, stream);
  const Pool p(c);
  with_tap(c.layer, [&](auto tap) {
    launch_elements("max_pool_tfwd", max_pool_tangent_kernel<Real, decltype(tap)>, c.tasks, p.count(c.out),
                    stream, p, c.tx, c.saved, c.ty);
  });
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
