// prototype_loss, losses and their gradients at once, the front door from torch to its CPU kernel.
//
// Of losses it is known beforehand what the backward computes, but for a factor for each task: softmax less
// one-hot, through the distances. So the forward takes the gradients along while a block of queries is in the
// cache, for the factor that `.mean()` will bring, and nothing is kept but them; the backward hands them out,
// scaled if the factor is another.
//
// From the public function to the loop: metafast/ops/prototype_loss.py -> here -> cpu/prototypes_kernel.h.
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/full.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "prototype_arguments.h"
#include "simt.h"

namespace metafast {
namespace {

using namespace prototypes;
using Losses = std::tuple<Tensor, Tensor, Tensor>;
using Cotangents = std::tuple<Tensor, Tensor>;

#ifdef METAFAST_WITH_SIMT
// By the operators that the emulator has.
Losses on_emulator(const Tensor& support, const Tensor& support_labels, const Tensor& query,
                   const Tensor& query_labels, int64_t ways, c10::string_view metric,
                   const Maybe& support_mask, const Maybe& query_mask, const Maybe& ways_mask, double scale) {
  using Head = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                          const Maybe&, int64_t, c10::string_view,
                                                          const Maybe&, const Maybe&, const Maybe&);
  using Back = Cotangents(const Maybe&, const Maybe&, const Tensor&, const Tensor&, const Tensor&,
                          const Maybe&, const Tensor&, const Tensor&, const Tensor&, int64_t,
                          c10::string_view, const Maybe&, const Maybe&, const Maybe&);
  const auto [losses, logits, means, residual] = find<Head>("metafast::prototype_head")
                                                     .call(support, support_labels, query, query_labels, ways,
                                                           metric, support_mask, query_mask, ways_mask);
  const auto [d_support, d_query] =
      find<Back>("metafast::prototype_head_backward")
          .call(at::full_like(losses, scale), std::nullopt, support, support_labels, query, query_labels,
                logits, means, residual, ways, metric, support_mask, query_mask, ways_mask);
  return {losses, d_support, d_query};
}
#endif

Losses prototype_loss_cpu(const Tensor& support, const Tensor& support_labels, const Tensor& query,
                          const Tensor& query_labels, int64_t ways, c10::string_view metric,
                          const Maybe& support_mask, const Maybe& query_mask, const Maybe& ways_mask,
                          double scale) {
#ifdef METAFAST_WITH_SIMT
  if (simt_forced)
    return on_emulator(support, support_labels, query, query_labels, ways, metric, support_mask, query_mask,
                       ways_mask, scale);
#endif
  const Arguments a(support, support_labels, query, query_labels, ways, metric, support_mask, query_mask,
                    ways_mask);
  const auto options = a.support.options();
  const Tensor losses = at::empty({a.tasks}, options);
  const Tensor d_support = at::empty(a.support.sizes(), options),
               d_query = at::empty(a.query.sizes(), options);
  with_real(a.support.scalar_type(), [&](auto real) {
    using Real = decltype(real);
    PrototypeHead<Real> h = a.head<Real>();
    std::vector<double> sums(size_t(a.tasks * h.parts));
    std::vector<Real> d_sums(size_t(a.tasks));
    for (size_t t = 0; t < d_sums.size(); ++t) d_sums[t] = Real(scale) / Real(a.there[t]);
    h.sums = sums.data(), h.d_sums = d_sums.data();
    h.d_support = d_support.mutable_data_ptr<Real>(), h.d_query = d_query.mutable_data_ptr<Real>();
    const Tensor rows = d_means_of_parts(a, h);
    const Tensor means = at::empty({h.parts > 1 ? a.tasks : 0, a.ways, a.features}, options);
    h.means = means.mutable_data_ptr<Real>();
    a.for_each(h, h.parts, true, [&](int64_t task, int64_t part, Real* workspace) {
      functions<Real>().gradients(h, task, part, workspace);
    });
    finish_on_cpu(a, h);
    write_losses<Real>(a, sums, h.parts, losses);
  });
  return {losses, d_support, d_query};
}

Losses below_autograd(const Tensor& support, const Tensor& support_labels, const Tensor& query,
                      const Tensor& query_labels, int64_t ways, c10::string_view metric,
                      const Maybe& support_mask, const Maybe& query_mask, const Maybe& ways_mask,
                      double scale) {
  static const auto op = find<decltype(prototype_loss_cpu)>("metafast::prototype_loss");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(support, support_labels, query, query_labels, ways, metric, support_mask, query_mask,
                 ways_mask, scale);
}

// Whether all of d is the factor that the gradients have already.
bool is_all(const Tensor& d, double scale) {
  if (d.is_neg()) return false;
  bool all = true;
  with_real(d.scalar_type(), [&](auto real) {
    using Real = decltype(real);
    const Real* const at = d.const_data_ptr<Real>();
    const int64_t step = d.stride(0);
    for (int64_t t = 0; t < d.size(0); ++t) all = all && at[t * step] == Real(scale);
  });
  return all;
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct LossFunction : torch::autograd::Function<LossFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& support, const Tensor& support_labels,
                               const Tensor& query, const Tensor& query_labels, int64_t ways,
                               std::string metric, const Maybe& support_mask, const Maybe& query_mask,
                               const Maybe& ways_mask, double scale) {
    const auto [losses, d_support, d_query] =
        below_autograd(support, support_labels, query, query_labels, ways, metric, support_mask, query_mask,
                       ways_mask, scale);
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({d_support, d_query});
    ctx->save_for_backward({support, support_labels, query, query_labels, or_none(support_mask),
                            or_none(query_mask), or_none(ways_mask), d_support, d_query});
    ctx->saved_data["ways"] = ways;
    ctx->saved_data["metric"] = std::move(metric);
    ctx->saved_data["scale"] = scale;
    return {losses, d_support, d_query};
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    variable_list result(10);  // one for each argument of forward
    const Tensor& d_losses = cotangents[0];
    if (!d_losses.defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const double scale = ctx->saved_data["scale"].toDouble();
    const bool again = at::GradMode::is_enabled();
    if (again || at::isTensorSubclassLike(d_losses)) {
      using Signature = Cotangents(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                   int64_t, c10::string_view, const Maybe&, const Maybe&, const Maybe&,
                                   const Tensor&, const Tensor&, double);
      static const auto op = find<Signature>("metafast::prototype_loss_backward");
      // Only where the backward is differentiated itself need it pass by its own derivative, in Python.
      std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
      if (!again) guard.emplace();
      std::tie(result[0], result[2]) =
          op.call(d_losses, saved[0], saved[1], saved[2], saved[3], ctx->saved_data["ways"].toInt(),
                  ctx->saved_data["metric"].toStringView(), maybe(saved[4]), maybe(saved[5]), maybe(saved[6]),
                  saved[7], saved[8], scale);
      return result;
    }
    result[0] = saved[7], result[2] = saved[8];
    if (!is_all(d_losses, scale)) {
      const Tensor factor = d_losses.div(scale).view({-1, 1, 1});
      result[0] = result[0].mul(factor), result[2] = result[2].mul(factor);
    } else if (torch::autograd::get_current_graph_task_keep_graph()) {
      // Whoever gets them may change them; the next one wants them as they are.
      result[0] = result[0].clone(), result[2] = result[2].clone();
    }
    return result;
  }
};

Losses prototype_loss_autograd(const Tensor& support, const Tensor& support_labels, const Tensor& query,
                               const Tensor& query_labels, int64_t ways, c10::string_view metric,
                               const Maybe& support_mask, const Maybe& query_mask, const Maybe& ways_mask,
                               double scale) {
  if (!at::GradMode::is_enabled() || !(support.requires_grad() || query.requires_grad())) {
    return below_autograd(support, support_labels, query, query_labels, ways, metric, support_mask,
                          query_mask, ways_mask, scale);
  }
  const variable_list out =
      LossFunction::apply(support, support_labels, query, query_labels, ways, std::string(metric),
                          support_mask, query_mask, ways_mask, scale);
  return {out[0], out[1], out[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(metafast, CPU, m) { m.impl("prototype_loss", prototype_loss_cpu); }
// Of the CPU alone: elsewhere the derivative is that of metafast/ops/prototype_loss.py.
TORCH_LIBRARY_IMPL(metafast, AutogradCPU, m) { m.impl("prototype_loss", prototype_loss_autograd); }

}  // namespace metafast
