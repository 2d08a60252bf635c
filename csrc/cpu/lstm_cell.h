// A block of coordinates through one step of the coordinatewise LSTM optimiser, and back.
//
// The lanes are coordinates: a block's activations are rows of kLstmBlock of them, so that gates are one
// product with the weights as they are and nothing is padded to whole vectors, whatever the hidden size. For
// layer l
//
//   Z_l = (inputs; 1; h_l),  (K, block)       G = (W_l b_l V_l) Z_l
//   backward    d(W_l b_l V_l) += dG Z_l',    d inputs = W_l' dG,  dh_l = V_l' dG
//
// where a step from h = 0 leaves V_l out, and one whose d h nobody wants leaves that out.
//
// What a block's step starts from is its frame, rows (1 + 2 + 2 L H, block): g, what the preprocessing makes
// of it, then h and c of each layer. What it makes besides are its gates, (L, 4H, block), activated. With
// both kept, the way back computes no product twice. Used by lstm_kernel.h, which is the operator of one
// step, and by rules.h, an inner loop's.
#pragma once

#include <algorithm>

#include "../engine/carver.h"
#include "../lstm.h"
#include "layers/math.h"
#include "layers/multiply.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

inline float natural_log(float x) { return __builtin_logf(x); }
inline double natural_log(double x) { return __builtin_log(x); }

template <class Real>
class LstmCell {
 public:
  using V = Vec<Real>;
  static constexpr int64_t kBlock = kLstmBlock<Real>;

  LstmCell(const LstmWeights<Real>& weights, Carver<Real>& workspace) : a_(weights), hidden_(a_.hidden) {
    int64_t most = 0;
    for (int64_t l = 0; l < a_.layers; ++l) {
      const int64_t k = rows(l), gates = 4 * hidden_;
      most = std::max(most, k);
      layer_[l] = {workspace.take(gates * k),       workspace.take(inputs(l) * gates),
                   workspace.take(hidden_ * gates), workspace.take(gates * Carver<Real>::whole(k)),
                   workspace.take(k * kBlock),      workspace.take(hidden_ * kBlock)};
    }
    top_ = workspace.take(hidden_ * kBlock);
    d_z_ = workspace.take(std::max<int64_t>(2, hidden_) * kBlock);
    d_gates_ = workspace.take(4 * hidden_ * kBlock);
    transposed_ = workspace.take(kBlock * Carver<Real>::whole(most));
    d_output_ = workspace.take((hidden_ + 1) * kLanes<Real>);
  }

  int64_t frame_size() const { return (3 + 2 * a_.layers * hidden_) * kBlock; }
  int64_t gates_size() const { return 4 * a_.layers * hidden_ * kBlock; }
  // Of the cotangents of h and c: a frame's rows but the first three.
  int64_t carry_size() const { return 2 * a_.layers * hidden_ * kBlock; }

  static Real* grads(Real* frame) { return frame; }
  Real* carried(Real* frame) const { return frame + 3 * kBlock; }

  // The weights of each layer side by side, and transposed where gradients go through them.
  void pack(bool transposed) {
    for (int64_t l = 0; l < a_.layers; ++l) {
      const int64_t k = rows(l), n = inputs(l), gates = 4 * hidden_;
      const Real *const w = a_.weights[3 * l], *const v = a_.weights[3 * l + 1],
                        *const b = a_.weights[3 * l + 2];
      Real* const packed = layer_[l].w;
      for (int64_t g = 0; g < gates; ++g) {
        std::copy_n(w + g * n, n, packed + g * k);
        packed[g * k + n] = b[g];
        std::copy_n(v + g * hidden_, hidden_, packed + g * k + n + 1);
        for (int64_t i = 0; transposed && i < n; ++i) layer_[l].wt[i * gates + g] = w[g * n + i];
        for (int64_t i = 0; transposed && i < hidden_; ++i) layer_[l].vt[i * gates + g] = v[g * hidden_ + i];
      }
      std::fill_n(layer_[l].z + n * kBlock, kBlock, Real(1));
    }
  }

  // h and c before the first step.
  void start(Real* carried) const {
    for (int64_t row = 0; row < 2 * a_.layers * hidden_; ++row)
      std::fill_n(carried + row * kBlock, kBlock, a_.start == nullptr ? Real(0) : a_.start[row]);
  }

  // From g, h and c in the frame: the gates, what the preprocessing gives, and h and c of the next frame,
  // which may be null.
  void forward(Real* frame, Real* gates, Real* next, bool from_zero) {
    preprocess(frame);
    layers<true>(frame, gates, next, from_zero);
  }
  // After this, as after forward, comes backward: what lies in neither frame nor gates.
  void restore(Real* frame, Real* gates, bool from_zero) { layers<false>(frame, gates, nullptr, from_zero); }

