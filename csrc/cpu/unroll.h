// A task from its first inner step to its meta-gradient: forward and backward through a Program, the inner
// loop, and the adjoint recursion
//
//   lam = grad L_query(phi_K);   for k = K-1..0:  lam += H_support(phi_k) lam_g
//
// where lam_g, and what the update rule's own parameters get, is the rule's (rules.h); with query losses at
// earlier steps, v_k L_query(phi_k), their gradients join lam on its way. A Hessian-vector product is
// forward, backward, forward tangent, backward tangent at phi_k. The activations of the last inner step are
// still there when the recursion begins; those of the others are computed again from phi_k, so memory does
// not grow with the steps but by the parameters themselves - unless those of all steps fit in a core's cache,
// when they are kept (engine/build.cpp decides). Compiled once per instruction set; calls nothing outside of
// it, allocates nothing, starts no thread. Tested by tests/engine/ and tests/test_inner_options.py.
#pragma once

#include "network.h"
#include "prototype_step.h"
#include "rules.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// to += factor * from.
template <class Real>
inline void add_scaled(int64_t count, Real factor, const Real* from, Real* to) {
  const Vec<Real> by = splat(factor);
  for (int64_t i = 0; i < count; i += kLanes<Real>) store(to + i, load(to + i) + by * load(from + i));
}

template <class Real, template <class> class Rule>
void meta_step(const Job<Real>& job, int64_t task, Real* workspace) {
  const Program& program = *job.program;
  const WorkspaceLayout& layout = *job.layout;
  const Value &in = program.values[0], &out = program.values[program.value_count - 1];
  const int64_t pixels = in.c * in.h * in.w, params = program.params, steps = job.steps;
  Network<Real> support{program, layout.support, job.team, workspace, workspace, nullptr, job.theta};
  Network<Real> query{program, layout.query, job.team, workspace, workspace, nullptr, job.theta};
  Real *const product = workspace + layout.product, *const direction = workspace + layout.direction;
  const auto phi = [&](int64_t k) { return k == 0 ? job.theta : workspace + layout.tape + (k - 1) * params; };
  const bool wants_gradient = job.gradient != nullptr;
  Rule<Real> rule(job, task, workspace + layout.rule);

  Targets<Real> support_y{};
  const auto go_to = [&](int64_t k) {  // the parameters, the batch and the place of step k
    if (k == 0 || job.batches > 1) {
      const int64_t first = (task * job.batches + k % job.batches) * layout.support.samples;
      support.set_input(job.support.x + first * pixels);
      support_y = targets_of(job.support, first, out.c);
    }
    support.w = phi(k);
    support.kept = workspace + k * layout.kept;
  };
  const int64_t first = task * layout.query.samples;
  const Targets<Real> query_y = targets_of(job.query, first, out.c);
  query.set_input(job.query.x + first * pixels);

  // With a cotangent of the outputs, which are the last step's, losses do not matter.
  const Real* const v = job.cotangent == nullptr ? job.query_weights : nullptr;
  Real* const query_tape = workspace + layout.query_tape;
  Real loss = 0;
  for (int64_t k = 0; k < steps; ++k) {
    go_to(k);
    support.forward();
    support.loss(support_y, true);
    support.backward(product);
    rule.step(k, support.w, product, workspace + layout.tape + k * params);
    if (v == nullptr || k + 1 == steps || v[k] == 0) continue;
    query.w = phi(k + 1);
    query.forward();
    loss += v[k] * query.loss(query_y, wants_gradient);
    if (wants_gradient) query.backward(query_tape + k * params);
  }

  query.w = phi(steps);
  query.forward();
  if (job.logits != nullptr) query.copy_outputs(job.logits + first * out.c);
  const Real last = v == nullptr ? Real(1) : v[steps - 1];
  loss += last * query.loss(query_y, wants_gradient);
  if (job.losses != nullptr) job.losses[task] = loss;
  if (job.accuracy != nullptr) job.accuracy[task] = query.accuracy(query_y.labels);
  if (!wants_gradient) return;
  if (job.cotangent != nullptr) query.set_adjoint(job.cotangent + first * out.c);

  // lam stays in the workspace, where the lanes that nobody writes are zero.
  Real* const lam = workspace + layout.w;
  query.backward(lam);
  if (last != 1) {
    for (int64_t i = 0; i < params; i += kLanes<Real>) store(lam + i, last * load(lam + i));
  }
  for (int64_t k = steps - 1; k >= 0; --k) {
    const bool there = k == steps - 1 || layout.kept > 0;
    if (rule.wants_g() || !job.first_order) {
      go_to(k);
      if (!there) {
        support.forward();
        support.loss(support_y, true);
      }
    }
    if (rule.wants_g()) {
      if (k != steps - 1) support.backward(product);  // the last step's g is there still
    } else if (!job.first_order && !there) {
      support.backward(nullptr);
    }
    const Pulled<Real> pull = rule.pull(k, lam, product, direction);
    if (job.truncate > 0 && k > 0 && k % job.truncate == 0) {
      std::fill_n(lam, params, Real(0));
      rule.cut();
    } else if (!job.first_order) {
      support.hessian_vector(pull.along, product);
      if (k == 0) {  // together, as these may be long
        rule.end();
        return deliver(job, task, TaskGradient<Real>{lam, product, splat(pull.factor)});
      }
      const Vec<Real> factor = splat(pull.factor);
      for (int64_t i = 0; i < params; i += kLanes<Real>)
        store(lam + i, load(lam + i) + factor * load(product + i));
    }
    if (v != nullptr && k > 0 && v[k - 1] != 0)
      add_scaled(params, v[k - 1], query_tape + (k - 1) * params, lam);
  }
  rule.end();
  deliver(job, task, TaskGradient<Real>{lam});
}

