// prototype_head and prototype_head_backward, the front door from torch to the kernels of the prototype head.
//
// From the public function to the loop: metafast/ops/prototypes.py (checks of shapes with the user's names,
// schemas, fake kernels, second derivatives) -> here (checks of labels and masks, the first derivative) ->
// cpu/prototypes_kernel.h or cuda/prototypes.cuh. The first derivative stands here because autograd's way
// through Python would take longer than the kernels on small episodes.
#include "../cuda/prototypes.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <vector>

#include "../cuda/weighted_sum.h"
#include "prototype_arguments.h"
#include "simt.h"

#ifdef METAFAST_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace metafast {
namespace {

using namespace prototypes;
using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor>;

// Allocates, and hands it to run(const PrototypeHead<Real>&, losses).
template <class Run>
Forward forward_by(const Arguments& a, const Run& run) {
  const auto options = a.support.options();
  const bool with_loss = a.query_labels.defined();
  const Tensor losses = at::empty({with_loss ? a.tasks : 0}, options);
  const Tensor logits = at::empty({a.tasks, a.queries, a.ways}, options);
  const Tensor means = at::empty({a.tasks, a.ways, a.features}, options);
  const Tensor residual = at::empty({with_loss ? a.tasks : 0, a.ways, whole_groups(a.queries)}, options);
  with_real(a.support.scalar_type(), [&](auto real) {
    using Real = decltype(real);
    PrototypeHead<Real> h = a.head<Real>();
    h.means = means.mutable_data_ptr<Real>(), h.logits = logits.mutable_data_ptr<Real>();
    h.residual = residual.mutable_data_ptr<Real>();
    run(h, losses);
  });
  return {losses, logits, means, residual};
}

template <class Real>
void forward_on_cpu(const Arguments& a, PrototypeHead<Real> h, const Tensor& losses) {
  std::vector<double> sums(size_t(a.tasks * h.parts));
  h.sums = sums.data();
  a.for_each(h, h.parts, false, [&](int64_t task, int64_t part, Real* workspace) {
    functions<Real>().forward(h, task, part, workspace);
  });
  write_losses<Real>(a, sums, h.parts, losses);
}

// Checks, allocates, and hands it to run(const PrototypeHead<Real>&, cotangents of the losses), for the
// cotangents of support and query; logits, means and residual are the forward's.
template <class Run>
Backward backward_by(const Arguments& a, const Maybe& d_losses, const Maybe& d_logits, const Tensor& logits,
                     const Tensor& means, const Tensor& residual, const Run& run) {
  const at::ScalarType dtype = a.support.scalar_type();
  const bool with_loss = a.query_labels.defined();
  TORCH_CHECK_VALUE(!d_losses || with_loss, "d_losses: expected none without query_labels");
  const Tensor along_losses = a.taken("d_losses", d_losses, {a.tasks}, dtype);
  const Tensor along_logits = a.taken("d_logits", d_logits, {a.tasks, a.queries, a.ways}, dtype);
  const Tensor kept_logits = a.taken("logits", logits, {a.tasks, a.queries, a.ways}, dtype);
  const Tensor kept_means = a.taken("means", means, {a.tasks, a.ways, a.features}, dtype);
  const Tensor kept_residual =
      a.taken("residual", residual, {with_loss ? a.tasks : 0, a.ways, whole_groups(a.queries)}, dtype);
  const Tensor d_support = at::empty(a.support.sizes(), a.support.options()),
               d_query = at::empty(a.query.sizes(), a.support.options());
  with_real(dtype, [&](auto real) {
    using Real = decltype(real);
    PrototypeHead<Real> h = a.head<Real>();
    // The kernels' pointers are to what the forward writes; the backward only reads.
    h.logits = const_cast<Real*>(kept_logits.const_data_ptr<Real>());
    h.means = const_cast<Real*>(kept_means.const_data_ptr<Real>());
    h.residual = const_cast<Real*>(kept_residual.const_data_ptr<Real>());
    h.d_support = d_support.mutable_data_ptr<Real>(), h.d_query = d_query.mutable_data_ptr<Real>();
    h.d_logits = a.memory<Real>(along_logits);
    run(h, along_losses);
  });
  return {d_support, d_query};
}

template <class Real>
void backward_on_cpu(const Arguments& a, PrototypeHead<Real> h, const Tensor& d_losses) {
  std::vector<Real> d_sums(size_t(a.tasks));
  if (d_losses.defined()) {
    const Real* const from = d_losses.const_data_ptr<Real>();
    for (size_t t = 0; t < d_sums.size(); ++t) d_sums[t] = from[t] / Real(a.there[t]);
    h.d_sums = d_sums.data();
  }
  const Tensor rows = d_means_of_parts(a, h);
  a.for_each(h, h.parts, false, [&](int64_t task, int64_t part, Real* workspace) {
    functions<Real>().backward(h, task, part, workspace);
  });
  finish_on_cpu(a, h);
}

#if defined(METAFAST_WITH_SIMT) || defined(METAFAST_WITH_CUDA)
// What the kernels of cuda/prototypes.cuh hand to each other, as long as this is held.
template <class Real>
struct Workspace {
  PrototypeWorkspace<Real> memory{};
  std::vector<Tensor> tensors;

