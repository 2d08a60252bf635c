// The one way to start a kernel. Kernels are in .cuh files without torch; their launchers in .cu files call
// this.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace metafast::cuda {

// Starts kernel(args...) on the stream; throws std::runtime_error where CUDA refuses the launch.
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, Args&&... args) {
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Args&&>(args)...);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    throw std::runtime_error(std::string("metafast: CUDA refused to launch ") + name + ": " +
                             cudaGetErrorString(error));
  }
}

}  // namespace metafast::cuda
