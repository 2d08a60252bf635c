// A meta-step's two doors: through autograd, and straight into .grad.
#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cstring>

#include "engine.h"
#include "engine_data.h"
#include "node.h"
#include "uninitialized.h"

namespace metafast {

using at::Tensor;

namespace {

Tensor weights_or_mean(const std::optional<Tensor>& weights, int64_t tasks,
                       const at::TensorOptions& options) {
  if (weights) return weights->detach().contiguous();
  if (!options.device().is_cpu()) return at::full({tasks}, 1.0 / double(tasks), options);
  const Tensor mean = uninitialized({tasks}, options);
  with_real(mean.scalar_type(), [&](auto real) {
    std::fill_n(mean.mutable_data_ptr<decltype(real)>(), tasks, decltype(real)(1.0 / double(tasks)));
  });
  return mean;
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Passes gradients on, and raises where they are differentiated: never a constant.
struct Once : torch::autograd::Function<Once> {
  static variable_list forward(AutogradContext*, at::TensorList gradients) {
    variable_list same;
    for (const Tensor& g : gradients) same.push_back(g.view(g.sizes()));
    return same;
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "metafast: the meta-gradient cannot be differentiated again (once_differentiable)");
  }
};

// factor * t, on the CPU by hand: torch's product of a long tensor would wake OpenMP's threads, which then
// look for more work for milliseconds on the cores that the next meta-step wants; that of a short one takes
// longer than its numbers.
Tensor scaled(const Tensor& t, const Tensor& factor) {
  if (!t.is_cpu()) return at::mul(t, factor);
  Tensor result;
  with_real(t.scalar_type(), [&](auto real) {
    using Real = decltype(real);
    const Real by = *factor.const_data_ptr<Real>();
    if (by == Real(1)) {
      result = t;
      return;
    }
    result = uninitialized(t.sizes(), t.options());
    const Real* const from = t.const_data_ptr<Real>();
    Real* const to = result.mutable_data_ptr<Real>();
    for (int64_t i = 0; i < t.numel(); ++i) to[i] = by * from[i];
  });
  return result;
}

// sum += part, from nothing.
void add_to(Tensor& sum, const Tensor& part) { sum = sum.defined() ? at::add(sum, part) : part; }

// On a device: the part of `flat` from `at` on, shaped as `like`.
Tensor part_of(const Tensor& flat, int64_t at, const Tensor& like) {
  return flat.narrow(0, at, like.numel()).view(like.sizes());
}

// Copies of `flat`'s parts, shaped as the tensors are.
void cut(const Tensor& flat, const std::vector<Tensor>& like, variable_list& parts) {
  for_parts(like, [&](const Tensor& t, int64_t at) {
    if (!flat.is_cpu()) return parts.push_back(part_of(flat, at, t).clone());
    const char* const from = static_cast<const char*>(flat.const_data_ptr());
    parts.push_back(uninitialized(t.sizes(), flat.options()));
    std::memcpy(parts.back().mutable_data_ptr(), from + size_t(at) * flat.element_size(),
                size_t(t.numel()) * flat.element_size());
  });
}

}  // namespace

// The meta-gradient was computed with the meta-objective: what is left to the backward is a weighted sum over
// tasks. From cotangents of loss, losses (T,) and logits (T, N, D) to those of parameters and of the LSTM's
// weights, and of the rates.
struct MetaStepBackward : SavingNode {
  std::shared_ptr<Engine> engine;
  Inner inner;  // its tensors are the saved ones

  std::string name() const override { return "MetaStepBackward"; }

