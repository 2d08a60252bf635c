// The sum of two values of one shape on CUDA, y = x + x1; no parameters; overwrite:
//   bwd   dx = dy, dx1 = dy, each where it is wanted
//   tfwd  ty = tx + tx1, a tangent that is null being zero
//   tbwd  tdx = tdy, tdx1 = tdy
// Nothing is kept (saved, tsaved, scratch: 0). Tested by tests/engine/test_layers.py on the emulator, and
// where there is a GPU.
#pragma once

#include "elements.cuh"

namespace metafast::METAFAST_GPU {

// y = x + x1, of which what is null is zero.
template <class Real>
__global__ void add_sum_kernel(const Elements e, const Batch<const Real> x, const Batch<const Real> x1,
                               const Batch<Real> y) {
  e.each([&](int64_t t, int64_t from, int64_t to) {
    const Real first = x.null() ? Real(0) : x.of(t)[from];
    y.of(t)[to] = x1.null() ? first : first + x1.of(t)[from];
  });
}

// dx = dx1 = dy, each unless it is null.
template <class Real>
__global__ void add_spread_kernel(const Elements e, const Batch<const Real> dy, const Batch<Real> dx,
                                  const Batch<Real> dx1) {
  e.each([&](int64_t t, int64_t from, int64_t to) {
    const Real d = dy.of(t)[to];
    if (!dx.null()) dx.of(t)[from] = d;
    if (!dx1.null()) dx1.of(t)[from] = d;
  });
}

}  // namespace metafast::METAFAST_GPU
