// momentum_update: velocity' = momentum * velocity + grads, updated = params - lr * velocity', the front door
// from torch to the kernels.
//
// From the public function to the loop: metafast/ops/momentum_update.py (checks with the user's names) ->
// here -> cpu/momentum_update_kernel.h or cuda/momentum_update.cuh. The schema stands in the Python file
// beside the fake kernel and the derivative, because the operator exists without the extension too; torch
// holds it against the functions here. The checks here are those that keep a direct caller of torch.ops from
// reading past the end.
#include "../cpu/momentum_update.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../cpu/isa.h"
#include "../cuda/momentum_update.h"
#include "checks.h"
#include "simt.h"

#ifdef METAFAST_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace metafast {
namespace {

using at::Tensor;

// Checks, allocates, and hands the arguments to run(const MomentumUpdate<Real>&), Real being params' type.
template <class Run>
std::tuple<Tensor, Tensor> with_arguments(const Tensor& params, const Tensor& grads,
                                          const std::optional<Tensor>& velocity, double lr, double momentum,
                                          const Run& run) {
  check_tensor("grads", grads, params.sizes(), params.scalar_type(), params.device());
  if (velocity) check_tensor("velocity", *velocity, params.sizes(), params.scalar_type(), params.device());
  const Tensor from = params.contiguous(), along = grads.contiguous();
  const Tensor before = velocity ? velocity->contiguous() : Tensor();
  const Tensor updated = at::empty(params.sizes(), params.options());
  const Tensor next = at::empty(params.sizes(), params.options());
  AT_DISPATCH_FLOATING_TYPES(params.scalar_type(), "metafast::momentum_update", [&] {
    run(MomentumUpdate<scalar_t>{from.const_data_ptr<scalar_t>(), along.const_data_ptr<scalar_t>(),
                                 velocity ? before.const_data_ptr<scalar_t>() : nullptr, scalar_t(lr),
                                 scalar_t(momentum), params.numel(), updated.mutable_data_ptr<scalar_t>(),
                                 next.mutable_data_ptr<scalar_t>()});
  });
  return {updated, next};
}

constexpr cpu::IsaTables<cpu::MomentumUpdateTable> kTables = METAFAST_ISA_TABLES(cpu::kMomentumUpdate);
constexpr int64_t kGrain = 32768;  // elements below which a second thread costs more than it brings

template <class Real>
auto kernel_for(const MomentumUpdate<Real>&) {
  return cpu::functions_for<Real>(kTables.current());
}

std::tuple<Tensor, Tensor> momentum_update_cpu(const Tensor& params, const Tensor& grads,
                                               const std::optional<Tensor>& velocity, double lr,
                                               double momentum) {
  return with_arguments(params, grads, velocity, lr, momentum, [](const auto& arguments) {
#ifdef METAFAST_WITH_SIMT
    if (simt_forced) return simt::momentum_update(arguments, nullptr);
#endif
    const auto kernel = kernel_for(arguments);
    at::parallel_for(0, arguments.count, kGrain,
                     [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
  });
}

#ifdef METAFAST_WITH_CUDA
std::tuple<Tensor, Tensor> momentum_update_cuda(const Tensor& params, const Tensor& grads,
                                                const std::optional<Tensor>& velocity, double lr,
                                                double momentum) {
  const c10::cuda::CUDAGuard guard(params.device());
  return with_arguments(params, grads, velocity, lr, momentum, [](const auto& arguments) {
    cuda::momentum_update(arguments, c10::cuda::getCurrentCUDAStream());
  });
}
#endif

}  // namespace

TORCH_LIBRARY_IMPL(metafast, CPU, m) { m.impl("momentum_update", momentum_update_cpu); }

#ifdef METAFAST_WITH_CUDA
TORCH_LIBRARY_IMPL(metafast, CUDA, m) { m.impl("momentum_update", momentum_update_cuda); }
#endif

}  // namespace metafast
