#include "add.cuh"
#include "elements.h"
#include "table.h"

namespace metafast::METAFAST_GPU {
namespace {

// The inputs have the same shape, but each has its own border.
template <class Real>
void sum(const char* name, const Call<Real>& c, Batch<const Real> x, Batch<const Real> x1, Batch<Real> y,
         CUstream_st* stream) {
  launch_elements(name, add_one_kernel<Real>, Elements(c.in, c.out, c.tasks, c.samples), stream, x, false, y);
  if (x1.null()) return;
  launch_elements(name, add_one_kernel<Real>, Elements(c.in1, c.out, c.tasks, c.samples), stream, x1, true,
                  y);
}

template <class Real>
void spread(const char* name, const Call<Real>& c, Batch<const Real> dy, Batch<Real> dx, Batch<Real> dx1,
            CUstream_st* stream) {
  const auto to = [&](const Value& in, Batch<Real> d) {
    if (d.null()) return;
    launch_elements(name, add_one_kernel<Real>, Elements(c.out, in, c.tasks, c.samples), stream, dy, false,
                    d);
  };
  to(c.in, dx);
  to(c.in1, dx1);
}

template <class Real>
void add_fwd(const Call<Real>& c, CUstream_st* stream) {
  sum("add_fwd", c, c.x, c.x1, c.y, stream);
}

template <class Real>
void add_bwd(const Call<Real>& c, CUstream_st* stream) {
  spread("add_bwd", c, c.dy, c.dx, c.dx1, stream);
}

template <class Real>
void add_tfwd(const Call<Real>& c, CUstream_st* stream) {
  sum("add_tfwd", c, c.tx, c.tx1, c.ty, stream);
}

template <class Real>
void add_tbwd(const Call<Real>& c, CUstream_st* stream) {
  spread("add_tbwd", c, c.tdy, c.tdx, c.tdx1, stream);
}

}  // namespace

template <class Real>
LayerFunctions<Real> layers::add() {
  return {add_fwd<Real>, add_bwd<Real>, add_tfwd<Real>, add_tbwd<Real>};
}

template LayerFunctions<float> layers::add();
template LayerFunctions<double> layers::add();

}  // namespace metafast::METAFAST_GPU