  // (block,) updates, after forward.
  void updates(Real* to) const {
    const Real* const w = a_.weights[3 * a_.layers];
    const Real b = *a_.weights[3 * a_.layers + 1];
    for (int64_t lane = 0; lane < kBlock; lane += kLanes<Real>) {
      V sum = splat(b);
      for (int64_t j = 0; j < hidden_; ++j) sum += w[j] * load(top_ + j * kBlock + lane);
      store(to + lane, sum);
    }
  }

  // The weights' gradients begin.
  void begin() {
    std::fill_n(d_output_, (hidden_ + 1) * kLanes<Real>, Real(0));
    for (int64_t l = 0; l < a_.layers; ++l)
      std::fill_n(layer_[l].d_w, 4 * hidden_ * Carver<Real>::whole(rows(l)), Real(0));
  }

  // After forward or restore of this frame: from d_updates (block,) and `carry`, the cotangents of h and c
  // after the step, to d_grads (block,) and, if `wants_carry`, those of h and c before it, in their place;
  // adds to the weights'. `from_zero` as before.
  void backward(Real* frame, const Real* gates, const Real* d_updates, Real* carry, Real* d_grads,
                bool from_zero, bool wants_carry) {
    const int64_t h = hidden_, gate = h * kBlock;
    backward_output(d_updates);
    for (int64_t l = a_.layers - 1; l >= 0; --l) {
      const Layer& s = layer_[l];
      const int64_t k = rows(l), n = inputs(l);
      const Real *const activated = gates + l * 4 * gate, *const c = cell(carried(frame), l);
      Real *const d_h_of = hidden(carry, l), *const d_c_of = cell(carry, l);
      for (int64_t i = 0; i < gate; i += kLanes<Real>) {
        const V in = load(activated + i), forget = load(activated + gate + i),
                candidate = load(activated + 2 * gate + i), out = load(activated + 3 * gate + i),
                t = load(s.tanh_c + i);
        const V d_h = load(d_z_ + i) + load(d_h_of + i);
        const V d_c = load(d_c_of + i) + d_h * out * (1 - t * t);
        store(d_gates_ + i, d_c * candidate * in * (1 - in));
        store(d_gates_ + gate + i, d_c * load(c + i) * forget * (1 - forget));
        store(d_gates_ + 2 * gate + i, d_c * in * (1 - candidate * candidate));
        store(d_gates_ + 3 * gate + i, d_h * t * out * (1 - out));
        store(d_c_of + i, d_c * forget);
      }
      const int64_t used = from_zero ? n + 1 : k, wide = Carver<Real>::whole(used);
      transpose(s.z, used, kBlock, kBlock, transposed_, wide);
      outer<Real>(nullptr, Walk{1, 1, kBlock, 0, 0, 0, 1, 0, 0, 0, wide}, d_gates_, a_.gate_rows, 4 * h,
                  transposed_, nullptr, nullptr, lanes_of<Real>(used), s.d_w, Carver<Real>::whole(k), true);
      product(s.wt, 4 * h, n, d_gates_, 4 * h, d_z_);
      if (wants_carry) product(s.vt, 4 * h, h, d_gates_, 4 * h, d_h_of);
    }
    const Real* const g = grads(frame);
    for (int64_t i = 0; i < kBlock; ++i) {
      // d log|g| / dg is 1 / g; the sign does not move.
      d_grads[i] = magnitude(g[i]) >= a_.least ? d_z_[i] / (a_.p * g[i]) : a_.steep * d_z_[kBlock + i];
    }
  }

  // The sums since `begin`, in the user's order, one weight after the other: LstmWeights::count() of them.
  void write_weights(Real* to) const {
    for (int64_t l = 0; l < a_.layers; ++l) {
      const int64_t k = rows(l), n = inputs(l), wide = Carver<Real>::whole(k);
      const Real* const d = layer_[l].d_w;
      for (int64_t g = 0; g < 4 * hidden_; ++g, to += n) std::copy_n(d + g * wide, n, to);
      for (int64_t g = 0; g < 4 * hidden_; ++g, to += hidden_) std::copy_n(d + g * wide + n + 1, hidden_, to);
      for (int64_t g = 0; g < 4 * hidden_; ++g) *to++ = d[g * wide + n];
    }
    for (int64_t j = 0; j <= hidden_; ++j) *to++ = sum_of_lanes<Real>(load(d_output_ + j * kLanes<Real>));
  }

  // Layer l's h and c among what is carried, or their cotangents.
  Real* hidden(Real* carried, int64_t l) const { return carried + 2 * l * hidden_ * kBlock; }
  Real* cell(Real* carried, int64_t l) const { return carried + (2 * l + 1) * hidden_ * kBlock; }

