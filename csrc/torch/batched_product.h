// ATen's product of batches of matrices as the kernels' (csrc/batched_product.h): cuBLAS on a device; on the
// CPU's memory, for tests of the emulator, the same calls of ATen with the same strides.
#pragma once

#include "../batched_product.h"

namespace metafast {

// On memory of the current device and torch's current stream there, which `stream` must be. Waits for
// nothing, and may be captured in a graph: what ATen allocates, cuBLAS's workspace, is its caching
// allocator's. Whether float32 keeps all its digits or goes by TF32 is torch's own policy for products,
// torch.set_float32_matmul_precision, off unless the user turns it on. cuBLAS gives the same bits in each run
// on one stream of one kind of device; under torch.use_deterministic_algorithms ATen itself raises where that
// is not so.
template <class Real>
void batched_product_cuda(const BatchedProduct<Real>& product, CUstream_st* stream);

template <class Real>
void batched_product_cpu(const BatchedProduct<Real>& product, CUstream_st*);

}  // namespace metafast
