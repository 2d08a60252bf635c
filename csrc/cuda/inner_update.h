// The CUDA launcher of inner_update. Real is float or double.
#pragma once

#include <cuda_runtime_api.h>

#include "../inner_update.h"

namespace metafast::cuda {

// Starts the kernel on the stream of the current device, which holds all the pointers; throws
// std::runtime_error where the launch is refused. Does not wait.
template <class Real>
void inner_update(const InnerUpdate<Real>& arguments, cudaStream_t stream);

}  // namespace metafast::cuda
