// From the first inner step to the meta-gradient: forward and backward through a Program, the inner loop, and
// the adjoint recursion
//
//   lam = grad L_query(phi_K);   for k = K-1..0:  lam += H_support(phi_k) lam_g
//
// where lam_g, and what the update rule's own parameters get, is the rule's; with query losses at earlier
// steps, v_k L_query(phi_k), their gradients join lam on its way. A Hessian-vector product is forward,
// backward, forward tangent, backward tangent at phi_k. The activations of the last inner step are still
// there when the recursion begins; those of the others are computed again from phi_k, so memory does not grow
// with the steps but by the parameters themselves - unless those of all steps fit in a core's cache, when
// they are kept (build.cpp decides).
//
// Written once for all backends. `Tasks` is what runs at once: one task on a thread of the CPU
// (cpu/unroll.h), all of them on a device (cuda/unroll.h), where a vector is (params,) of each task. It has
// the job, a network `support` and `query` each, and the few operations on vectors. Templates of the
// backends' own types alone, so that every instruction set has its own copy. Tested by tests/engine/ and
// tests/test_inner_options.py.
#pragma once

#include "job.h"

namespace metafast {

// A meta-step by a rule: `step`, with the network's backward in it, for k = 0..K-1, and where a gradient is
// wanted `pull` for k = K-1..0.
template <class Tasks, class Rule>
void meta_step(Tasks& tasks, Rule& rule) {
  using Vector = typename Tasks::Vector;
  using ConstVector = typename Tasks::ConstVector;
  const auto& job = tasks.job;
  const WorkspaceLayout& layout = *job.layout;
  const int64_t params = job.program->params, steps = job.steps;
  const bool wants_gradient = job.gradient != nullptr;
  auto &support = tasks.support, &query = tasks.query;
  const auto product = tasks.at(layout.product), direction = tasks.at(layout.direction);
  const auto phi = [&](int64_t k) {
    return k == 0 ? tasks.theta() : ConstVector(tasks.at(layout.tape + (k - 1) * params));
  };
  const auto query_gradient = [&](int64_t k) { return tasks.at(layout.query_tape + k * params); };
  const auto go_to = [&](int64_t k) {  // the parameters, the batch and the place of step k
    if (k == 0 || job.batches > 1) tasks.see_support(k % job.batches);
    support.w = phi(k);
    support.kept = tasks.at(k * layout.kept);
  };
  tasks.see_query();

  // With a cotangent of the outputs, which are the last step's, losses do not matter.
  const auto* const v = job.cotangent == nullptr ? job.query_weights : nullptr;
  for (int64_t k = 0; k < steps; ++k) {
    go_to(k);
    support.forward();
    support.loss(tasks.support_y, true);
    rule.step(k, support, product, tasks.at(layout.tape + k * params));
    if (v == nullptr || k + 1 == steps || v[k] == 0) continue;
    query.w = phi(k + 1);
    query.forward();
    tasks.add_loss(v[k], query.loss(tasks.query_y, wants_gradient));
    if (wants_gradient) query.backward(query_gradient(k));
  }

  query.w = phi(steps);
  query.forward();
  if (job.logits != nullptr) query.copy_outputs(tasks.logits());
  const auto last = v == nullptr ? typename Tasks::Number(1) : v[steps - 1];
  tasks.add_loss(last, query.loss(tasks.query_y, wants_gradient));
  tasks.report();
  if (!wants_gradient) return;
  if (job.cotangent != nullptr) query.set_adjoint(tasks.cotangent());

  // lam stays in the workspace, where the lanes that nobody writes are zero.
  const auto lam = tasks.at(layout.w);
  query.backward(lam);
  if (last != 1) tasks.scale(last, lam);
  for (int64_t k = steps - 1; k >= 0; --k) {
    const bool there = k == steps - 1 || layout.kept > 0;
    if (rule.wants_g() || !job.first_order) {
      go_to(k);
      if (!there) {
        support.forward();
        support.loss(tasks.support_y, true);
      }
    }
    if (rule.wants_g()) {
      if (k != steps - 1) support.backward(product);  // the last step's g is there still
    } else if (!job.first_order && !there) {
      support.backward(Vector{});
    }
    const auto pull = rule.pull(k, lam, product, direction);
    if (job.truncate > 0 && k > 0 && k % job.truncate == 0) {
      tasks.zero(lam);
      rule.cut();
    } else if (!job.first_order) {
      if (k == 0) {  // the last there is to do: a device hands lam out by the pass that adds to it
        tasks.deliver_with_hessian_vector(pull.along, pull.factor, product, lam);
        return rule.end();
      }
      tasks.add_hessian_vector(pull.along, pull.factor, product, lam);
    }
    if (v != nullptr && k > 0 && v[k - 1] != 0) tasks.add_scaled(v[k - 1], query_gradient(k - 1), lam);
  }
  rule.end();
  tasks.deliver(lam);
}

// One network at the tasks' own parameters: outputs, pullback, gradient or hvp.
template <class Tasks>
void single(Tasks& tasks) {
  const auto& job = tasks.job;
  const WorkspaceLayout& layout = *job.layout;
  const bool on_support = job.what == What::gradient || job.what == What::hvp;
  auto& network = on_support ? tasks.support : tasks.query;
  const auto w = tasks.at(layout.w), product = tasks.at(layout.product);
  tasks.to_engine(job.phi, job.phi_stride, job.constants, w);
  network.w = w;
  on_support ? tasks.see_support(0) : tasks.see_query();
  network.forward();
  if (job.what == What::outputs) return network.copy_outputs(tasks.logits());
  if (job.what == What::pullback) {
    network.set_adjoint(tasks.cotangent());
    network.backward(product);
  } else {
    network.loss(tasks.support_y, true);
    if (job.what == What::gradient) {
      network.backward(product);
    } else {
      network.backward(typename Tasks::Vector{});
      const auto direction = tasks.at(layout.direction);
      tasks.to_engine(job.vector, job.program->adapting, nullptr, direction);
      network.hessian_vector(direction, product);
    }
  }
  tasks.to_user(product);
}

// Prototypical Networks: support and queries together through the encoder, with the same parameters for all
// tasks, the head on the embeddings, and the way back.
template <class Tasks, class Head>
void prototype_step(Tasks& tasks, Head& head) {
  const auto& job = tasks.job;
  auto& encoder = tasks.query;
  head.join_inputs();
  encoder.set_input(head.inputs);
  encoder.w = tasks.theta();
  encoder.forward();
  encoder.copy_outputs(head.rows);
  head.forward();
  if (job.gradient == nullptr) return;
  head.backward();
  encoder.set_adjoint(head.d_rows);
  const auto gradient = tasks.at(job.layout->w);
  encoder.backward(gradient);
  tasks.deliver(gradient);
}

}  // namespace metafast
