// The loop of elementwise kernels over the elements that a layer's input and output have in common, all lanes
// of all real pixels, wherever their borders put them. A block's y is the task; any grid covers all.
#pragma once

#include "call.h"

namespace metafast::METAFAST_GPU {

struct Elements {
  Value in, out;
  int64_t tasks;
  int64_t rows, count;  // runs of elements without a gap, and each one's length

  // No border on either side: all is one run.
  static bool is_dense(const Value& v) { return v.row == v.w * v.pixel && v.sample == v.h * v.row; }
  Elements(const Value& from, const Value& to, int64_t t, int64_t samples)
      : in(from), out(to), tasks(t), rows(samples * from.h), count(from.w * from.pixel) {
    if (!is_dense(from) || !is_dense(to)) return;
    count *= rows;
    rows = 1;
  }

  // visit(task, offset in `in`, offset in `out`), a thread an element at a time, neighbours side by side.
  template <class Visit>
  __device__ void each(const Visit& visit) const {
    const int64_t all = rows * count, stride = int64_t(gridDim.x) * blockDim.x;
    for (int64_t t = blockIdx.y; t < tasks; t += gridDim.y) {
      for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < all; at += stride) {
        if (rows == 1) {
          visit(t, in.origin + at, out.origin + at);
        } else {
          const int64_t row = at / count, k = at - row * count, n = row / in.h, i = row - n * in.h;
          visit(t, in.origin + n * in.sample + i * in.row + k, out.origin + n * out.sample + i * out.row + k);
        }
      }
    }
  }
};

template <class Real>
__global__ void clear_kernel(const Elements e, const Batch<Real> y) {
  e.each([y](int64_t t, int64_t, int64_t to) { y.of(t)[to] = 0; });
}

template <class Real>
__global__ void copy_kernel(const Elements e, const Batch<const Real> x, const Batch<Real> y) {
  e.each([x, y](int64_t t, int64_t from, int64_t to) { y.of(t)[to] = x.of(t)[from]; });
}

}  // namespace metafast::METAFAST_GPU
