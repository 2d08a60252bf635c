// Maximum over windows on CUDA, no parameters; floor mode, dilation 1; overwrite. Only real pixels count:
// padding is -infinity. Of equal values the first in the window's rows wins, and NaN wins over all, the last
// one of several, as in torch.
//
//   fwd   y = x at k, k the window's winner        bwd   dx = sum of dy over the windows that the pixel wins
//   tfwd  ty = tx at k                             tbwd  tdx = sum of tdy over the same windows
//
// saved: each output element's k, the tap u * kernel_w + v, as a Tap: one byte where the kernel has at most
// 256 taps, else four; engine/build.cpp has a quarter of an element for each, or one. tsaved is as large and
// not used; scratch: none. Tested by tests/engine/test_layers.py on the emulator, and where there is a GPU.
#pragma once

#include "pool.cuh"

namespace metafast::METAFAST_GPU {

template <class Tap, class Real>
__device__ Tap* taps_of(const Batch<Real>& saved, int64_t task) {
  return reinterpret_cast<Tap*>(saved.of(task));
}

template <class Real, class Tap>
__global__ void __launch_bounds__(kElementThreads, 1)
    max_pool_forward_kernel(const Pool p, const Batch<const Real> x, const Batch<Real> y,
                            const Batch<Real> saved) {
  p.each_window([&](int64_t t, const Window& w) {
    const Real* const corner = x.of(t) + w.from;
    Real best = -Real(INFINITY);
    int64_t winner = w.rows.begin * p.columns.kernel + w.columns.begin;
    for (int64_t u = w.rows.begin; u < w.rows.end; ++u) {
      for (int64_t v = w.columns.begin; v < w.columns.end; ++v) {
        const Real value = corner[u * p.in.row + v * p.in.pixel];
        if (value > best || value != value) best = value, winner = u * p.columns.kernel + v;
      }
    }
    y.of(t)[w.to] = best;
    taps_of<Tap>(saved, t)[w.number] = Tap(winner);
  });
}

template <class Real, class Tap>
__global__ void __launch_bounds__(kElementThreads, 1)
    max_pool_tangent_kernel(const Pool p, const Batch<const Real> tx, const Batch<Real> saved,
                            const Batch<Real> ty) {
  p.each_window([&](int64_t t, const Window& w) {
    const int64_t tap = taps_of<Tap>(saved, t)[w.number];
    const int64_t u = tap / p.columns.kernel, v = tap - u * p.columns.kernel;
    ty.of(t)[w.to] = tx.of(t)[w.from + u * p.in.row + v * p.in.pixel];
  });
}

// dx from dy: bwd and tbwd.
template <class Real, class Tap>
__global__ void __launch_bounds__(kElementThreads, 1)
    max_pool_gather_kernel(const Pool p, const Batch<const Real> dy, const Batch<Real> saved,
                           const Batch<Real> dx) {
  p.each_input([&](int64_t t, const Holders& h) {
    const Tap* const winners = taps_of<Tap>(saved, t) + h.number;
    Real sum = 0;
    for (int64_t i = h.rows.begin; i < h.rows.end; ++i) {
      for (int64_t j = h.columns.begin; j < h.columns.end; ++j) {
        const int64_t tap = p.rows.tap(h.i, i) * p.columns.kernel + p.columns.tap(h.j, j);
        if (winners[(i * p.out.w + j) * p.out.pixel] != Tap(tap)) continue;
        sum += dy.of(t)[h.to + i * p.out.row + j * p.out.pixel];
      }
    }
    dx.of(t)[h.from] = sum;
  });
}

}  // namespace metafast::METAFAST_GPU
