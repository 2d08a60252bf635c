// The update rules of an inner loop: how phi steps along g, and back. A rule is begun for each task, then
// called for k = 0..K-1 forwards, after the network's forward and loss, and, where a gradient is wanted, for
// k = K-1..0 backwards.
//
//   PlainRule     phi' = phi - rate_k g, elementwise;  lam_g = -rate_k lam,  d rate_k = -lam g
//   LearnedRule   phi' = phi - rate O(g, s; psi), O the coordinatewise LSTM of lstm_cell.h, where phi moves
//
// In phi as the engine has it only those elements move that are among the user's adapting ones. Both are
// tested through the meta-step, by tests/test_exactness.py and tests/test_inner_options.py.
#pragma once

#include "job.h"
#include "lstm_cell.h"
#include "network.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// lam' = lam + factor H along.
template <class Real>
struct Pulled {
  const Real* along;
  Real factor;
};

// Parameters of one task in the engine's order from the user's; null constants where there are none.
template <class Real>
void to_engine(const Program& program, const Real* adapting, const Real* constants, Real* w) {
  for (int64_t i = 0; i < program.params; ++i) {
    const int64_t from = program.source[i];
    w[i] = from < 0                  ? Real(0)
           : from < program.adapting ? adapting[from]
           : constants               ? constants[from - program.adapting]
                                     : Real(0);
  }
}

// The adapting parameters' gradients in the user's order; those that no layer uses are zero.
template <class Real>
void to_user(const Program& program, const Real* w, Real* adapting) {
  for (int64_t p = 0; p < program.adapting; ++p) {
    const int64_t from = program.place[p];
    adapting[p] = from < 0 ? Real(0) : w[from];
  }
}

template <class Real>
class PlainRule {
 public:
  PlainRule(const Job<Real>& job, int64_t task, Real*)
      : job_(job), params_(job.program->params), uneven_(job.rates_stride != 0) {
    const int64_t rows = uneven_ ? job.steps : 1;
    if (job.rate_gradient != nullptr) gradient_ = job.rate_gradient + task * rows * params_;
  }

  // Whether pull looks at g.
  bool wants_g() const { return gradient_ != nullptr; }

  // From the network's parameters `to` the next; `g` is a buffer, which has the gradient then where there are
  // rates, whose own gradient needs it.
  void step(int64_t k, const Network<Real>& network, Real* g, Real* to) {
    const Real* const from = network.w;
    if (job_.rates == nullptr) return network.backward({from, -job_.rate, to, g});
    network.backward(g);
    const Real* const rates = job_.rates + k * job_.rates_stride;
    for (int64_t i = 0; i < params_; i += kLanes<Real>)
      store(to + i, load(from + i) - load(rates + i) * load(g + i));
  }

  // Adds to the rule's own gradient; `direction` is a buffer.
  Pulled<Real> pull(int64_t k, const Real* lam, const Real* g, Real* direction) {
    if (gradient_ != nullptr) {
      Real* const row = gradient_ + (uneven_ ? k * params_ : 0);
      const bool begins = uneven_ || k == job_.steps - 1;
      for (int64_t i = 0; i < params_; i += kLanes<Real>) {
        const Vec<Real> part = -load(lam + i) * load(g + i);
        store(row + i, begins ? part : load(row + i) + part);
      }
    }
    if (job_.first_order) return {nullptr, 0};
    if (job_.rates == nullptr) return {lam, -job_.rate};  // the same for all: H is linear
    const Real* const rates = job_.rates + k * job_.rates_stride;
    for (int64_t i = 0; i < params_; i += kLanes<Real>)
      store(direction + i, -load(rates + i) * load(lam + i));
    return {direction, 1};
  }

  void cut() {}
  void end() {}

 private:
  const Job<Real>& job_;
  int64_t params_;
  bool uneven_;
  Real* gradient_ = nullptr;
};

template <class Real>
class LearnedRule {
 public:
  static constexpr int64_t kBlock = kLstmBlock<Real>;

  LearnedRule(const Job<Real>& job, int64_t task, Real* workspace)
      : LearnedRule(job, task, workspace, job.gradient != nullptr) {}

