// The one way to start a kernel. Kernels are in .cuh files without torch; their launchers in .cu files call
// this.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "gpu.h"

namespace metafast::METAFAST_GPU {

// CUDA's limit for a grid's y; more tasks go round the kernels' loops.
constexpr int64_t kMostTasks = 65535;

// Allows the kernel that many bytes of dynamic shared memory; false where the device has fewer.
template <class... Params>
bool allow_shared(void (*kernel)(Params...), size_t bytes) {
  // No size of an array for which this int would be too small is one that a block can have.
  if (bytes > size_t(1) << 30) return false;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)) == cudaSuccess) {
    return true;
  }
#ifdef __CUDACC__
  cudaGetLastError();  // or the next launch would take it for its own
#endif
  return false;
}

// Starts kernel(args...) on the stream; throws std::runtime_error where CUDA refuses the launch. The emulator
// waits for the end, and throws for all that is wrong in the kernel.
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
            [[maybe_unused]] cudaStream_t stream, Args&&... args) {
#ifdef __CUDACC__
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Args&&>(args)...);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    throw std::runtime_error(std::string("metafast: CUDA refused to launch ") + name + ": " +
                             cudaGetErrorString(error));
  }
#else
  ::emulator::launch(name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
                     [&] { kernel(args...); });
#endif
}

}  // namespace metafast::METAFAST_GPU