 private:
  // w (4H, K), wt (inputs, 4H), vt (H, 4H), d_w (4H, K in whole vectors); z (K, block), tanh_c (H, block).
  struct Layer {
    Real *w, *wt, *vt, *d_w, *z, *tanh_c;
  };

  int64_t inputs(int64_t l) const { return l == 0 ? 2 : hidden_; }
  int64_t rows(int64_t l) const { return inputs(l) + hidden_ + 1; }

  // to (count, block) = a (count, k) z (k, block), rows of a lda apart.
  static void product(const Real* a, int64_t lda, int64_t count, const Real* z, int64_t k, Real* to) {
    const int64_t offset = 0;
    multiply<Real>(nullptr, Walk{1, 1, count, 0, 0, 0, lda, 0, 0, 0, kBlock}, a,
                   Taps<Real>{1, &offset, &z, k, kBlock}, kBlock, nullptr, to);
  }

  void preprocess(Real* frame) const {
    const Real* const grads = frame;
    Real* const z = frame + kBlock;
    for (int64_t i = 0; i < kBlock; ++i) {
      const Real g = grads[i], size = magnitude(g);
      const bool small = size < a_.least;
      z[i] = small ? Real(-1) : natural_log(size) / a_.p;
      z[kBlock + i] = small ? a_.steep * g : g > 0 ? Real(1) : g < 0 ? Real(-1) : g;
    }
  }

  template <bool kForward>
  void layers(Real* frame, Real* gates, Real* next, bool from_zero) {
    const int64_t h = hidden_, gate = h * kBlock;
    std::copy_n(frame + kBlock, 2 * kBlock, layer_[0].z);
    for (int64_t l = 0; l < a_.layers; ++l) {
      const Layer& s = layer_[l];
      Real* const activated = gates + l * 4 * gate;
      const Real* const c_before = cell(carried(frame), l);
      const int64_t used = from_zero ? inputs(l) + 1 : rows(l);
      if (!from_zero) std::copy_n(hidden(carried(frame), l), gate, s.z + (inputs(l) + 1) * kBlock);
      if (kForward) product(s.w, rows(l), 4 * h, s.z, used, activated);
      Real* const z = l + 1 < a_.layers ? layer_[l + 1].z : top_;
      Real *const next_h = next == nullptr ? nullptr : hidden(carried(next), l), *const next_c =
                                                                                     next == nullptr
                                                                                         ? nullptr
                                                                                         : cell(carried(next),
                                                                                                l);
      if (kForward) {
        // Apart from what follows, so that a core has many short chains of operations at hand, not a long
        // one.
        for (int64_t i = 0; i < 2 * gate; i += kLanes<Real>)
          store(activated + i, logistic_value<Real>(load(activated + i)));
        for (int64_t i = 2 * gate; i < 3 * gate; i += kLanes<Real>)
          store(activated + i, tanh_value<Real>(load(activated + i)));
        for (int64_t i = 3 * gate; i < 4 * gate; i += kLanes<Real>)
          store(activated + i, logistic_value<Real>(load(activated + i)));
      }
      for (int64_t i = 0; i < gate; i += kLanes<Real>) {
        const V in = load(activated + i), forget = load(activated + gate + i),
                candidate = load(activated + 2 * gate + i), out = load(activated + 3 * gate + i);
        const V c = forget * load(c_before + i) + in * candidate, t = tanh_value<Real>(c);
        store(s.tanh_c + i, t);
        store(z + i, out * t);
        if (next == nullptr) continue;
        store(next_h + i, out * t);
        store(next_c + i, c);
      }
    }
  }

  // The output's weights, and d_z_ of the last layer's h.
  void backward_output(const Real* d_updates) {
    const int64_t h = hidden_;
    const Real* const w = a_.weights[3 * a_.layers];
    for (int64_t j = 0; j < h; ++j) {
      V sum = load(d_output_ + j * kLanes<Real>);
      for (int64_t lane = 0; lane < kBlock; lane += kLanes<Real>) {
        const V d = load(d_updates + lane);
        sum += d * load(top_ + j * kBlock + lane);
        store(d_z_ + j * kBlock + lane, w[j] * d);
      }
      store(d_output_ + j * kLanes<Real>, sum);
    }
    V sum = load(d_output_ + h * kLanes<Real>);
    for (int64_t lane = 0; lane < kBlock; lane += kLanes<Real>) sum += load(d_updates + lane);
    store(d_output_ + h * kLanes<Real>, sum);
  }

  const LstmWeights<Real>& a_;
  int64_t hidden_;
  Layer layer_[kMostLstmLayers];
  Real *top_, *d_z_, *d_gates_, *transposed_, *d_output_;
};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
