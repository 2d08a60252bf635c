// An image (C, H, W) as features in torch's order on CUDA: y[c H W + i W + j] = x[i, j, c]. No parameters;
// overwrite; linear:
//   fwd   y = flat(x)       bwd   dx = flat^T(dy)
//   tfwd  ty = flat(tx)     tbwd  tdx = flat^T(tdy)
// Nothing is kept (saved, tsaved, scratch: 0). Lanes beyond the features of y and ty, and lanes beyond C of
// dx and tdx, become zero. Each sample is a matrix to transpose, pixels x channels: a block a tile of it at a
// time, by way of shared memory, so that both sides are read and written in runs. A block's y is the task;
// any grid covers all. Tested by tests/engine/test_layers.py on the emulator, and where there is a GPU.
#pragma once

#include "call.h"

namespace metafast::METAFAST_GPU {

constexpr int kFlattenTile = 32, kFlattenRows = 8;  // rows of a tile at a time
constexpr int kFlattenThreads = kFlattenTile * kFlattenRows;

struct Flatten {
  Value in, out;
  int64_t tasks, samples;
  int64_t down, across;  // tiles of pixels and of lanes

  static int64_t tiles_of(int64_t count) { return (count + kFlattenTile - 1) / kFlattenTile; }
  template <class Real>
  explicit Flatten(const Call<Real>& c)
      : in(c.in),
        out(c.out),
        tasks(c.tasks),
        samples(c.samples),
        down(tiles_of(c.in.h * c.in.w)),
        across(tiles_of(c.in.pixel)) {}

  __device__ __host__ int64_t tiles() const { return samples * down * across; }
  // Offsets in x and in y.
  __device__ int64_t image(int64_t n, int64_t pixel, int64_t lane) const {
    const int64_t i = pixel / in.w, j = pixel - i * in.w;
    return in.origin + n * in.sample + i * in.row + j * in.pixel + lane;
  }
  __device__ int64_t feature(int64_t n, int64_t pixel, int64_t channel) const {
    return out.origin + n * out.sample + channel * in.h * in.w + pixel;
  }

  // visit(task, sample, first pixel, first lane) for each tile.
  template <class Visit>
  __device__ void each_tile(const Visit& visit) const {
    for (int64_t t = blockIdx.y; t < tasks; t += gridDim.y) {
      for (int64_t tile = blockIdx.x; tile < tiles(); tile += gridDim.x) {
        const int64_t row = tile / across, n = row / down;
        visit(t, n, (row - n * down) * kFlattenTile, (tile - row * across) * kFlattenTile);
      }
    }
  }
};

template <class Real>
__global__ void __launch_bounds__(kFlattenThreads)
    flatten_kernel(const Flatten f, const Batch<const Real> x, const Batch<Real> y) {
  METAFAST_SHARED(Real, tile, [kFlattenTile][kFlattenTile + 1]);
  const int64_t pixels = f.in.h * f.in.w, across = threadIdx.x % kFlattenTile,
                down = threadIdx.x / kFlattenTile;
  f.each_tile([&](int64_t t, int64_t n, int64_t pixel, int64_t lane) {
    for (int64_t k = down; k < kFlattenTile; k += kFlattenRows) {
      if (pixel + k < pixels && lane + across < f.in.c) {
        tile[k][across] = x.of(t)[f.image(n, pixel + k, lane + across)];
      }
    }
    __syncthreads();
    for (int64_t k = down; k < kFlattenTile; k += kFlattenRows) {
      if (pixel + across < pixels && lane + k < f.in.c) {
        y.of(t)[f.feature(n, pixel + across, lane + k)] = tile[across][k];
      }
    }
    if (pixel == 0 && lane == 0) {
      for (int64_t k = f.out.c + threadIdx.x; k < f.out.pixel; k += kFlattenThreads) {
        y.of(t)[f.out.origin + n * f.out.sample + k] = 0;
      }
    }
    __syncthreads();  // all have read what is there
  });
}

// dx from dy: bwd and tbwd.
template <class Real>
__global__ void __launch_bounds__(kFlattenThreads)
    flatten_back_kernel(const Flatten f, const Batch<const Real> dy, const Batch<Real> dx) {
  METAFAST_SHARED(Real, tile, [kFlattenTile][kFlattenTile + 1]);
  const int64_t pixels = f.in.h * f.in.w, across = threadIdx.x % kFlattenTile,
                down = threadIdx.x / kFlattenTile;
  f.each_tile([&](int64_t t, int64_t n, int64_t pixel, int64_t lane) {
    for (int64_t k = down; k < kFlattenTile; k += kFlattenRows) {
      if (pixel + across < pixels && lane + k < f.in.c) {
        tile[k][across] = dy.of(t)[f.feature(n, pixel + across, lane + k)];
      }
    }
    __syncthreads();
    for (int64_t k = down; k < kFlattenTile; k += kFlattenRows) {
      if (pixel + k >= pixels || lane + across >= f.in.pixel) continue;
      dx.of(t)[f.image(n, pixel + k, lane + across)] = lane + across < f.in.c ? tile[across][k] : Real(0);
    }
    __syncthreads();  // all have read what is there
  });
}

}  // namespace metafast::METAFAST_GPU