// All but meta_step: one network at the task's own parameters.
template <class Real>
void single(const Job<Real>& job, int64_t task, Real* workspace) {
  const Program& program = *job.program;
  const WorkspaceLayout& layout = *job.layout;
  const bool on_support = job.what == What::gradient || job.what == What::hvp;
  const Pass& pass = on_support ? layout.support : layout.query;
  const Data<Real>& data = on_support ? job.support : job.query;
  const Value &in = program.values[0], &out = program.values[program.value_count - 1];
  Real *const w = workspace + layout.w, *const product = workspace + layout.product;
  to_engine(program, job.phi + task * job.phi_stride, job.constants, w);
  Network<Real> network{program, pass, job.team, workspace, workspace, nullptr, w};
  network.set_input(data.x + task * pass.samples * in.c * in.h * in.w);
  network.forward();
  switch (job.what) {
    case What::outputs:
      network.copy_outputs(job.logits + task * pass.samples * out.c);
      return;
    case What::pullback:
      network.set_adjoint(job.cotangent + task * pass.samples * out.c);
      network.backward(product);
      break;
    case What::gradient: {
      const Real loss = network.loss(targets_of(data, task * pass.samples, out.c), true);
      if (job.losses != nullptr) job.losses[task] = loss;
      network.backward(product);
      break;
    }
    default: {  // hvp
      network.loss(targets_of(data, task * pass.samples, out.c), true);
      network.backward(nullptr);
      Real* const direction = workspace + layout.direction;
      to_engine<Real>(program, job.vector + task * program.adapting, nullptr, direction);
      network.hessian_vector(direction, product);
    }
  }
  to_user(program, product, job.gradient + task * program.adapting);
}

template <class Real>
void weighted_sum(const Real* rows, int64_t tasks, int64_t size, const Real* weights, int64_t begin,
                  int64_t end, Real* sums) {
  int64_t i = begin;
  constexpr int kL = kLanes<Real>;
  for (; i + kL <= end; i += kL) {
    Vec<Real> sum{};
    for (int64_t t = 0; t < tasks; ++t) sum += weights[t] * load(rows + t * size + i);
    store(sums + i, sum);
  }
  for (; i < end; ++i) {
    Real sum = 0;
    for (int64_t t = 0; t < tasks; ++t) sum += weights[t] * rows[t * size + i];
    sums[i] = sum;
  }
}

// Elements of workspace that the job takes besides its network's.
template <class Real>
int64_t rule_workspace(const Job<Real>& job, bool wants_gradient) {
  if (job.what == What::prototypes) return PrototypeBuffers<Real>(job, wants_gradient, nullptr).size;
  return job.learned == nullptr ? 0 : LearnedRule<Real>(job, 0, nullptr, wants_gradient).size();
}

template <class Real>
void run_task(const Job<Real>& job, int64_t task, Real* workspace) {
  if (job.what == What::prototypes) {
    prototype_step(job, task, workspace);
  } else if (job.what == What::meta_step) {
    job.learned == nullptr ? meta_step<Real, PlainRule>(job, task, workspace)
                           : meta_step<Real, LearnedRule>(job, task, workspace);
  } else {
    single(job, task, workspace);
  }
}

template <class Real>
constexpr EngineFunctions<Real> kEngineFunctions{to_engine<Real>, to_user<Real>, rule_workspace<Real>,
                                                 run_task<Real>, weighted_sum<Real>};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
