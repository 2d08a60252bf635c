// The launcher of the fused meta-step of small networks. Real is float or double.
#pragma once

#include "../mlp_meta_step.h"

struct CUstream_st;

namespace metafast {

// Starts the kernel on the stream of the current device, which holds all the pointers; throws
// std::invalid_argument where a task does not fit into a block's shared memory, std::runtime_error where the
// launch is refused. Does not wait.
namespace cuda {
// Whether a task of so many samples, the larger of its two sets', fits into a block of the current device.
template <class Real>
bool fits_mlp_meta_step(const MlpShape& shape, int64_t samples);
template <class Real>
void mlp_meta_step(const MlpMetaStep<Real>& arguments, CUstream_st* stream);
}  // namespace cuda

// The same kernel on the emulator (csrc/simt), on the CPU's memory.
namespace simt {
template <class Real>
bool fits_mlp_meta_step(const MlpShape& shape, int64_t samples);
template <class Real>
void mlp_meta_step(const MlpMetaStep<Real>& arguments, CUstream_st* stream);
}  // namespace simt

}  // namespace metafast
