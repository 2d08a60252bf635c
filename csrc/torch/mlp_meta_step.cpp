// mlp_meta_step, the front door from torch to the fused meta-step of small networks on CUDA, alone: learners
// come to it by cuda/engine.cu. The operator is in builds with the emulator or with CUDA, for
// tests/ops/test_mlp_meta_step.py.
//
// From here to the loop: cuda/mlp_meta_step.cuh; what it takes is in mlp_meta_step.h.
#if defined(METAFAST_WITH_SIMT) || defined(METAFAST_WITH_CUDA)

#include "../cuda/mlp_meta_step.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../cuda/weighted_sum.h"
#include "checks.h"
#include "simt.h"

#ifdef METAFAST_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace metafast {
namespace {

using at::Tensor;
using Outcome = std::tuple<Tensor, Tensor, Tensor, Tensor>;

MlpShape shape_of(at::IntArrayRef widths, c10::string_view activation, c10::string_view loss) {
  const int64_t layers = int64_t(widths.size()) - 1;
  TORCH_CHECK_VALUE(layers >= 1 && layers <= kMostMlpLayers, "widths: expected 2 to ", kMostMlpLayers + 1,
                    " numbers, got ", widths.size());
  TORCH_CHECK_VALUE(activation == "relu" || activation == "tanh",
                    "activation: expected 'relu' or 'tanh', got '", activation, "'");
  TORCH_CHECK_VALUE(loss == "cross_entropy" || loss == "mse",
                    "loss: expected 'cross_entropy' or 'mse', got '", loss, "'");
  MlpShape shape{int(layers), {}, activation == "tanh", loss == "cross_entropy"};
  for (int64_t l = 0; l <= layers; ++l) {
    const int64_t width = widths[size_t(l)];
    // More would not fit into shared memory, and would not be counted in int.
    TORCH_CHECK_VALUE(width >= 1 && width <= 4096, "widths: expected 1 to 4096, got ", width);
    shape.widths[l] = int(width);
  }
  return shape;
}

// A set's tensors, contiguous, and the memory of them.
struct HeldSet {
  Tensor x, y;

  HeldSet(const char* x_name, const Tensor& given_x, const char* y_name, const Tensor& given_y,
          const MlpShape& shape, int64_t tasks, const Tensor& theta)
      : x(given_x.contiguous()), y(given_y.contiguous()) {
    TORCH_CHECK_VALUE(x.dim() == 3 && x.size(1) >= 1, x_name, ": expected (T, N, D), got ", x.sizes());
    const int64_t samples = x.size(1), out = shape.widths[shape.layers];
    check_tensor(x_name, x, {tasks, samples, shape.widths[0]}, theta.scalar_type(), theta.device());
    if (!shape.cross_entropy) {
      check_tensor(y_name, y, {tasks, samples, out}, theta.scalar_type(), theta.device());
      return;
    }
    check_tensor(y_name, y, {tasks, samples}, at::kLong, theta.device());
    const Tensor labels = y.cpu();
    const int64_t* const label = labels.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < labels.numel(); ++i) {
      TORCH_CHECK_VALUE(label[i] >= 0 && label[i] < out, y_name, ": expected labels 0..", out - 1, ", got ",
                        label[i]);
    }
  }
  template <class Real>
  MlpSet<Real> memory(bool labels) const {
    return {x.size(1), x.const_data_ptr<Real>(), labels ? nullptr : y.const_data_ptr<Real>(),
            labels ? y.const_data_ptr<int64_t>() : nullptr};
  }
};

// The launchers of a namespace, with its stream, for tensors on a device.
#ifdef METAFAST_WITH_SIMT
struct Simt {
  explicit Simt(at::Device) {}
  void step(const auto& arguments) const { simt::mlp_meta_step(arguments, nullptr); }
  void sum(const auto& arguments) const { simt::weighted_sum(arguments, nullptr); }
};
#endif

#ifdef METAFAST_WITH_CUDA
struct Cuda {
  c10::cuda::CUDAGuard guard;  // first: the stream is that of the device
  CUstream_st* stream;

  explicit Cuda(at::Device device) : guard(device), stream(c10::cuda::getCurrentCUDAStream()) {}
  void step(const auto& arguments) const { cuda::mlp_meta_step(arguments, stream); }
  void sum(const auto& arguments) const { cuda::weighted_sum(arguments, stream); }
};
#endif

// Losses and logits of the tasks, their gradients and the weighted sum of these.
template <class Gpu>
Outcome mlp_meta_step(const Tensor& theta, at::IntArrayRef widths, c10::string_view activation,
                      c10::string_view loss, const Tensor& support_x, const Tensor& support_y,
                      const Tensor& query_x, const Tensor& query_y, double lr, int64_t steps,
                      bool first_order, const Tensor& weights) {
  const Gpu gpu(theta.device());
  const MlpShape shape = shape_of(widths, activation, loss);
  const at::ScalarType dtype = theta.scalar_type();
  check_real("theta", theta);
  const int64_t size = shape.size(), tasks = support_x.dim() > 0 ? support_x.size(0) : 0;
  check_tensor("theta", theta, {size}, dtype, theta.device());
  check_tensor("weights", weights, {tasks}, dtype, theta.device());
  TORCH_CHECK_VALUE(tasks >= 1, "support_x: expected at least one task, got ", support_x.sizes());
  TORCH_CHECK_VALUE(steps >= 0, "steps: expected at least 0, got ", steps);
  const HeldSet support("support_x", support_x, "support_y", support_y, shape, tasks, theta),
      query("query_x", query_x, "query_y", query_y, shape, tasks, theta);
  const auto options = theta.options();
  const Tensor losses = at::empty({tasks}, options), grads = at::empty({tasks, size}, options),
               logits = at::empty({tasks, query.x.size(1), shape.widths[shape.layers]}, options),
               gradient = at::empty({size}, options), from = theta.contiguous(), by = weights.contiguous(),
               tape = at::empty({tasks, first_order ? 0 : steps, size}, options);
  with_real(dtype, [&](auto real) {
    using Real = decltype(real);
    const bool labels = shape.cross_entropy;
    gpu.step(MlpMetaStep<Real>{
        shape, tasks, steps, Real(lr), first_order, nullptr, size, from.const_data_ptr<Real>(),
        support.memory<Real>(labels), query.memory<Real>(labels), losses.mutable_data_ptr<Real>(),
        logits.mutable_data_ptr<Real>(), grads.mutable_data_ptr<Real>(), tape.mutable_data_ptr<Real>()});
    gpu.sum(WeightedSum<Real>{grads.const_data_ptr<Real>(), by.const_data_ptr<Real>(), tasks, size,
                              gradient.mutable_data_ptr<Real>()});
  });
  return {losses, logits, grads, gradient};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(metafast, m) {
  m.def(
      "mlp_meta_step(Tensor theta, int[] widths, str activation, str loss, Tensor support_x, Tensor "
      "support_y,"
      " Tensor query_x, Tensor query_y, float lr, int steps, bool first_order, Tensor weights)"
      " -> (Tensor losses, Tensor logits, Tensor grads, Tensor gradient)");
}

// Of the CPU there are only the emulated kernels.
#ifdef METAFAST_WITH_SIMT
TORCH_LIBRARY_IMPL(metafast, CPU, m) { m.impl("mlp_meta_step", mlp_meta_step<Simt>); }
#endif

#ifdef METAFAST_WITH_CUDA
TORCH_LIBRARY_IMPL(metafast, CUDA, m) { m.impl("mlp_meta_step", mlp_meta_step<Cuda>); }
#endif

}  // namespace metafast

#endif