  // With no workspace it only tells the size.
  LearnedRule(const Job<Real>& job, int64_t task, Real* workspace, bool wants_gradient)
      : job_(job),
        task_(task),
        coordinates_(job.learned->coordinates),
        blocks_(lstm_blocks<Real>(coordinates_)),
        carver_(workspace),
        cell_(*job.learned->weights, carver_) {
    // Frames of all steps for the way back, else of one and the next.
    frames_kept_ = wants_gradient ? job.steps : 2;
    // Gates of all steps where they stay in a cache that is near, which reads them faster than a core makes
    // them again.
    constexpr int64_t kNear = 10 << 20;
    const int64_t gates = blocks_ * cell_.gates_size();
    gates_kept_ = wants_gradient && job.steps * gates * int64_t(sizeof(Real)) <= kNear;
    frames_ = carver_.take(frames_kept_ * blocks_ * cell_.frame_size());
    gates_ = carver_.take(gates_kept_ ? job.steps * gates : cell_.gates_size());
    carry_ = carver_.take(wants_gradient ? blocks_ * cell_.carry_size() : 0);
    user_ = carver_.take(blocks_ * kBlock);
    result_ = carver_.take(blocks_ * kBlock);
    if (workspace == nullptr) return;
    cell_.pack(wants_gradient);
    for (int64_t b = 0; job.steps > 0 && b < blocks_; ++b) cell_.start(frame(0, b));
    if (!wants_gradient) return;
    cell_.begin();
    cut();
  }

  int64_t size() const { return carver_.size(); }
  bool wants_g() const { return false; }  // it lies in the frames

  void step(int64_t k, const Network<Real>& network, Real* g, Real* to) {
    const Real* const from = network.w;
    network.backward(g);
    to_coordinates(g);
    for (int64_t b = 0; b < blocks_; ++b) {
      std::copy_n(user_ + b * kBlock, kBlock, cell_.grads(frame(k, b)));
      cell_.forward(frame(k, b), gates(k, b), k + 1 < job_.steps ? frame(k + 1, b) : nullptr, from_zero(k));
      cell_.updates(gates(k, b), result_ + b * kBlock);
    }
    for (int64_t i = 0; i < job_.program->params; ++i)
      to[i] = moves(i) ? from[i] - job_.rate * result_[job_.learned->place[i]] : from[i];
  }

  Pulled<Real> pull(int64_t k, const Real* lam, const Real*, Real* direction) {
    to_coordinates(lam);
    alignas(kVectorBytes) Real d_updates[kBlock];
    for (int64_t b = 0; b < blocks_; ++b) {
      for (int64_t i = 0; i < kBlock; ++i) d_updates[i] = -job_.rate * user_[b * kBlock + i];
      if (!gates_kept_) cell_.forward(frame(k, b), gates(k, b), nullptr, from_zero(k));
      cell_.backward(frame(k, b), gates(k, b), d_updates, carry_ + b * cell_.carry_size(),
                     result_ + b * kBlock, from_zero(k), !from_zero(k));
    }
    if (job_.first_order) return {nullptr, 0};
    for (int64_t i = 0; i < job_.program->params; ++i)
      direction[i] = moves(i) ? result_[job_.learned->place[i]] : Real(0);
    return {direction, 1};
  }

  // The states of the steps above are constants from here on.
  void cut() { std::fill_n(carry_, blocks_ * cell_.carry_size(), Real(0)); }

  void end() {
    const LstmWeights<Real>& weights = *job_.learned->weights;
    Real* const to = job_.rule_gradient + task_ * weights.count_with_start();
    cell_.write_weights(to);
    if (weights.start == nullptr) return;
    // Lanes beyond the last coordinate have no cotangents.
    for (int64_t row = 0; row < cell_.carry_size() / kBlock; ++row) {
      Vec<Real> sum{};
      for (int64_t b = 0; b < blocks_; ++b) {
        const Real* const d = carry_ + b * cell_.carry_size() + row * kBlock;
        for (int64_t lane = 0; lane < kBlock; lane += kLanes<Real>) sum += load(d + lane);
      }
      to[weights.count() + row] = sum_of_lanes<Real>(sum);
    }
  }

 private:
  Real* frame(int64_t k, int64_t b) const {
    return frames_ + (k % frames_kept_ * blocks_ + b) * cell_.frame_size();
  }
  Real* gates(int64_t k, int64_t b) const {
    return gates_kept_ ? gates_ + (k * blocks_ + b) * cell_.gates_size() : gates_;
  }
  bool from_zero(int64_t k) const { return k == 0 && job_.learned->weights->start == nullptr; }
  bool moves(int64_t i) const {
    const int64_t p = job_.learned->place[i];
    return p >= 0 && p < coordinates_;
  }
  // user_, whole blocks of which the last ends in zeros; so are coordinates that no layer uses.
  void to_coordinates(const Real* w) {
    std::fill_n(user_, blocks_ * kBlock, Real(0));
    for (int64_t i = 0; i < job_.program->params; ++i) {
      if (moves(i)) user_[job_.learned->place[i]] = w[i];
    }
  }

  const Job<Real>& job_;
  int64_t task_, coordinates_, blocks_, frames_kept_;
  bool gates_kept_;
  Carver<Real> carver_;
  LstmCell<Real> cell_;
  Real *frames_, *gates_, *carry_, *user_, *result_;
};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
