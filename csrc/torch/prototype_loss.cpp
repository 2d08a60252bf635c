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
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "node.h"
#include "prototype_arguments.h"
#include "simt.h"
#include "uninitialized.h"

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
  const Tensor losses = uninitialized({a.tasks}, options);
  const Tensor d_support = uninitialized(a.support.sizes(), options),
               d_query = uninitialized(a.query.sizes(), options);
  with_real(a.support.scalar_type(), [&](auto real) {
    using Real = decltype(real);
    PrototypeHead<Real> h = a.head<Real>();
    std::vector<double> sums(size_t(a.tasks * h.parts));
    std::vector<Real> d_sums(size_t(a.tasks));
    for (size_t t = 0; t < d_sums.size(); ++t) d_sums[t] = Real(scale) / Real(a.there[t]);
    h.sums = sums.data(), h.d_sums = d_sums.data();
    h.d_support = d_support.mutable_data_ptr<Real>(), h.d_query = d_query.mutable_data_ptr<Real>();
    const Tensor rows = d_means_of_parts(a, h);
    const Tensor means = uninitialized({h.parts > 1 ? a.tasks : 0, a.ways, a.features}, options);
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

using torch::autograd::variable_list;

struct PrototypeLossBackward : SavingNode {
  int64_t ways;
  std::string metric;
  double scale;

  std::string name() const override { return "PrototypeLossBackward"; }

  // To those of support and query.
  variable_list apply(variable_list&& cotangents) override {
    variable_list result(2);
    const Tensor& d_losses = cotangents[0];
    if (!d_losses.defined()) return result;
    const variable_list kept = saved();
    const bool again = at::GradMode::is_enabled();
    if (again || at::isTensorSubclassLike(d_losses)) {
      using Signature = Cotangents(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                   int64_t, c10::string_view, const Maybe&, const Maybe&, const Maybe&,
                                   const Tensor&, const Tensor&, double);
      static const auto op = find<Signature>("metafast::prototype_loss_backward");
      // Only where the backward is differentiated itself need it pass by its own derivative, in Python.
      std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
      if (!again) guard.emplace();
      std::tie(result[0], result[1]) =
          op.call(d_losses, kept[0], kept[1], kept[2], kept[3], ways, metric, maybe(kept[4]), maybe(kept[5]),
                  maybe(kept[6]), kept[7], kept[8], scale);
      return result;
    }
    result[0] = kept[7], result[1] = kept[8];
    if (!is_all(d_losses, scale)) {
      const Tensor factor = d_losses.div(scale).view({-1, 1, 1});
      result[0] = result[0].mul(factor), result[1] = result[1].mul(factor);
    } else if (torch::autograd::get_current_graph_task_keep_graph()) {
      // Whoever gets them may change them; the next one wants them as they are.
      result[0] = result[0].clone(), result[1] = result[1].clone();
    }
    return result;
  }
};

Losses prototype_loss_autograd(const Tensor& support, const Tensor& support_labels, const Tensor& query,
                               const Tensor& query_labels, int64_t ways, c10::string_view metric,
                               const Maybe& support_mask, const Maybe& query_mask, const Maybe& ways_mask,
                               double scale) {
  const bool differentiable = torch::autograd::compute_requires_grad(support, query);
  if (differentiable) check_plain_autograd("prototype_loss", {support, query});
  Losses out = below_autograd(support, support_labels, query, query_labels, ways, metric, support_mask,
                              query_mask, ways_mask, scale);
  if (!differentiable) return out;
  const auto& [losses, d_support, d_query] = out;
  const auto node = make_node<PrototypeLossBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(support, query));
  node->save({support, support_labels, query, query_labels, or_none(support_mask), or_none(query_mask),
              or_none(ways_mask), d_support, d_query});
  node->ways = ways, node->metric = metric, node->scale = scale;
  torch::autograd::set_history(losses, node);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(metafast, CPU, m) { m.impl("prototype_loss", prototype_loss_cpu); }
// Of the CPU alone: elsewhere the derivative is that of metafast/ops/prototype_loss.py.
TORCH_LIBRARY_IMPL(metafast, AutogradCPU, m) { m.impl("prototype_loss", prototype_loss_autograd); }

}  // namespace metafast