  Workspace(const Arguments& a, bool backward) {
    const auto take = [&](at::IntArrayRef sizes) {
      tensors.push_back(at::empty(sizes, a.support.options()));
      return tensors.back().mutable_data_ptr<Real>();
    };
    const bool cosine = a.metric == Metric::cosine;
    if (cosine) memory.mean_inverse = take({a.tasks, a.ways});
    if (cosine) memory.query_inverse = take({a.tasks, a.queries});
    if (backward) memory.weights = take({a.tasks, a.ways, a.queries});
    if (backward && cosine) memory.self = take({a.tasks, a.queries});
    if (backward && cosine) memory.d_means = take({a.tasks, a.ways, a.features});
  }
};

// Of sums over a task's queries, or their cotangents, means in place.
void divide_by_queries(const Arguments& a, Tensor sums) {
  if (a.query_mask.defined()) {
    sums.div_(a.query_mask.sum(1));
  } else {
    sums.div_(a.queries);
  }
}

// Gpu: the launchers of a namespace, with its stream.
template <class Gpu, class Real>
void forward_on(const Gpu& gpu, const Arguments& a, PrototypeHead<Real> h, const Tensor& losses) {
  const Workspace<Real> workspace(a, false);
  h.parts = (a.queries + kPrototypeTile - 1) / kPrototypeTile;
  const auto options = a.support.options().dtype(at::kDouble);
  const Tensor parts = at::empty({h.parts, a.tasks}, options), sums = at::empty({a.tasks}, options);
  h.sums = parts.mutable_data_ptr<double>();
  gpu.forward(h, workspace.memory);
  if (!a.query_labels.defined()) return;
  gpu.sum({h.sums, nullptr, h.parts, a.tasks, sums.mutable_data_ptr<double>()});
  divide_by_queries(a, sums);
  losses.copy_(sums);
}

template <class Gpu, class Real>
void backward_on(const Gpu& gpu, const Arguments& a, PrototypeHead<Real> h, const Tensor& d_losses) {
  const Workspace<Real> workspace(a, true);
  Tensor d_sums;
  if (d_losses.defined()) {
    d_sums = d_losses.clone();
    divide_by_queries(a, d_sums);
    h.d_sums = d_sums.const_data_ptr<Real>();
  }
  gpu.backward(h, workspace.memory);
}
#endif

#ifdef METAFAST_WITH_SIMT
struct Simt {
  void forward(const auto&... arguments) const { simt::prototype_head(arguments..., nullptr); }
  void backward(const auto&... arguments) const { simt::prototype_head_backward(arguments..., nullptr); }
  void sum(const WeightedSum<double>& arguments) const { simt::weighted_sum(arguments, nullptr); }
};
#endif

Forward prototype_head_cpu(const Tensor& support, const Tensor& support_labels, const Tensor& query,
                           const Maybe& query_labels, int64_t ways, c10::string_view metric,
                           const Maybe& support_mask, const Maybe& query_mask, const Maybe& ways_mask) {
  const Arguments a(support, support_labels, query, query_labels, ways, metric, support_mask, query_mask,
                    ways_mask);
  return forward_by(a, [&](const auto& h, const Tensor& losses) {
#ifdef METAFAST_WITH_SIMT
    if (simt_forced) return forward_on(Simt(), a, h, losses);
#endif
    forward_on_cpu(a, h, losses);
  });
}

Backward prototype_head_backward_cpu(const Maybe& d_losses, const Maybe& d_logits, const Tensor& support,
                                     const Tensor& support_labels, const Tensor& query,
                                     const Maybe& query_labels, const Tensor& logits, const Tensor& means,
                                     const Tensor& residual, int64_t ways, c10::string_view metric,
                                     const Maybe& support_mask, const Maybe& query_mask,
                                     const Maybe& ways_mask) {
  const Arguments a(support, support_labels, query, query_labels, ways, metric, support_mask, query_mask,
                    ways_mask);
  return backward_by(a, d_losses, d_logits, logits, means, residual,
                     [&](const auto& h, const Tensor& along_losses) {
#ifdef METAFAST_WITH_SIMT
                       if (simt_forced) return backward_on(Simt(), a, h, along_losses);
#endif
                       backward_on_cpu(a, h, along_losses);
                     });
}

#ifdef METAFAST_WITH_CUDA
struct Cuda {
  CUstream_st* stream = c10::cuda::getCurrentCUDAStream();

