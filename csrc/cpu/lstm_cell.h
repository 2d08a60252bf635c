// A block of coordinates through one step of the coordinatewise LSTM optimiser, and back.
//
// The lanes are coordinates: a block's activations are rows of kLstmBlock of them, so that gates are one
// product with the weights as they are and nothing is padded to whole vectors, whatever the hidden size. For
// layer l
//
//   Z_l = (1; inputs; h_l),  (K, block)       G = (b_l W_l V_l) Z_l
//   backward    d(W_l V_l) += dG (inputs; h_l)',  d b_l += dG 1,  d inputs = W_l' dG,  dh_l = V_l' dG
//
// where a step from h = 0 leaves V_l out, and one whose d h nobody wants leaves that out.
//
// What a block's step starts from is its frame: g, then Z_l and c of each layer, from which nothing need be
// copied for the products. What it makes besides are its gates: of each layer those four, activated, and tanh
// of the new c, (L, 5H, block). With both kept, the way back computes nothing twice. Used by lstm_kernel.h,
// which is the operator, and by rules.h, an inner loop's.
#pragma once

#include <algorithm>

#include "../engine/carver.h"
#include "../lstm.h"
#include "layers/math.h"
#include "layers/row_products.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

template <class Real>
class LstmCell {
 public:
  using V = Vec<Real>;
  static constexpr int64_t kBlock = kLstmBlock<Real>;

  LstmCell(const LstmWeights<Real>& weights, Carver<Real>& workspace) : a_(weights), hidden_(a_.hidden) {
    int64_t most = 0;
    for (int64_t l = 0; l < a_.layers; ++l) {
      const int64_t k = rows(l), gates = 4 * hidden_;
      most = std::max(most, d_row(l));
      layer_[l] = {workspace.take(gates * k),
                   workspace.take(inputs(l) * gates),
                   workspace.take(hidden_ * gates),
                   workspace.take(gates * d_row(l)),
                   workspace.take(gates * kLanes<Real>),
                   frame_rows_};
      frame_rows_ += k + hidden_;
    }
    d_z_ = workspace.take(std::max<int64_t>(2, hidden_) * kBlock);
    d_gates_ = workspace.take(4 * hidden_ * kBlock);
    transposed_ = workspace.take(kBlock * most);
    d_output_ = workspace.take((hidden_ + 1) * kLanes<Real>);
  }

  int64_t frame_size() const { return frame_rows_ * kBlock; }
  int64_t gates_size() const { return 5 * a_.layers * hidden_ * kBlock; }
  // Of the cotangents of h and c, (L, 2, H, block).
  int64_t carry_size() const { return 2 * a_.layers * hidden_ * kBlock; }

  static Real* grads(Real* frame) { return frame; }
  // Layer l's h and c in a frame, (H, block) each.
  Real* hidden(Real* frame, int64_t l) const { return inputs_of(frame, l) + inputs(l) * kBlock; }
  Real* cell(Real* frame, int64_t l) const { return hidden(frame, l) + hidden_ * kBlock; }

  // The weights of each layer side by side, and transposed where gradients go through them.
  void pack(bool transposed) {
    for (int64_t l = 0; l < a_.layers; ++l) {
      const int64_t k = rows(l), n = inputs(l), gates = 4 * hidden_;
      const Real *const w = a_.weights[3 * l], *const v = a_.weights[3 * l + 1],
                        *const b = a_.weights[3 * l + 2];
      Real* const packed = layer_[l].w;
      for (int64_t g = 0; g < gates; ++g) {
        packed[g * k] = b[g];
        std::copy_n(w + g * n, n, packed + g * k + 1);
        std::copy_n(v + g * hidden_, hidden_, packed + g * k + n + 1);
        for (int64_t i = 0; transposed && i < n; ++i) layer_[l].wt[i * gates + g] = w[g * n + i];
        for (int64_t i = 0; transposed && i < hidden_; ++i) layer_[l].vt[i * gates + g] = v[g * hidden_ + i];
      }
    }
  }

  // h and c before the first step.
  void start(Real* frame) const {
    const auto fill = [&](int64_t plane, Real* to) {
      for (int64_t j = 0; j < hidden_; ++j)
        std::fill_n(to + j * kBlock, kBlock, a_.start == nullptr ? Real(0) : a_.start[plane * hidden_ + j]);
    };
    for (int64_t l = 0; l < a_.layers; ++l) {
      fill(2 * l, hidden(frame, l));
      fill(2 * l + 1, cell(frame, l));
    }
  }

