// inner_update: updated = params - scale * lr * grads, the front door from torch to the kernels.
//
// From the public function to the loop: metafast/ops/inner_update.py (checks with the user's names) -> here
// -> cpu/inner_update_kernel.h or cuda/inner_update.cuh. The schemas stand in the Python file beside the fake
// kernels and the derivatives, because the operators exist without the extension too; torch holds them
// against the functions here. The checks here are those that keep a direct caller of torch.ops from reading
// past the end.
#include "../cpu/inner_update.h"

#include <ATen/Dispatch.h>
#include <ATen/ExpandUtils.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../cpu/isa.h"
#include "../cuda/inner_update.h"
#include "checks.h"
#include "simt.h"

#ifdef METAFAST_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace metafast {
namespace {

using at::Tensor;

void check(const Tensor& params, const Tensor& grads, const std::optional<Tensor>& lr) {
  TORCH_CHECK_VALUE(params.dim() >= 1, "params: expected (T, ...), got ", params.sizes());
  const auto check_like_params = [&](const char* name, const Tensor& x) {
    check_like(name, x, params.scalar_type(), params.device());
  };
  check_like_params("grads", grads);
  TORCH_CHECK_VALUE(grads.sizes() == params.sizes(), "grads: expected shape ", params.sizes(), ", got ",
                    grads.sizes());
  if (!lr) return;
  check_like_params("lr", *lr);
  TORCH_CHECK_VALUE(at::is_expandable_to(lr->sizes(), params.sizes()),
                    "lr: expected a shape that broadcasts to ", params.sizes(), ", got ", lr->sizes());
}

// lr (broadcasts to params) as memory with element (t, p) at [t * task + p * param], param 0 or 1.
struct Rates {
  Tensor memory;
  int64_t task, param;
};

Rates rates(const Tensor& lr, const Tensor& params) {
  const int64_t tasks = params.size(0), size = params.numel() / std::max<int64_t>(tasks, 1);
  const bool has_tasks = lr.dim() == params.dim() && lr.size(0) != 1;
  if (lr.numel() == 1) return {lr.contiguous(), 0, 0};
  if (has_tasks && lr.numel() == tasks) return {lr.contiguous(), 1, 0};
  if (!has_tasks && lr.numel() == size) return {lr.contiguous(), 0, 1};
  return {lr.expand_as(params).contiguous(), size, 1};
}

// Checks, allocates, and hands the arguments to run(const InnerUpdate<Real>&), Real being params' type.
template <class Run>
Tensor with_arguments(const Tensor& params, const Tensor& grads, const std::optional<Tensor>& lr,
                      double scale, const Run& run) {
  check(params, grads, lr);
  const Tensor from = params.contiguous(), along = grads.contiguous();
  const Rates rate = lr ? rates(*lr, params) : Rates{{}, 0, 0};
  const Tensor updated = at::empty(params.sizes(), params.options());
  const int64_t tasks = params.size(0), size = params.numel() / std::max<int64_t>(tasks, 1);
  AT_DISPATCH_FLOATING_TYPES(params.scalar_type(), "metafast::inner_update", [&] {
    run(InnerUpdate<scalar_t>{from.const_data_ptr<scalar_t>(), along.const_data_ptr<scalar_t>(),
                              lr ? rate.memory.const_data_ptr<scalar_t>() : nullptr, rate.task, rate.param,
                              scalar_t(scale), tasks, size, updated.mutable_data_ptr<scalar_t>()});
  });
  return updated;
}

// A tensor at a time: with(params[i], grads[i], lr[i] or none, scale[i]).
template <class One>
std::vector<Tensor> for_each(at::TensorList params, at::TensorList grads, at::TensorList lr,
                             at::ArrayRef<double> scale, const One& one) {
  TORCH_CHECK_VALUE(grads.size() == params.size(), "grads: expected ", params.size(), " tensors, got ",
                    grads.size());
  TORCH_CHECK_VALUE(scale.size() == params.size(), "scale: expected ", params.size(), " numbers, got ",
                    scale.size());
  TORCH_CHECK_VALUE(lr.empty() || lr.size() == params.size(), "lr: expected 0 or ", params.size(),
                    " tensors, got ", lr.size());
  std::vector<Tensor> updated;
  updated.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    updated.push_back(one(params[i], grads[i], lr.empty() ? std::nullopt : std::optional(lr[i]), scale[i]));
  }
  return updated;
}

constexpr cpu::IsaTables<cpu::InnerUpdateTable> kTables = METAFAST_ISA_TABLES(cpu::kInnerUpdate);
constexpr int64_t kGrain = 32768;  // elements below which a second thread costs more than it brings

template <class Real>
auto kernel_for(const InnerUpdate<Real>&) {
  return cpu::functions_for<Real>(kTables.current());
}

Tensor inner_update_cpu(const Tensor& params, const Tensor& grads, const std::optional<Tensor>& lr,
                        double scale) {
  return with_arguments(params, grads, lr, scale, [](const auto& arguments) {
#ifdef METAFAST_WITH_SIMT
    if (simt_forced) return simt::inner_update(arguments, nullptr);
#endif
    const auto kernel = kernel_for(arguments);
    at::parallel_for(0, arguments.tasks * arguments.size, kGrain,
                     [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
  });
}

std::vector<Tensor> inner_update_list_cpu(at::TensorList params, at::TensorList grads, at::TensorList lr,
                                          at::ArrayRef<double> scale) {
  return for_each(params, grads, lr, scale, inner_update_cpu);
}

#ifdef METAFAST_WITH_CUDA
Tensor inner_update_cuda(const Tensor& params, const Tensor& grads, const std::optional<Tensor>& lr,
                         double scale) {
  const c10::cuda::CUDAGuard guard(params.device());
  return with_arguments(params, grads, lr, scale, [](const auto& arguments) {
    cuda::inner_update(arguments, c10::cuda::getCurrentCUDAStream());
  });
}

std::vector<Tensor> inner_update_list_cuda(at::TensorList params, at::TensorList grads, at::TensorList lr,
                                           at::ArrayRef<double> scale) {
  return for_each(params, grads, lr, scale, inner_update_cuda);
}
#endif

}  // namespace

TORCH_LIBRARY_IMPL(metafast, CPU, m) {
  m.impl("inner_update", inner_update_cpu);
  m.impl("inner_update.list", inner_update_list_cpu);
}

#ifdef METAFAST_WITH_CUDA
TORCH_LIBRARY_IMPL(metafast, CUDA, m) {
  m.impl("inner_update", inner_update_cuda);
  m.impl("inner_update.list", inner_update_list_cuda);
}
#endif

}  // namespace metafast
