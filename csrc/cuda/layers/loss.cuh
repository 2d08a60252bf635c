// The losses on CUDA, and what else is done to a network's inputs and outputs; overwrites. The equations are
// those of cpu/layers/loss.h:
//
//   cross_entropy   mean_n -log softmax(f_n)[y_n]    df = (softmax - onehot) / N    tdf = s (tf - <s, tf>) /
//   N mse             mean over all N C of (f - y)^2   df = 2 (f - y) / (N C)         tdf = 2 tf / (N C)
//
// A sample of cross_entropy has a warp, its classes the lanes; what is summed over samples, a task's loss and
// its accuracy, a block. Sums over samples are in double and in an order that hangs on the sizes alone. Any
// grid covers all. Adjoints' lanes C..pixel-1 become zero. Tested by tests/simt/test_kernels.py.
#pragma once

#include "../warp.cuh"
#include "call.h"
#include "loss.h"

namespace metafast::METAFAST_GPU {

constexpr int kLossThreads = 256, kLossWarps = kLossThreads / 32;

// By value, as the kernels take it.
template <class Real>
struct LossLaunch {
  Value out;
  int64_t tasks, samples;
  Batch<const Real> y, ty;
  Targets<Real> targets;
  Batch<Real> dy, tdy;
  Real* losses;

  __device__ int64_t at(int64_t n) const { return out.origin + n * out.sample; }
};

// The sum of the block's values, for the first thread; all threads must come.
__device__ inline double block_sum(double x) {
  METAFAST_SHARED(double, of_warps, [kLossWarps]);
  x = warp_sum(x);
  __syncthreads();  // all have read what is there
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kLossWarps; ++warp) sum += of_warps[warp];
  return sum;
}

// Of a warp's sample: what softmax needs, in each of its lanes.
template <class Real>
struct Softmax {
  Real most = -Real(INFINITY), sum = 0;

  __device__ Softmax(const Real* f, int64_t classes) {
    const int lane = int(threadIdx.x) % 32;
    for (int64_t c = lane; c < classes; c += 32) most = f[c] > most ? f[c] : most;
    most = warp_max(most);
    for (int64_t c = lane; c < classes; c += 32) sum += std::exp(f[c] - most);
    sum = warp_sum(sum);
  }
  __device__ Real operator()(Real f) const { return std::exp(f - most) / sum; }
};

// A block a task.
template <class Real>
__global__ void __launch_bounds__(kLossThreads, 1) cross_entropy_kernel(const LossLaunch<Real> a) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  for (int64_t t = blockIdx.x; t < a.tasks; t += gridDim.x) {
    double loss = 0;
    for (int64_t n = warp; n < a.samples; n += kLossWarps) {
      const Real* const f = a.y.of(t) + a.at(n);
      const int64_t label = a.targets.labels[t * a.samples + n];
      const Softmax<Real> softmax(f, a.out.c);
      if (lane == 0) loss += double(std::log(softmax.sum) + (softmax.most - f[label]));
      for (int64_t c = lane; !a.dy.null() && c < a.out.pixel; c += 32) {
        const Real one = c == label ? Real(1) : Real(0);
        a.dy.of(t)[a.at(n) + c] = c < a.out.c ? (softmax(f[c]) - one) / Real(a.samples) : Real(0);
      }
    }
    if (a.losses == nullptr) continue;
    loss = block_sum(loss);
    if (threadIdx.x == 0) a.losses[t] = Real(loss / double(a.samples));
  }
}

template <class Real>
__global__ void __launch_bounds__(kLossThreads, 1) mse_kernel(const LossLaunch<Real> a) {
  const int64_t elements = a.samples * a.out.c;
  for (int64_t t = blockIdx.x; t < a.tasks; t += gridDim.x) {
    double loss = 0;
    for (int64_t e = threadIdx.x; e < a.samples * a.out.pixel; e += kLossThreads) {
      const int64_t n = e / a.out.pixel, c = e % a.out.pixel;
      Real apart = 0;
      if (c < a.out.c) apart = a.y.of(t)[a.at(n) + c] - a.targets.values[t * elements + n * a.out.c + c];
      loss += double(apart) * double(apart);
      if (!a.dy.null()) a.dy.of(t)[a.at(n) + c] = 2 * apart / Real(elements);
    }
    if (a.losses == nullptr) continue;
    loss = block_sum(loss);
    if (threadIdx.x == 0) a.losses[t] = Real(loss / double(elements));
  }
}