  variable_list apply(variable_list&& cotangents) override {
    const variable_list kept = saved();
    const Tensor &gradient = kept[0], &rate_gradient = kept[1], &rule_gradient = kept[2], &weights = kept[3],
                 &constants = kept[5];
    const auto first_of_rule = kept.end() - std::ptrdiff_t(inner.lstm.size());
    const std::vector<Tensor> params(kept.begin() + 10, first_of_rule), of_rule(first_of_rule, kept.end());
    const bool of_rates = rate_gradient.defined();
    const bool again = at::GradMode::is_enabled();
    const at::NoGradGuard no_grad;
    const Tensor &d_loss = cotangents[0], &d_losses = cotangents[1], &d_logits = cotangents[2];
    Tensor flat, d_rates, d_rule;
    const auto add = [&](const Engine::Unrolled& run, const Tensor& each) {
      add_to(flat, engine->reduce(run.gradient, each));
      if (of_rates) add_to(d_rates, engine->reduce(run.rate_gradient, each));
      if (run.rule_gradient.defined())
        add_to(d_rule, engine->sum_tasks(run.rule_gradient, each, each.size(0)));
    };
    const auto again_along = [&](const std::optional<Tensor>& cotangent) {
      Inner with = inner;
      if (kept[4].defined()) with.rates = kept[4];
      with.lstm = of_rule;
      return engine->unroll(engine->flatten(params, gradient.device()), constants, {kept[6], kept[7]},
                            {kept[8], kept[9]}, with, cotangent, true, of_rates);
    };
    if (d_loss.defined() || d_losses.defined()) {
      Tensor each = d_loss.defined() ? scaled(weights, d_loss) : d_losses;
      if (d_loss.defined() && d_losses.defined()) each = at::add(each, d_losses);
      const bool summed = gradient.dim() == 1;
      if (summed && d_losses.defined()) {
        // The tasks' own gradients were not kept; from now on they are.
        engine->sums_ = false;
        add(again_along(std::nullopt), each.contiguous());
      } else {
        const Tensor own = summed ? scaled(gradient, d_loss) : gradient;
        add({{}, own, rate_gradient, rule_gradient}, each.contiguous());
      }
    }
    if (d_logits.defined()) add(again_along(d_logits), at::ones({weights.size(0)}, gradient.options()));
    variable_list parts;
    parts.reserve(num_outputs());
    if (!flat.defined()) {
      parts.resize(num_outputs());
      return parts;
    }
    cut(flat, params, parts);
    if (!of_rule.empty()) cut(d_rule, of_rule, parts);
    if (of_rates) parts.push_back(d_rates);
    if (again) {
      const at::AutoGradMode grad(true);
      for (Tensor& part : parts) part.requires_grad_();
      parts = Once::apply(at::TensorList(parts));
    }
    parts.resize(num_outputs());
    return parts;
  }
};

std::pair<Engine::Unrolled, Tensor> Engine::judge(const std::vector<Tensor>& params, const Tensor& constants,
                                                  const Side& support, const Side& query, const Inner& inner,
                                                  const std::optional<Tensor>& weights, bool wants_gradient,
                                                  bool wants_rate_gradient) {
  const at::NoGradGuard no_grad;
  const int64_t tasks = support.x.size(0);
  const at::Device device = support.x.device();
  check_side("support", support, tasks, device, inner.ways);
  check_side("query", query, tasks, device, inner.ways);
  const Tensor theta = flatten(params, device), w = weights_or_mean(weights, tasks, theta.options());
  Unrolled run =
      unroll(theta, constants, support, query, inner, std::nullopt, wants_gradient, wants_rate_gradient, w);
  set_loss(run.outcome, w);
  return {std::move(run), w};
}

MetaOutcome Engine::meta_step(const std::vector<Tensor>& params, const Tensor& constants, const Side& support,
                              const Side& query, const Inner& inner, const std::optional<Tensor>& weights) {
  std::vector<Tensor> leaves = params;
  leaves.insert(leaves.end(), inner.lstm.begin(), inner.lstm.end());
  const bool differentiable =
      at::GradMode::is_enabled() &&
      (std::any_of(leaves.begin(), leaves.end(), [](const Tensor& p) { return p.requires_grad(); }) ||
       (inner.rates && inner.rates->requires_grad()));
  if (differentiable) {
    check_plain_autograd("a meta-step", leaves);
    if (inner.rates) check_plain_autograd("a meta-step", *inner.rates);
  }
  const bool of_rates = differentiable && inner.rates && inner.rates->requires_grad();
  const auto [run, w] = judge(params, constants, support, query, inner, weights, differentiable, of_rates);
  const MetaOutcome& outcome = run.outcome;
  if (!differentiable) return outcome;
  const auto node = make_node<MetaStepBackward>();
  node->set_next_edges(inner.rates ? torch::autograd::collect_next_edges(at::TensorList(leaves), *inner.rates)
                                   : torch::autograd::collect_next_edges(at::TensorList(leaves)));
  node->engine = shared_from_this();
  node->inner = inner;
  node->inner.rates.reset();
  for (Tensor& t : node->inner.lstm) t.reset();
  node->save({run.gradient, run.rate_gradient, run.rule_gradient, w, inner.rates.value_or(Tensor()),
              constants, support.x, support.y, query.x, query.y},
             leaves);
  for (const Tensor& t : {outcome.loss, outcome.losses, outcome.logits})
    torch::autograd::set_history(t, node);
  return outcome;
}

namespace {

// p.grad += part (p.numel(),). Plain memory by hand: for a small net torch's own calls would cost as much as
// the rest.
template <class Real>
void add_to_grad(const Tensor& p, const Real* part) {
  const int64_t count = p.numel();
  Tensor& grad = p.mutable_grad();
  if (!grad.defined()) {
    grad = uninitialized(p.sizes(), p.options().requires_grad(false));
    std::memcpy(grad.mutable_data_ptr<Real>(), part, size_t(count) * sizeof(Real));
    return;
  }
  const bool plain = grad.is_contiguous() && grad.scalar_type() == p.scalar_type() &&
                     grad.device().is_cpu() && !grad.requires_grad() && grad.sizes() == p.sizes() &&
                     !grad.is_inference();
  if (!plain) {
    grad.add_(at::from_blob(const_cast<Real*>(part), p.sizes(), p.options().requires_grad(false)));
    return;
  }
  Real* const to = grad.mutable_data_ptr<Real>();
  for (int64_t i = 0; i < count; ++i) to[i] += part[i];
  grad.unsafeGetTensorImpl()->bump_version();
}

// .grad += the parts of `flat`, of those tensors that require one.
void add_all(const Tensor& flat, const std::vector<Tensor>& leaves) {
  with_real(flat.scalar_type(), [&](auto real) {
    for_parts(leaves, [&](const Tensor& leaf, int64_t at) {
      if (!leaf.requires_grad()) return;
      if (flat.is_cpu()) return add_to_grad(leaf, flat.const_data_ptr<decltype(real)>() + at);
      const Tensor part = part_of(flat, at, leaf);
      Tensor& grad = leaf.mutable_grad();
      grad.defined() ? void(grad.add_(part)) : void(grad = part.clone());
    });
  });
}

}  // namespace

MetaOutcome Engine::accumulate(const std::vector<Tensor>& params, const Tensor& constants,
                               const Side& support, const Side& query, const Inner& inner,
                               const std::optional<Tensor>& weights) {
  const at::NoGradGuard no_grad;
  const auto [run, w] = judge(params, constants, support, query, inner, weights, true, false);
  add_all(reduce(run.gradient, w), params);
  if (!inner.lstm.empty()) add_all(sum_tasks(run.rule_gradient, w, w.size(0)), inner.lstm);
  return run.outcome;
}

}  // namespace metafast
