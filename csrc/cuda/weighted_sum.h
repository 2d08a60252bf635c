// The launcher of weighted_sum's CUDA kernel. Real is float or double.
#pragma once

#include "../weighted_sum.h"

struct CUstream_st;

namespace metafast {

// Starts the kernel on the stream of the current device, which holds all the pointers; throws
// std::runtime_error where the launch is refused. Does not wait.
namespace cuda {
template <class Real>
void weighted_sum(const WeightedSum<Real>& arguments, CUstream_st* stream);
}

// The same kernel on the emulator (csrc/simt), on the CPU's memory.
namespace simt {
template <class Real>
void weighted_sum(const WeightedSum<Real>& arguments, CUstream_st* stream);
}

}  // namespace metafast