// A warp a sample.
template <class Real>
__global__ void __launch_bounds__(kLossThreads, 1) cross_entropy_tangent_kernel(const LossLaunch<Real> a) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t stride = int64_t(gridDim.x) * kLossWarps;
  for (int64_t row = int64_t(blockIdx.x) * kLossWarps + threadIdx.x / 32; row < a.tasks * a.samples;
       row += stride) {
    const int64_t t = row / a.samples, at = a.at(row % a.samples);
    const Real *const f = a.y.of(t) + at, *const tf = a.ty.of(t) + at;
    const Softmax<Real> softmax(f, a.out.c);
    Real mean = 0;
    for (int64_t c = lane; c < a.out.c; c += 32) mean += softmax(f[c]) * tf[c];
    mean = warp_sum(mean);
    for (int64_t c = lane; c < a.out.pixel; c += 32)
      a.tdy.of(t)[at + c] = c < a.out.c ? softmax(f[c]) * (tf[c] - mean) / Real(a.samples) : Real(0);
  }
}

// An element of (T, N, pixel) a thread, as in the kernels that follow.
template <class Real>
__global__ void __launch_bounds__(kLossThreads) mse_tangent_kernel(const LossLaunch<Real> a) {
  const int64_t stride = int64_t(gridDim.x) * kLossThreads, row = a.samples * a.out.pixel;
  for (int64_t e = int64_t(blockIdx.x) * kLossThreads + threadIdx.x; e < a.tasks * row; e += stride) {
    const int64_t t = e / row, c = e % a.out.pixel, at = a.at(e % row / a.out.pixel) + c;
    a.tdy.of(t)[at] = c < a.out.c ? 2 * a.ty.of(t)[at] / Real(a.samples * a.out.c) : Real(0);
  }
}

// The share of samples whose largest output, the first of equals, is their label's: a block a task.
template <class Real>
__global__ void __launch_bounds__(kLossThreads)
    accuracy_kernel(const LossLaunch<Real> a, const int64_t* labels, Real* share) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  for (int64_t t = blockIdx.x; t < a.tasks; t += gridDim.x) {
    double right = 0;
    for (int64_t n = warp; n < a.samples; n += kLossWarps) {
      const Real* const f = a.y.of(t) + a.at(n);
      Real most = f[0];
      int64_t best = 0;
      for (int64_t c = lane; c < a.out.c; c += 32) {
        if (f[c] > most) most = f[c], best = c;
      }
      for (int with = 16; with > 0; with /= 2) {
        const Real other = __shfl_xor_sync(kAllLanes, most, with);
        const int64_t at = __shfl_xor_sync(kAllLanes, best, with);
        if (other > most || (other == most && at < best)) most = other, best = at;
      }
      if (lane == 0) right += best == labels[t * a.samples + n] ? 1 : 0;
    }
    right = block_sum(right);
    if (threadIdx.x == 0) share[t] = Real(right / double(a.samples));
  }
}

template <class Real>
__global__ void __launch_bounds__(kLossThreads) copy_outputs_kernel(const LossLaunch<Real> a, Real* outputs) {
  const int64_t stride = int64_t(gridDim.x) * kLossThreads, row = a.samples * a.out.c;
  for (int64_t e = int64_t(blockIdx.x) * kLossThreads + threadIdx.x; e < a.tasks * row; e += stride)
    outputs[e] = a.y.of(e / row)[a.at(e % row / a.out.c) + e % a.out.c];
}

template <class Real>
__global__ void __launch_bounds__(kLossThreads)
    set_adjoint_kernel(const LossLaunch<Real> a, const Real* cotangent) {
  const int64_t stride = int64_t(gridDim.x) * kLossThreads, row = a.samples * a.out.pixel;
  for (int64_t e = int64_t(blockIdx.x) * kLossThreads + threadIdx.x; e < a.tasks * row; e += stride) {
    const int64_t t = e / row, n = e % row / a.out.pixel, c = e % a.out.pixel;
    a.dy.of(t)[a.at(n) + c] = c < a.out.c ? cotangent[(t * a.samples + n) * a.out.c + c] : Real(0);
  }
}

// An element of the inputs a thread, in the order of the value, which is written once and read from caches.
template <class Real>
__global__ void __launch_bounds__(kLossThreads)
    set_input_kernel(const Value v, int64_t tasks, int64_t samples, const Real* inputs, Batch<Real> x) {
  const int64_t stride = int64_t(gridDim.x) * kLossThreads, rows = tasks * samples * v.h;
  for (int64_t e = int64_t(blockIdx.x) * kLossThreads + threadIdx.x; e < rows * v.w * v.c; e += stride) {
    const int64_t c = e % v.c, j = e / v.c % v.w, row = e / v.c / v.w, i = row % v.h, sample = row / v.h;
    const int64_t at = v.origin + sample % samples * v.sample + i * v.row + j * v.pixel + c;
    x.of(sample / samples)[at] = inputs[((sample * v.c + c) * v.h + i) * v.w + j];
  }
}

}  // namespace metafast::METAFAST_GPU
