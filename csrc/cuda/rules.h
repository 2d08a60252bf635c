// The update rules of an inner loop for all tasks at once, as cpu/rules.h has them for one.
#pragma once

#include "../engine/carver.h"
#include "lstm.h"
#include "network.h"

namespace metafast::METAFAST_GPU {

// A buffer of each task, out of memory that the tasks share.
template <class Real>
Batch<Real> take_each(Carver<Real>& shared, int64_t tasks, int64_t each) {
  return {shared.take(tasks * each), each};
}

// lam' = lam + factor H along.
template <class Real>
struct Pulled {
  Batch<const Real> along;
  Real factor;
};

template <class Real>
class PlainRule {
 public:
  using In = Batch<const Real>;
  using Out = Batch<Real>;

  PlainRule(const Job<Real>& job, Carver<Real>&, bool, CUstream_st* stream)
      : job_(job), stream_(stream), params_(job.program->params), uneven_(job.rates_stride != 0) {}

  bool wants_g() const { return job_.rate_gradient != nullptr; }

  void step(int64_t k, const Network<Real>& network, Out g, Out to) {
    const In from = network.w;
    network.backward(g);
    if (job_.rates == nullptr) return all("step", AddScaled<Real>{from, g, -job_.rate, to});
    all("step", Rated<Real>{job_.rates + k * job_.rates_stride, Real(-1), from, g, to});
  }

  // Adds to the rule's own gradient; `direction` is a buffer.
  Pulled<Real> pull(int64_t k, In lam, In g, Out direction) {
    if (wants_g()) {
      const Out rows{job_.rate_gradient, params_ * (uneven_ ? job_.steps : 1)};
      const bool begins = uneven_ || k == job_.steps - 1;
      all("rate_gradient", RateGradient<Real>{lam, g, begins, rows + (uneven_ ? k * params_ : 0)});
    }
    if (job_.first_order) return {{}, 0};
    if (job_.rates == nullptr) return {lam, -job_.rate};  // the same for all: H is linear
    all("direction", Rated<Real>{job_.rates + k * job_.rates_stride, Real(-1), {}, lam, direction});
    return {direction, 1};
  }

  void cut() {}
  void end() {}

 private:
  template <class F>
  void all(const char* name, const F& f) const {
    for_all(name, job_.tasks, params_, stream_, f);
  }

  const Job<Real>& job_;
  CUstream_st* stream_;
  int64_t params_;
  bool uneven_;
};

// The tasks' coordinates are one call of the LSTM's kernels a step.
template <class Real>
class LearnedRule {
 public:
  using In = Batch<const Real>;
  using Out = Batch<Real>;

  // Without memory it only takes it.
  LearnedRule(const Job<Real>& job, Carver<Real>& shared, bool wants_gradient, CUstream_st* stream)
      : job_(job), weights_(*job.learned->weights), stream_(stream), rows_(2 * weights_.layers) {
    const int64_t tasks = job.tasks, coordinates = job.learned->coordinates;
    lstm_.rule = &weights_;
    lstm_.steps = 1;
    lstm_.tasks = tasks;
    lstm_.coordinates = coordinates;
    state_ = rows_ * coordinates * weights_.hidden;
    // The states and gradients of all steps for the way back, else of one and the next.
    kept_ = wants_gradient ? job.steps : 2;
    states_ = shared.take((kept_ + 1) * tasks * state_);
    grads_ = shared.take(kept_ * tasks * coordinates);
    result_ = take_each(shared, tasks, coordinates);
    const bool back = wants_gradient && job.steps > 0;
    d_updates_ = take_each(shared, tasks, back ? coordinates : 0);
    carry_ = take_each(shared, tasks, back ? state_ : 0);
    d_weights_ = take_each(shared, tasks, back ? weights_.count() : 0);
    scratch_ = shared.take(std::max(lstm_workspace(lstm_, false), back ? lstm_workspace(lstm_, true) : 0));
  }

  bool wants_g() const { return false; }  // it is kept

  void step(int64_t k, const Network<Real>& network, Out g, Out to) {
    const In from = network.w;
    network.backward(g);
    if (k == 0) {
      const Spread<Real> start{lstm_.coordinates, weights_.hidden, weights_.start, state(0)};
      for_all("lstm_start", job_.tasks, state_, stream_, start);
    }
    to_coordinates(Real(1), g, grads(k));
    see(k);
    lstm_.updates = result_.first;
    lstm_.next = state(k + 1).first;
    lstm_update(lstm_, scratch_, stream_);
    all("learned_step", Gather<Real>{place(), lstm_.coordinates, -job_.rate, from, result_, to});
  }

  Pulled<Real> pull(int64_t k, In lam, In, Out direction) {
    const bool begins = k == job_.steps - 1;
    if (begins) cut();
    to_coordinates(-job_.rate, lam, d_updates_);
    see(k);
    lstm_.d_updates = d_updates_.first;
    lstm_.d_next = lstm_.d_state = carry_.first;
    lstm_.d_grads = result_.first;
    lstm_update_backward(lstm_, d_weights_.first, scratch_, stream_);
    const Out to = rule_gradient();
    for_all("rule_gradient", job_.tasks, weights_.count(), stream_,
            AddScaled<Real>{d_weights_, begins ? In{} : In(to), Real(1), to});
    if (job_.first_order) return {{}, 0};
    all("direction", Gather<Real>{place(), lstm_.coordinates, Real(1), {}, result_, direction});
    return {direction, 1};
  }

  // The states of the steps above are constants from here on.
  void cut() { for_all("cut", job_.tasks, state_, stream_, Fill<Real>{Real(0), carry_}); }

  void end() {
    const Out to = rule_gradient();
    if (job_.steps == 0) {
      for_all("rule_gradient", job_.tasks, weights_.count_with_start(), stream_, Fill<Real>{Real(0), to});
    } else if (weights_.start != nullptr) {
      for_all("start_gradient", job_.tasks, rows_ * weights_.hidden, stream_,
              Gathered<Real>{lstm_.coordinates, weights_.hidden, carry_, to + weights_.count()});
    }
  }

 private:
  template <class F>
  void all(const char* name, const F& f) const {
    for_all(name, job_.tasks, job_.program->params, stream_, f);
  }
  const int64_t* place() const { return job_.learned->place; }
  Out state(int64_t k) const { return {states_ + k % (kept_ + 1) * job_.tasks * state_, state_}; }
  Out grads(int64_t k) const {
    return {grads_ + k % kept_ * job_.tasks * lstm_.coordinates, lstm_.coordinates};
  }
  Out rule_gradient() const { return {job_.rule_gradient, weights_.count_with_start()}; }
  void see(int64_t k) {
    lstm_.grads = grads(k).first;
    lstm_.state = state(k).first;
  }
  // Coordinates that no layer uses are zero.
  void to_coordinates(Real factor, In w, Out to) const {
    for_all("to_coordinates", job_.tasks, lstm_.coordinates, stream_, Fill<Real>{Real(0), to});
    all("to_coordinates", Scatter<Real>{place(), lstm_.coordinates, factor, w, to});
  }

  const Job<Real>& job_;
  const LstmWeights<Real>& weights_;
  CUstream_st* stream_;
  int64_t rows_, state_, kept_;  // rows of H numbers that a coordinate's state is; a task's numbers of it
  Lstm<Real> lstm_{};
  Real *states_, *grads_, *scratch_;
  Out result_, d_updates_, carry_, d_weights_;
};

}  // namespace metafast::METAFAST_GPU
