// Mean over windows on CUDA, no parameters; floor mode; overwrite. With `bias` (count_include_pad) a window
// counts kernel_h x kernel_w elements of which padding is zero, else its real pixels. Linear, hence
//   fwd   y = pool(x)       bwd   dx = pool^T(dy)
//   tfwd  ty = pool(tx)     tbwd  tdx = pool^T(tdy)
// Nothing is kept (saved, tsaved, scratch: 0). Tested by tests/engine/test_layers.py on the emulator, and
// where there is a GPU.
#pragma once

#include "pool.cuh"

namespace metafast::METAFAST_GPU {

struct AvgPool : Pool {
  bool whole;  // all windows count kernel_h x kernel_w elements

  template <class Real>
  explicit AvgPool(const Call<Real>& c)
      : Pool(c), whole(c.layer.bias != 0 || (c.layer.pad_h == 0 && c.layer.pad_w == 0)) {}

  template <class Real>
  __device__ Real share(const Range& row_taps, const Range& column_taps) const {
    return Real(1) / Real(whole ? rows.kernel * columns.kernel : row_taps.size() * column_taps.size());
  }
};

template <class Real>
__global__ void __launch_bounds__(kElementThreads, 1)
    avg_pool_forward_kernel(const AvgPool p, const Batch<const Real> x, const Batch<Real> y) {
  p.each_window([&](int64_t t, const Window& w) {
    const Real* const corner = x.of(t) + w.from;
    Real total = 0;
    for (int64_t u = w.rows.begin; u < w.rows.end; ++u) {
      Real sum = 0;
      for (int64_t v = w.columns.begin; v < w.columns.end; ++v) sum += corner[u * p.in.row + v * p.in.pixel];
      total += sum;
    }
    y.of(t)[w.to] = total * p.share<Real>(w.rows, w.columns);
  });
}

template <class Real>
__global__ void __launch_bounds__(kElementThreads, 1)
    avg_pool_gather_kernel(const AvgPool p, const Batch<const Real> dy, const Batch<Real> dx) {
  p.each_input([&](int64_t t, const Holders& h) {
    Real sum = 0;
    for (int64_t i = h.rows.begin; i < h.rows.end; ++i) {
      for (int64_t j = h.columns.begin; j < h.columns.end; ++j) {
        const Real d = dy.of(t)[h.to + i * p.out.row + j * p.out.pixel];
        sum += p.share<Real>(p.rows.taps(i), p.columns.taps(j)) * d;
      }
    }
    dx.of(t)[h.from] = sum;
  });
}

}  // namespace metafast::METAFAST_GPU
