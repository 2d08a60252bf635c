// prototype_head and prototype_head_backward, the front door from torch to the kernels of the prototype head.
//
// From the public function to the loop: metafast/ops/prototypes.py (checks of shapes with the user's names,
// schemas, fake kernels, second derivatives) -> here (checks of labels and masks, the first derivative) ->
// cpu/prototypes_kernel.h. The first derivative stands here because autograd's way through Python would take
// longer than the kernels on small episodes.
#include "../cpu/prototypes.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "../cpu/isa.h"
#include "metric.h"

namespace metafast {
namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;
using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor>;

constexpr cpu::IsaTables<cpu::PrototypeTable> kTables = METAFAST_ISA_TABLES(cpu::kPrototypes);

template <class Real>
const cpu::PrototypeFunctions<Real>& functions() {
  return cpu::functions_for<Real>(kTables.current());
}

// The arguments that forward and backward share, contiguous.
struct Arguments {
  Tensor support, support_labels, query, query_labels, support_mask, query_mask, class_mask;
  int64_t tasks, supports, queries, features, ways;
  Metric metric;
  std::vector<int64_t> there;  // queries of each task

  Arguments(const Tensor& s, const Tensor& s_labels, const Tensor& q, const Maybe& q_labels, int64_t classes,
            c10::string_view name, const Maybe& s_mask, const Maybe& q_mask, const Maybe& c_mask)
      : ways(classes), metric(metric_of(name)) {
    TORCH_CHECK_TYPE(s.scalar_type() == at::kFloat || s.scalar_type() == at::kDouble,
                     "support: expected float32 or float64, got ", s.scalar_type());
    TORCH_CHECK_VALUE(s.dim() == 3 && s.numel() > 0, "support: expected (T, Ns, D), none of them 0, got ",
                      s.sizes());
    TORCH_CHECK_VALUE(q.dim() == 3 && q.numel() > 0, "query: expected (T, Nq, D), none of them 0, got ",
                      q.sizes());
    TORCH_CHECK_VALUE(ways >= 1, "ways: expected at least 1, got ", ways);
    tasks = s.size(0), supports = s.size(1), features = s.size(2), queries = q.size(1);
    support = taken("support", s, {tasks, supports, features}, s.scalar_type());
    query = taken("query", q, {tasks, queries, features}, s.scalar_type());
    support_labels = taken("support_labels", s_labels, {tasks, supports}, at::kLong);
    query_labels = taken("query_labels", q_labels, {tasks, queries}, at::kLong);
    support_mask = taken("support_mask", s_mask, {tasks, supports}, at::kBool);
    query_mask = taken("query_mask", q_mask, {tasks, queries}, at::kBool);
    class_mask = taken("ways_mask", c_mask, {tasks, ways}, at::kBool);
    check_contents();
  }

  static Tensor taken(const char* name, const Maybe& t, at::IntArrayRef sizes, at::ScalarType dtype) {
    if (!t) return {};
    TORCH_CHECK_VALUE(t->device().is_cpu(), name, ": expected a tensor on the CPU, got one on ", t->device());
    TORCH_CHECK_TYPE(t->scalar_type() == dtype, name, ": expected dtype ", dtype, ", got ", t->scalar_type());
    TORCH_CHECK_VALUE(t->sizes() == sizes, name, ": expected shape ", sizes, ", got ", t->sizes());
    return t->contiguous();
  }
  template <class Element>
  static const Element* memory(const Tensor& t) {
    return t.defined() ? t.const_data_ptr<Element>() : nullptr;
  }

  // Labels are in range and of classes that are there; every class that is there has support, and every task
  // a query.
  void check_contents() {
    const int64_t *const s_labels = memory<int64_t>(support_labels), *const q_labels =
                                                                         memory<int64_t>(query_labels);
    const bool *const s_mask = memory<bool>(support_mask), *const q_mask = memory<bool>(query_mask),
                      *const c_mask = memory<bool>(class_mask);
    check_range("support_labels", s_labels, s_mask, tasks * supports);
    if (q_labels != nullptr) check_range("query_labels", q_labels, q_mask, tasks * queries);
    std::vector<uint8_t> has(size_t(ways), 0);
    there.assign(size_t(tasks), queries);
    for (int64_t t = 0; t < tasks; ++t) {
      std::fill(has.begin(), has.end(), uint8_t(0));
      for (int64_t n = t * supports; n < (t + 1) * supports; ++n) {
        if (s_mask != nullptr && !s_mask[n]) continue;
        has[size_t(s_labels[n])] = 1;
        check_class("support_labels", c_mask, t, s_labels[n]);
      }
      for (int64_t c = 0; c < ways; ++c) {
        TORCH_CHECK_VALUE(has[size_t(c)] || (c_mask != nullptr && !c_mask[t * ways + c]),
                          "support_labels: every class 0..", ways - 1, " needs support, task ", t,
                          " has none of ", c);
      }
      if (q_mask != nullptr) {
        there[size_t(t)] = std::count(q_mask + t * queries, q_mask + (t + 1) * queries, true);
        TORCH_CHECK_VALUE(there[size_t(t)] > 0, "query_mask: every task needs a query, task ", t,
                          " has none");
      }
      for (int64_t n = t * queries; c_mask != nullptr && q_labels != nullptr && n < (t + 1) * queries; ++n) {
        if (q_mask == nullptr || q_mask[n]) check_class("query_labels", c_mask, t, q_labels[n]);
      }
    }
  }
  void check_range(const char* name, const int64_t* labels, const bool* mask, int64_t count) const {
    int64_t least = ways, most = -1;
    for (int64_t n = 0; n < count; ++n) {
      if (mask != nullptr && !mask[n]) continue;
      least = std::min(least, labels[n]), most = std::max(most, labels[n]);
    }
    TORCH_CHECK_VALUE(least >= 0 && most < ways, name, ": expected labels 0..", ways - 1, ", got ", least,
                      "..", most);
  }
  void check_class(const char* name, const bool* mask, int64_t task, int64_t label) const {
    TORCH_CHECK_VALUE(mask == nullptr || mask[task * ways + label], name,
                      ": expected classes of ways_mask, task ", task, " does not have ", label);
  }

