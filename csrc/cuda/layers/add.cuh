// The sum of two values of one shape on CUDA, y = x + x1; no parameters; overwrite:
//   bwd   dx = dy, dx1 = dy, each where it is wanted
//   tfwd  ty = tx + tx1, a tangent that is null being zero
//   tbwd  tdx = tdy, tdx1 = tdy
// Nothing is kept (saved, tsaved, scratch: 0). Tested by tests/engine/test_layers.py on the emulator, and
// where there is a GPU.
#pragma once

#include "elements.cuh"

namespace metafast::METAFAST_GPU {

// y = x, or added to what is there; x is zero where it is null.
template <class Real>
__global__ void __launch_bounds__(kElementThreads, 1)
    add_one_kernel(const Elements e, const Batch<const Real> x, const bool add, const Batch<Real> y) {
  e.each([&](int64_t t, int64_t from, int64_t to) {
    const Real one = x.null() ? Real(0) : x.of(t)[from];
    y.of(t)[to] = add ? y.of(t)[to] + one : one;
  });
}

}  // namespace metafast::METAFAST_GPU