  // From g, h and c in the frame: the rest of it, the gates, and h and c of the next frame, which may be
  // null.
  void forward(Real* frame, Real* gates, Real* next, bool from_zero) const {
    preprocess(frame);
    const int64_t h = hidden_, gate = h * kBlock;
    for (int64_t l = 0; l < a_.layers; ++l) {
      Real *const z = inputs_of(frame, l) - kBlock, *const activated = gates_of(gates, l);
      std::fill_n(z, kBlock, Real(1));
      product(layer_[l].w, rows(l), 4 * h, z, from_zero ? inputs(l) + 1 : rows(l), activated);
      // Apart from what follows, so that a core has many short chains of operations at hand, not a long one.
      for (int64_t i = 0; i < 2 * gate; i += kLanes<Real>)
        store(activated + i, logistic_value<Real>(load(activated + i)));
      for (int64_t i = 2 * gate; i < 3 * gate; i += kLanes<Real>)
        store(activated + i, tanh_value<Real>(load(activated + i)));
      for (int64_t i = 3 * gate; i < 4 * gate; i += kLanes<Real>)
        store(activated + i, logistic_value<Real>(load(activated + i)));
      const Real* const c_before = cell(frame, l);
      Real* const above = l + 1 < a_.layers ? inputs_of(frame, l + 1) : nullptr;
      Real* const next_h = next == nullptr ? nullptr : hidden(next, l);
      Real* const next_c = next == nullptr ? nullptr : cell(next, l);
      for (int64_t i = 0; i < gate; i += kLanes<Real>) {
        const V in = load(activated + i), forget = load(activated + gate + i),
                candidate = load(activated + 2 * gate + i), out = load(activated + 3 * gate + i);
        const V c = forget * load(c_before + i) + in * candidate, t = tanh_value<Real>(c);
        store(activated + 4 * gate + i, t);
        if (above != nullptr) store(above + i, out * t);
        if (next == nullptr) continue;
        store(next_h + i, out * t);
        store(next_c + i, c);
      }
    }
  }

  // (block,) updates of what forward made.
  void updates(const Real* gates, Real* to) const {
    const Real* const w = a_.weights[3 * a_.layers];
    const Real b = *a_.weights[3 * a_.layers + 1];
    for (int64_t lane = 0; lane < kBlock; lane += kLanes<Real>) {
      V sum = splat(b);
      for (int64_t j = 0; j < hidden_; ++j) sum += w[j] * top(gates, j * kBlock + lane);
      store(to + lane, sum);
    }
  }

  // The weights' gradients begin.
  void begin() {
    std::fill_n(d_output_, (hidden_ + 1) * kLanes<Real>, Real(0));
    for (int64_t l = 0; l < a_.layers; ++l) {
      std::fill_n(layer_[l].d_w, 4 * hidden_ * d_row(l), Real(0));
      std::fill_n(layer_[l].d_b, 4 * hidden_ * kLanes<Real>, Real(0));
    }
  }

  // After forward: from d_updates (block,) and `carry`, the cotangents of h and c after the step, to d_grads
  // (block,) and, if `wants_carry`, those of h and c before it, in their place; adds to the weights'.
  // `from_zero` as before.
  void backward(Real* frame, const Real* gates, const Real* d_updates, Real* carry, Real* d_grads,
                bool from_zero, bool wants_carry) {
    const int64_t h = hidden_, gate = h * kBlock;
    backward_output(gates, d_updates);
    for (int64_t l = a_.layers - 1; l >= 0; --l) {
      const Layer& s = layer_[l];
      const int64_t n = inputs(l);
      const Real *const activated = gates_of(gates, l), *const c = cell(frame, l);
      Real *const d_h_of = carry + 2 * l * gate, *const d_c_of = d_h_of + gate;
      for (int64_t j = 0; j < h; ++j) {
        V d_b[4];
        for (int g = 0; g < 4; ++g) d_b[g] = load(s.d_b + (g * h + j) * kLanes<Real>);
        for (int64_t i = j * kBlock; i < (j + 1) * kBlock; i += kLanes<Real>) {
          const V in = load(activated + i), forget = load(activated + gate + i),
                  candidate = load(activated + 2 * gate + i), out = load(activated + 3 * gate + i),
                  t = load(activated + 4 * gate + i);
          const V d_h = load(d_z_ + i) + load(d_h_of + i);
          const V d_c = load(d_c_of + i) + d_h * out * (1 - t * t);
          const V d[4] = {d_c * candidate * in * (1 - in), d_c * load(c + i) * forget * (1 - forget),
                          d_c * in * (1 - candidate * candidate), d_h * t * out * (1 - out)};
          for (int g = 0; g < 4; ++g) {
            d_b[g] += d[g];
            store(d_gates_ + g * gate + i, d[g]);
          }
          store(d_c_of + i, d_c * forget);
        }
        for (int g = 0; g < 4; ++g) store(s.d_b + (g * h + j) * kLanes<Real>, d_b[g]);
      }
      const int64_t used = from_zero ? n : n + h, wide = Carver<Real>::whole(used);
      transpose(inputs_of(frame, l), used, kBlock, kBlock, transposed_, wide);
      product<true>(d_gates_, kBlock, 4 * h, transposed_, wide, kBlock, lanes_of<Real>(used), s.d_w,
                    d_row(l));
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
      const int64_t n = inputs(l), wide = d_row(l);
      const Real* const d = layer_[l].d_w;
      for (int64_t g = 0; g < 4 * hidden_; ++g, to += n) std::copy_n(d + g * wide, n, to);
      for (int64_t g = 0; g < 4 * hidden_; ++g, to += hidden_) std::copy_n(d + g * wide + n, hidden_, to);
      for (int64_t g = 0; g < 4 * hidden_; ++g)
        *to++ = sum_of_lanes<Real>(load(layer_[l].d_b + g * kLanes<Real>));
    }
    for (int64_t j = 0; j <= hidden_; ++j) *to++ = sum_of_lanes<Real>(load(d_output_ + j * kLanes<Real>));
  }

