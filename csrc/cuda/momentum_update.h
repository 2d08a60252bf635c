// The launcher of momentum_update's CUDA kernel. Real is float or double.
#pragma once

#include "../momentum_update.h"

struct CUstream_st;

namespace metafast {

// Starts the kernel on the stream of the current device, which holds all the pointers; throws
// std::runtime_error where the launch is refused. Does not wait.
namespace cuda {
template <class Real>
void momentum_update(const MomentumUpdate<Real>& arguments, CUstream_st* stream);
}

// The same kernel on the emulator (csrc/simt), on the CPU's memory.
namespace simt {
template <class Real>
void momentum_update(const MomentumUpdate<Real>& arguments, CUstream_st* stream);
}

}  // namespace metafast
