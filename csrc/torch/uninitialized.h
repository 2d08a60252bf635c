// Tensors for kernels to fill, without the dispatcher on the CPU: small nets' meta-steps make a dozen of
// them, and it takes longer than the allocator.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

namespace metafast {

inline at::Tensor uninitialized(at::IntArrayRef sizes, const at::TensorOptions& options) {
  if (!options.device().is_cpu()) return at::empty(sizes, options);
  return at::detail::empty_cpu(sizes, c10::typeMetaToScalarType(options.dtype()));
}

}  // namespace metafast