  // As the kernels want them: a task's queries in one part, or with few tasks in several, so that there is
  // work for many threads. Not a matter of their number, for the same bits with any.
  template <class Real>
  PrototypeHead<Real> head() const {
    constexpr int64_t kItems = 8, kLeastGroups = 3;
    const int64_t groups = whole_groups(queries) / kQueryGroup;
    PrototypeHead<Real> h{};
    h.tasks = tasks, h.supports = supports, h.queries = queries, h.ways = ways, h.features = features;
    h.parts = std::clamp<int64_t>(kItems / tasks, 1, std::max<int64_t>(groups / kLeastGroups, 1));
    h.metric = metric;
    h.support = memory<Real>(support), h.query = memory<Real>(query);
    h.support_labels = memory<int64_t>(support_labels), h.query_labels = memory<int64_t>(query_labels);
    h.support_mask = memory<bool>(support_mask), h.query_mask = memory<bool>(query_mask);
    h.class_mask = memory<bool>(class_mask);
    return h;
  }

  // run(task, part, workspace) for all parts of all tasks.
  template <class Real, class Run>
  void for_each(const PrototypeHead<Real>& h, int64_t parts, const Run& run) const {
    constexpr int64_t kGrain =
        1 << 16;  // multiply-adds below which a second thread costs more than it brings
    const int64_t items = tasks * parts, work = tasks * (queries * ways + supports) * features;
    const int64_t most = std::min<int64_t>(at::get_num_threads(), items);
    const int64_t threads = std::clamp<int64_t>(work / kGrain, 1, most);
    const int64_t size = functions<Real>().workspace(h);
    const Tensor workspaces = at::empty({threads, size}, support.options());
    Real* const memory = workspaces.mutable_data_ptr<Real>();
    // torch's own threads, see lstm.cpp. Whoever is free takes the next item.
    std::atomic<int64_t> taken{0};
    at::parallel_for(0, threads, 1, [&](int64_t worker, int64_t) {
      for (int64_t item = taken++; item < items; item = taken++)
        run(item / parts, item % parts, memory + worker * size);
    });
  }
};

template <class Run>
void with_real(at::ScalarType dtype, const Run& run) {
  dtype == at::kFloat ? run(float()) : run(double());
}

Forward prototype_head(const Tensor& support, const Tensor& support_labels, const Tensor& query,
                       const Maybe& query_labels, int64_t ways, c10::string_view metric,
                       const Maybe& support_mask, const Maybe& query_mask, const Maybe& ways_mask) {
  const Arguments a(support, support_labels, query, query_labels, ways, metric, support_mask, query_mask,
                    ways_mask);
  const auto options = a.support.options();
  const bool with_loss = a.query_labels.defined();
  const Tensor losses = at::empty({with_loss ? a.tasks : 0}, options);
  const Tensor logits = at::empty({a.tasks, a.queries, ways}, options);
  const Tensor means = at::empty({a.tasks, ways, a.features}, options);
  const Tensor residual = at::empty({with_loss ? a.tasks : 0, ways, whole_groups(a.queries)}, options);
  with_real(support.scalar_type(), [&](auto real) {
    using Real = decltype(real);
    PrototypeHead<Real> h = a.head<Real>();
    std::vector<double> sums(size_t(a.tasks * h.parts));
    h.means = means.mutable_data_ptr<Real>(), h.logits = logits.mutable_data_ptr<Real>();
    h.sums = sums.data(), h.residual = residual.mutable_data_ptr<Real>();
    a.for_each(h, h.parts, [&](int64_t task, int64_t part, Real* workspace) {
      functions<Real>().forward(h, task, part, workspace);
    });
    Real* const to = losses.mutable_data_ptr<Real>();
    for (int64_t t = 0; with_loss && t < a.tasks; ++t) {
      double sum = 0;
      for (int64_t part = 0; part < h.parts; ++part) sum += sums[size_t(t * h.parts + part)];
      to[t] = Real(sum / double(a.there[size_t(t)]));
    }
  });
  return {losses, logits, means, residual};
}

// Cotangents of support and query; logits, means and residual are the forward's.
Backward prototype_head_backward(const Maybe& d_losses, const Maybe& d_logits, const Tensor& support,
                                 const Tensor& support_labels, const Tensor& query, const Maybe& query_labels,
                                 const Tensor& logits, const Tensor& means, const Tensor& residual,
                                 int64_t ways, c10::string_view metric, const Maybe& support_mask,
                                 const Maybe& query_mask, const Maybe& ways_mask) {
  const Arguments a(support, support_labels, query, query_labels, ways, metric, support_mask, query_mask,
                    ways_mask);
  const at::ScalarType dtype = support.scalar_type();
  TORCH_CHECK_VALUE(!d_losses || query_labels, "d_losses: expected none without query_labels");
  const Tensor along_losses = a.taken("d_losses", d_losses, {a.tasks}, dtype);
  const Tensor along_logits = a.taken("d_logits", d_logits, {a.tasks, a.queries, ways}, dtype);
  const Tensor kept_logits = a.taken("logits", logits, {a.tasks, a.queries, ways}, dtype);
  const Tensor kept_means = a.taken("means", means, {a.tasks, ways, a.features}, dtype);
  const Tensor kept_residual =
      a.taken("residual", residual, {query_labels ? a.tasks : 0, ways, whole_groups(a.queries)}, dtype);
  const Tensor d_support = at::empty(support.sizes(), a.support.options()),
               d_query = at::empty(query.sizes(), a.support.options());
  with_real(dtype, [&](auto real) {
    using Real = decltype(real);
    PrototypeHead<Real> h = a.head<Real>();
    // The kernels' pointers are to what the forward writes; the backward only reads.
    h.logits = const_cast<Real*>(kept_logits.const_data_ptr<Real>());
    h.means = const_cast<Real*>(kept_means.const_data_ptr<Real>());
    h.residual = const_cast<Real*>(kept_residual.const_data_ptr<Real>());
    h.d_support = d_support.mutable_data_ptr<Real>(), h.d_query = d_query.mutable_data_ptr<Real>();
    std::vector<Real> d_sums(size_t(a.tasks));
    if (along_losses.defined()) {
      const Real* const from = along_losses.const_data_ptr<Real>();
      for (size_t t = 0; t < d_sums.size(); ++t) d_sums[t] = from[t] / Real(a.there[t]);
      h.d_sums = d_sums.data();
    }
    h.d_logits = a.memory<Real>(along_logits);
    Tensor rows;
    if (h.parts > 1) {
      rows = at::empty({a.tasks, h.parts, functions<Real>().d_means(h)}, a.support.options());
      h.d_means = rows.mutable_data_ptr<Real>();
    }
    a.for_each(h, h.parts, [&](int64_t task, int64_t part, Real* workspace) {
      functions<Real>().backward(h, task, part, workspace);
    });
    if (h.parts == 1) return;
    a.for_each(h, 1,
               [&](int64_t task, int64_t, Real* workspace) { functions<Real>().finish(h, task, workspace); });
  });
  return {d_support, d_query};
}

template <class Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}
Forward below_autograd(const Tensor& support, const Tensor& support_labels, const Tensor& query,
                       const Maybe& query_labels, int64_t ways, c10::string_view metric,
                       const Maybe& support_mask, const Maybe& query_mask, const Maybe& ways_mask) {
  static const auto op = find<decltype(prototype_head)>("metafast::prototype_head");
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
    const auto or_none = [](const Maybe& t) { return t.value_or(Tensor()); };
    ctx->save_for_backward({support, support_labels, query, or_none(query_labels), logits, means, residual,
                            or_none(support_mask), or_none(query_mask), or_none(ways_mask)});
    ctx->saved_data["ways"] = ways;
    ctx->saved_data["metric"] = std::move(metric);
    return {losses, logits, means, residual};
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    variable_list result(9);  // one for each argument of forward
    const auto maybe = [](const Tensor& t) { return t.defined() ? Maybe(t) : std::nullopt; };
    // Of no labels there are no losses, and nothing that their cotangent would say.
    const variable_list saved = ctx->get_saved_variables();
    const Maybe d_losses = saved[3].defined() ? maybe(cotangents[0]) : std::nullopt,
                d_logits = maybe(cotangents[1]);
    if (!d_losses && !d_logits) return result;
    static const auto op = find<decltype(prototype_head_backward)>("metafast::prototype_head_backward");
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
  m.impl("prototype_head", prototype_head);
  m.impl("prototype_head_backward", prototype_head_backward);
}

// Of the CPU alone: elsewhere the derivative is that of metafast/ops/prototypes.py.
TORCH_LIBRARY_IMPL(metafast, AutogradCPU, m) { m.impl("prototype_head", prototype_head_autograd); }

}  // namespace metafast
