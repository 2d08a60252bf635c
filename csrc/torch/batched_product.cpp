#include "batched_product.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/from_blob.h>

#include <array>
#include <type_traits>

#ifdef METAFAST_WITH_CUDA
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace metafast {
namespace {

template <class T>
at::Tensor tensor(const StridedMatrices<T>& m, int64_t tasks, int64_t rows, int64_t columns,
                  at::Device device) {
  using Real = std::remove_const_t<T>;
  const std::array<int64_t, 3> sizes{tasks, rows, columns}, strides{m.task, m.row, m.column};
  // With the device said, nobody asks CUDA whose the pointer is.
  return at::for_blob(const_cast<Real*>(m.first), sizes)
      .strides(strides)
      .options(at::TensorOptions().dtype(c10::CppTypeToScalarType<Real>::value).device(device))
      .target_device(device)
      .make_tensor();
}

template <class Real>
void multiply(const BatchedProduct<Real>& p, at::Device device) {
  // The tensors are of this call alone: no autograd, nor its version counters.
  const at::AutoDispatchBelowADInplaceOrView below;
  const at::Tensor a = tensor(p.a, p.tasks, p.rows, p.depth, device),
                   b = tensor(p.b, p.tasks, p.depth, p.columns, device);
  at::Tensor out = tensor(p.out, p.tasks, p.rows, p.columns, device);
  p.accumulate ? out.baddbmm_(a, b) : at::bmm_out(out, a, b);
  // Had ATen found the sizes wrong, it would have given `out` other memory.
  TORCH_INTERNAL_ASSERT(out.const_data_ptr() == p.out.first);
}

}  // namespace

template <class Real>
void batched_product_cpu(const BatchedProduct<Real>& product, CUstream_st*) {
  multiply(product, at::kCPU);
}
template void batched_product_cpu(const BatchedProduct<float>&, CUstream_st*);
template void batched_product_cpu(const BatchedProduct<double>&, CUstream_st*);

#ifdef METAFAST_WITH_CUDA
template <class Real>
void batched_product_cuda(const BatchedProduct<Real>& product, CUstream_st* stream) {
  const at::Device device(at::kCUDA, c10::cuda::current_device());
  TORCH_INTERNAL_ASSERT(c10::cuda::getCurrentCUDAStream(device.index()).stream() == stream);
  multiply(product, device);
}
template void batched_product_cuda(const BatchedProduct<float>&, CUstream_st*);
template void batched_product_cuda(const BatchedProduct<double>&, CUstream_st*);
#endif

}  // namespace metafast
