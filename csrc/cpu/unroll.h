// One task at a time as engine/unroll.h wants it, and the engine's table. Compiled once per instruction set;
// calls nothing outside of it, allocates nothing, starts no thread.
#pragma once

#include "../engine/unroll.h"
#include "network.h"
#include "one_step.h"
#include "prototype_step.h"
#include "rules.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// Whether these are the workspace's first tasks of the job, which leaves its stamp.
template <class Real>
bool begins_job(const Job<Real>& job, Real* workspace) {
  int64_t stamp;
  Real* const place = workspace + job.layout->stamp;
  __builtin_memcpy(&stamp, place, sizeof(stamp));
  __builtin_memcpy(place, &job.stamp, sizeof(stamp));
  return stamp != job.stamp;
}

template <class Real>
struct OneTask {
  using Number = Real;
  using Vector = Real*;
  using ConstVector = const Real*;

  OneTask(const Job<Real>& j, int64_t t, Real* memory)
      : job(j),
        task(t),
        workspace(memory),
        support{*j.program, j.layout->support, j.team, memory, memory, nullptr, nullptr, nullptr},
        query{*j.program, j.layout->query, j.team, memory, memory, nullptr, nullptr, nullptr} {
    // All tasks begin at theta: what a thread's first one makes of it alone is there for the others.
    const bool lasts = job.steps <= 1 || job.layout->kept > 0;
    if (job.theta != nullptr && lasts && !begins_job(job, memory)) support.known = query.known = job.theta;
  }

  Vector at(int64_t offset) const { return workspace + offset; }
  ConstVector theta() const { return job.theta; }
  Real* logits() const { return job.logits + first_query() * out().c; }
  const Real* cotangent() const { return job.cotangent + first_query() * out().c; }

  void see_support(int64_t batch) {
    see(job.support, (task * job.batches + batch) * job.layout->support.samples, support, support_y);
  }
  void see_query() { see(job.query, first_query(), query, query_y); }

  void add_loss(Real factor, Real one) { loss += factor * one; }
  // Losses and accuracy, where they are wanted.
  void report() const {
    if (job.losses != nullptr) job.losses[task] = loss;
    if (job.accuracy != nullptr) job.accuracy[task] = query.accuracy(query_y.labels);
  }

  void zero(Vector to) const { std::fill_n(to, job.program->params, Real(0)); }
  void scale(Real factor, Vector to) const {
    const Vec<Real> by = splat(factor);
    for (int64_t i = 0; i < job.program->params; i += kLanes<Real>) store(to + i, by * load(to + i));
  }
  // to += factor * H along; `buffer` is one.
  void add_hessian_vector(ConstVector along, Real factor, Vector buffer, Vector to) const {
    support.hessian_vector(along, {to, factor, to, buffer});
  }
  void deliver_with_hessian_vector(ConstVector along, Real factor, Vector buffer, Vector lam) const {
    add_hessian_vector(along, factor, buffer, lam);
    deliver(lam);
  }
  // to += factor * from.
  void add_scaled(Real factor, ConstVector from, Vector to) const {
    const Vec<Real> by = splat(factor);
    for (int64_t i = 0; i < job.program->params; i += kLanes<Real>)
      store(to + i, load(to + i) + by * load(from + i));
  }

  void to_engine(const Real* user, int64_t stride, const Real* constants, Vector w) const {
    METAFAST_ISA::to_engine(*job.program, user + task * stride, constants, w);
  }
  void to_user(ConstVector w) const {
    METAFAST_ISA::to_user(*job.program, w, job.gradient + task * job.program->adapting);
  }
  void deliver(ConstVector gradient) const {
    METAFAST_ISA::deliver(job, task, gradient, at(job.layout->sum));
  }

  const Job<Real>& job;
  const int64_t task;
  Real* const workspace;
  Network<Real> support, query;
  Targets<Real> support_y{}, query_y{};
  Real loss = 0;

 private:
  const Value& out() const { return job.program->values[job.program->value_count - 1]; }
  int64_t first_query() const { return task * job.layout->query.samples; }
  void see(const Data<Real>& data, int64_t first, Network<Real>& network, Targets<Real>& y) const {
    const Value& in = job.program->values[0];
    network.set_input(data.x + first * in.c * in.h * in.w);
    y = targets_of(data, first, out().c);
  }
};

template <class Real, template <class> class Rule>
void meta_step_of(OneTask<Real>& one) {
  Rule<Real> rule(one.job, one.task, one.at(one.job.layout->rule));
  meta_step(one, rule);
}

template <class Real>
void weighted_sum(const Real* rows, int64_t tasks, int64_t group, int64_t size, const Real* weights,
                  int64_t begin, int64_t end, Real* sums) {
  constexpr int kL = kLanes<Real>;
  const auto sum_of = [&](auto zero, const auto& row) {
    auto sum = zero;
    for (int64_t first = 0; first < tasks; first += group) {
      const int64_t last = std::min(first + group, tasks);
      auto part = zero;
      for (int64_t t = first; t < last; ++t) part += weights[t] * row(rows + t * size);
      sum = first == 0 ? part : sum + part;
    }
    return sum;
  };
  int64_t i = begin;
  for (; i + kL <= end; i += kL)
    store(sums + i, sum_of(Vec<Real>{}, [i](const Real* r) { return load(r + i); }));
  for (; i < end; ++i) sums[i] = sum_of(Real(0), [i](const Real* r) { return r[i]; });
}

template <class Real>
int64_t more_workspace(const Job<Real>& job, int64_t supports, int64_t queries, bool wants_gradient) {
  if (job.together > 0) return OneStep<Real>(job, 0, 0, supports, queries, nullptr, nullptr, {}).size();
  if (job.what == What::prototypes) return OneTaskHead<Real>(job, 0, nullptr, wants_gradient).size();
  return job.learned == nullptr ? 0 : LearnedRule<Real>(job, 0, nullptr, wants_gradient).size();
}

template <class Real>
void run_task(const Job<Real>& job, int64_t task, Real* workspace) {
  OneTask<Real> one(job, task, workspace);
  if (job.what == What::prototypes) {
    OneTaskHead<Real> head(job, task, workspace + job.layout->rule, job.gradient != nullptr);
    prototype_step(one, head);
  } else if (job.what == What::meta_step) {
    job.learned == nullptr ? meta_step_of<Real, PlainRule>(one) : meta_step_of<Real, LearnedRule>(one);
  } else {
    single(one);
  }
}

template <class Real>
void run_tasks(const Job<Real>& job, int64_t first, int64_t last, Real* workspace) {
  if (job.together == 0) {
    for (int64_t t = first; t < last; ++t) run_task(job, t, workspace);
    return;
  }
  const int64_t supports = job.layout->support.samples / job.together;
  const int64_t queries = job.layout->query.samples / job.together;
  const int64_t count = last - first, parts = (count + job.together - 1) / job.together;
  const int64_t row = (first * job.shares + job.tasks - 1) / job.tasks;
  Real* const sum = job.gradient == nullptr ? nullptr : job.gradient + row * job.program->params;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = first + count * part / parts, end = first + count * (part + 1) / parts;
    const Real* const known = begins_job(job, workspace) ? nullptr : job.theta;
    OneStep<Real>(job, begin, end - begin, supports, queries, workspace, known, {sum, part > 0}).run();
  }
}

template <class Real>
constexpr EngineFunctions<Real> kEngineFunctions{to_engine<Real>, to_user<Real>, more_workspace<Real>,
                                                 run_tasks<Real>, weighted_sum<Real>};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