 private:
  // w (4H, K), wt (inputs, 4H), vt (H, 4H), d_w (4H, d_row), d_b (4H, lanes), of which the
  // lanes' sums are wanted; where in a frame Z_l begins.
  struct Layer {
    Real *w, *wt, *vt, *d_w, *d_b;
    int64_t frame_row;
  };

  int64_t inputs(int64_t l) const { return l == 0 ? 2 : hidden_; }
  int64_t rows(int64_t l) const { return inputs(l) + hidden_ + 1; }
  // The inputs and h, in whole vectors.
  int64_t d_row(int64_t l) const { return Carver<Real>::whole(inputs(l) + hidden_); }
  // Z_l's, after the ones.
  Real* inputs_of(Real* frame, int64_t l) const { return frame + (layer_[l].frame_row + 1) * kBlock; }
  template <class Gates>
  Gates* gates_of(Gates* gates, int64_t l) const {
    return gates + l * 5 * hidden_ * kBlock;
  }
  // The last layer's h after a step, from element i on.
  V top(const Real* gates, int64_t i) const {
    const Real* const out = gates_of(gates, a_.layers - 1) + 3 * hidden_ * kBlock + i;
    return load(out) * load(out + hidden_ * kBlock);
  }

  // to (count, columns) = a (count, k) z (k, columns), rows of them so far apart; or to += that.
  template <bool kAdd>
  static void product(const Real* a, int64_t a_row, int64_t count, const Real* z, int64_t z_row, int64_t k,
                      int64_t columns, Real* to, int64_t to_row) {
    run_row_product<Real>(nullptr, {.first = {a, z, a_row, z_row, k}, .c = to, .c_row = to_row, .add = kAdd},
                          count, columns);
  }
  // Of a block's rows z and to.
  static void product(const Real* a, int64_t a_row, int64_t count, const Real* z, int64_t k, Real* to) {
    product<false>(a, a_row, count, z, kBlock, k, kBlock, to, kBlock);
  }

  void preprocess(Real* frame) const {
    const Real* const grads = frame;
    Real* const z = inputs_of(frame, 0);
    for (int64_t i = 0; i < kBlock; i += kLanes<Real>) {
      const V g = load(grads + i), size = absolute<Real>(g);
      const auto small = size < a_.least;
      const V sign = g > V{} ? splat(Real(1)) : g < V{} ? splat(Real(-1)) : g;
      store(z + i, small ? splat(Real(-1)) : natural_log<Real>(size) / a_.p);
      store(z + kBlock + i, small ? a_.steep * g : sign);
    }
  }

  // The output's weights, and d_z_ of the last layer's h.
  void backward_output(const Real* gates, const Real* d_updates) {
    const int64_t h = hidden_;
    const Real* const w = a_.weights[3 * a_.layers];
    for (int64_t j = 0; j < h; ++j) {
      V sum = load(d_output_ + j * kLanes<Real>);
      for (int64_t lane = 0; lane < kBlock; lane += kLanes<Real>) {
        const V d = load(d_updates + lane);
        sum += d * top(gates, j * kBlock + lane);
        store(d_z_ + j * kBlock + lane, w[j] * d);
      }
      store(d_output_ + j * kLanes<Real>, sum);
    }
    V sum = load(d_output_ + h * kLanes<Real>);
    for (int64_t lane = 0; lane < kBlock; lane += kLanes<Real>) sum += load(d_updates + lane);
    store(d_output_ + h * kLanes<Real>, sum);
  }

  const LstmWeights<Real>& a_;
  int64_t hidden_, frame_rows_ = 1;  // g's row, then the layers'
  Layer layer_[kMostLstmLayers];
  Real *d_z_, *d_gates_, *transposed_, *d_output_;
};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
