// What a kernel sees of CUDA when g++ compiles it for the emulator: found as <cuda_runtime.h> before CUDA's
// own. The language's words that a preprocessor can give; shared memory, which it cannot, is declared by
// METAFAST_SHARED of csrc/cuda/gpu.h.
#pragma once

#include <algorithm>
#include <cmath>

#include "atomics.h"
#include "emulator.h"
#include "vectors.h"
#include "warp.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index_now())
#define blockDim (::emulator::block_size_now())
#define gridDim (::emulator::grid_size_now())

namespace emulator {
inline uint3 thread_index() { return running.thread->index; }
inline uint3 block_index_now() { return running.block_index; }
inline dim3 block_size_now() { return running.block_size; }
inline dim3 grid_size_now() { return running.grid_size; }
}  // namespace emulator

constexpr int warpSize = 32;

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

template <class... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute, int value) {
  const bool fits =
      value >= 0 && emulator::allow_shared(reinterpret_cast<const void*>(kernel), size_t(value));
  return fits ? cudaSuccess : cudaErrorInvalidValue;
}

using std::max;
using std::min;

template <class T>
T __ldg(const T* address) {
  return *address;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
