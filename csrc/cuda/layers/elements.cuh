// Loops of kernels in which a thread has an element at a time, neighbours side by side. A block's y is the
// task; any grid covers all.
#pragma once

#include "call.h"

namespace metafast::METAFAST_GPU {

constexpr int kElementThreads = 256;

// visit(task, at) for each at < count of each task.
template <class Visit>
__device__ void for_each_element(int64_t tasks, int64_t count, const Visit& visit) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t t = blockIdx.y; t < tasks; t += gridDim.y) {
    for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < count; at += stride) visit(t, at);
  }
}

// All lanes of all real pixels of two values of one shape, wherever their borders put them.
struct Elements {
  Value in, out;
  int64_t tasks;
  int64_t rows, count;  // runs of elements without a gap, and each one's length

  // No border: all is one run.
  static bool is_dense(const Value& v) { return v.row == v.w * v.pixel && v.sample == v.h * v.row; }
  Elements(const Value& from, const Value& to, int64_t t, int64_t samples)
      : in(from), out(to), tasks(t), rows(samples * from.h), count(from.w * from.pixel) {
    if (!is_dense(from) || !is_dense(to)) return;
    count *= rows;
    rows = 1;
  }

  // visit(task, offset in `in`, offset in `out`).
  template <class Visit>
  __device__ void each(const Visit& visit) const {
    for_each_element(tasks, rows * count, [&](int64_t t, int64_t at) {
      if (rows == 1) return visit(t, in.origin + at, out.origin + at);
      const int64_t row = at / count, k = at - row * count, n = row / in.h, i = row - n * in.h;
      visit(t, in.origin + n * in.sample + i * in.row + k, out.origin + n * out.sample + i * out.row + k);
    });
  }
};

template <class Real>
__global__ void __launch_bounds__(kElementThreads, 1) clear_kernel(const Elements e, const Batch<Real> y) {
  e.each([&](int64_t t, int64_t, int64_t to) { y.of(t)[to] = 0; });
}

}  // namespace metafast::METAFAST_GPU