  void forward(const auto&... arguments) const { cuda::prototype_head(arguments..., stream); }
  void backward(const auto&... arguments) const { cuda::prototype_head_backward(arguments..., stream); }
  void sum(const WeightedSum<double>& arguments) const { cuda::weighted_sum(arguments, stream); }
};

Forward prototype_head_cuda(const Tensor& support, const Tensor& support_labels, const Tensor& query,
                            const Maybe& query_labels, int64_t ways, c10::string_view metric,
                            const Maybe& support_mask, const Maybe& query_mask, const Maybe& ways_mask) {
  const c10::cuda::CUDAGuard guard(support.device());
  const Arguments a(support, support_labels, query, query_labels, ways, metric, support_mask, query_mask,
                    ways_mask);
  return forward_by(a, [&](const auto& h, const Tensor& losses) { forward_on(Cuda(), a, h, losses); });
}

Backward prototype_head_backward_cuda(const Maybe& d_losses, const Maybe& d_logits, const Tensor& support,
                                      const Tensor& support_labels, const Tensor& query,
                                      const Maybe& query_labels, const Tensor& logits, const Tensor& means,
                                      const Tensor& residual, int64_t ways, c10::string_view metric,
                                      const Maybe& support_mask, const Maybe& query_mask,
                                      const Maybe& ways_mask) {
  const c10::cuda::CUDAGuard guard(support.device());
  const Arguments a(support, support_labels, query, query_labels, ways, metric, support_mask, query_mask,
                    ways_mask);
  return backward_by(
      a, d_losses, d_logits, logits, means, residual,
      [&](const auto& h, const Tensor& along_losses) { backward_on(Cuda(), a, h, along_losses); });
}
#endif

Forward below_autograd(const Tensor& support, const Tensor& support_labels, const Tensor& query,
                       const Maybe& query_labels, int64_t ways, c10::string_view metric,
                       const Maybe& support_mask, const Maybe& query_mask, const Maybe& ways_mask) {
  static const auto op = find<decltype(prototype_head_cpu)>("metafast::prototype_head");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(support, support_labels, query, query_labels, ways, metric, support_mask, query_mask,
                 ways_mask);
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct HeadFunction : torch::autograd::Function<HeadFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& support, const Tensor& support_labels,
                               const Tensor& query, const Maybe& query_labels, int64_t ways,
                               std::string metric, const Maybe& support_mask, const Maybe& query_mask,
                               const Maybe& ways_mask) {
    const auto [losses, logits, means, residual] = below_autograd(
        support, support_labels, query, query_labels, ways, metric, support_mask, query_mask, ways_mask);
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({means, residual});
    ctx->save_for_backward({support, support_labels, query, or_none(query_labels), logits, means, residual,
                            or_none(support_mask), or_none(query_mask), or_none(ways_mask)});
    ctx->saved_data["ways"] = ways;
    ctx->saved_data["metric"] = std::move(metric);
    return {losses, logits, means, residual};
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    variable_list result(9);  // one for each argument of forward
    // Of no labels there are no losses, and nothing that their cotangent would say.
    const variable_list saved = ctx->get_saved_variables();
    const Maybe d_losses = saved[3].defined() ? maybe(cotangents[0]) : std::nullopt,
                d_logits = maybe(cotangents[1]);
    if (!d_losses && !d_logits) return result;
    static const auto op = find<decltype(prototype_head_backward_cpu)>("metafast::prototype_head_backward");
    // Only where the backward is differentiated itself need it pass by its own derivative, in Python.
    std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
    if (!at::GradMode::is_enabled()) guard.emplace();
    std::tie(result[0], result[2]) =
        op.call(d_losses, d_logits, saved[0], saved[1], saved[2], maybe(saved[3]), saved[4].detach(),
                saved[5], saved[6], ctx->saved_data["ways"].toInt(), ctx->saved_data["metric"].toStringView(),
                maybe(saved[7]), maybe(saved[8]), maybe(saved[9]));
    return result;
  }
};

Forward prototype_head_autograd(const Tensor& support, const Tensor& support_labels, const Tensor& query,
                                const Maybe& query_labels, int64_t ways, c10::string_view metric,
                                const Maybe& support_mask, const Maybe& query_mask, const Maybe& ways_mask) {
  if (!at::GradMode::is_enabled() || !(support.requires_grad() || query.requires_grad())) {
    return below_autograd(support, support_labels, query, query_labels, ways, metric, support_mask,
                          query_mask, ways_mask);
  }
  const variable_list out = HeadFunction::apply(support, support_labels, query, query_labels, ways,
                                                std::string(metric), support_mask, query_mask, ways_mask);
  return {out[0], out[1], out[2], out[3]};
}

}  // namespace

TORCH_LIBRARY_IMPL(metafast, CPU, m) {
  m.impl("prototype_head", prototype_head_cpu);
  m.impl("prototype_head_backward", prototype_head_backward_cpu);
}

#ifdef METAFAST_WITH_CUDA
TORCH_LIBRARY_IMPL(metafast, CUDA, m) {
  m.impl("prototype_head", prototype_head_cuda);
  m.impl("prototype_head_backward", prototype_head_backward_cuda);
}
#endif

// Of the CPU alone: elsewhere the derivative is that of metafast/ops/prototypes.py.
TORCH_LIBRARY_IMPL(metafast, AutogradCPU, m) { m.impl("prototype_head", prototype_head_autograd); }

}  // namespace metafast
