// One step of the coordinatewise LSTM optimiser and its vector-Jacobian product, a block of coordinates at a
// time.
//
// The lanes are coordinates: a block's activations are rows of kLstmBlock of them, so that gates are one
// product with the weights as they are and nothing is padded to whole vectors, whatever the hidden size. For
// layer l
//
//   Z_l = (inputs; h_l; 1),  (K, block)       G = (W_l V_l b_l) Z_l
//   backward    d(W_l V_l b_l) += dG Z_l',    dZ_l = (W_l V_l)' dG
//
// The backward kernel computes the forward again: what that takes is less than to write and read the gates of
// all coordinates. Weight gradients are sums over the blocks of a part, in order; the caller adds the parts
// up, in order, and which blocks are a part does not hang on the threads. Tested by tests/ops/test_lstm.py.
#pragma once

#ifndef METAFAST_ISA
#error "define METAFAST_ISA, the instruction set's namespace, before including a kernel"
#endif

#include <algorithm>

#include "../engine/program.h"
#include "layers/math.h"
#include "layers/multiply.h"
#include "lstm.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

inline float natural_log(float x) { return __builtin_logf(x); }
inline double natural_log(double x) { return __builtin_log(x); }

template <class Real>
class LstmBlocks {
 public:
  using V = Vec<Real>;
  static constexpr int64_t kBlock = kLstmBlock<Real>;

  // With a null workspace it only tells the size.
  LstmBlocks(const Lstm<Real>& lstm, Real* workspace) : a_(lstm), hidden_(lstm.hidden) {
    int64_t size = 0;
    const auto take = [&](int64_t count) {
      Real* const at = workspace == nullptr ? nullptr : workspace + size;
      size += whole(count);
      return at;
    };
    int64_t most = 0;
    for (int64_t l = 0; l < a_.layers; ++l) {
      const int64_t k = rows(l), gates = 4 * hidden_;
      most = std::max(most, k);
      layer_[l] = {take(gates * k),        take((k - 1) * gates),  take(gates * whole(k)),
                   take(k * kBlock),       take(hidden_ * kBlock), take(gates * kBlock),
                   take(hidden_ * kBlock), take(hidden_ * kBlock)};
    }
    top_ = take(hidden_ * kBlock);
    d_z_ = take(most * kBlock);
    d_gates_ = take(4 * hidden_ * kBlock);
    d_h_ = take(hidden_ * kBlock);
    d_c_ = take(hidden_ * kBlock);
    transposed_ = take(kBlock * whole(most));
    d_output_ = take((hidden_ + 1) * kLanes<Real>);
    size_ = size;
  }

  int64_t size() const { return size_; }

  // The weights of each layer side by side, and transposed where gradients go through them.
  void pack(bool transposed) {
    for (int64_t l = 0; l < a_.layers; ++l) {
      const int64_t k = rows(l), n = inputs(l), gates = 4 * hidden_;
      const Real *const w = a_.weights[3 * l], *const v = a_.weights[3 * l + 1],
                        *const b = a_.weights[3 * l + 2];
      Real* const packed = layer_[l].w;
      for (int64_t g = 0; g < gates; ++g) {
        std::copy_n(w + g * n, n, packed + g * k);
        std::copy_n(v + g * hidden_, hidden_, packed + g * k + n);
        packed[g * k + k - 1] = b[g];
      }
      for (int64_t i = 0; transposed && i < k - 1; ++i) {
        for (int64_t g = 0; g < gates; ++g) layer_[l].wt[i * gates + g] = packed[g * k + i];
      }
    }
  }

  void forward(int64_t block) {
    first_ = block * kBlock;
    count_ = std::min(kBlock, a_.coordinates - first_);
    preprocess(layer_[0].z);
    for (int64_t l = 0; l < a_.layers; ++l) {
      const Layer& s = layer_[l];
      const int64_t k = rows(l), n = inputs(l), h = hidden_;
      read(a_.state, 2 * l, s.z + n * kBlock);
      read(a_.state, 2 * l + 1, s.c);
      std::fill_n(s.z + (k - 1) * kBlock, kBlock, Real(1));
      product(s.w, k, 4 * h, s.z, k, s.gates);
      Real* const z = l + 1 < a_.layers ? layer_[l + 1].z : top_;
      for (int64_t i = 0; i < h * kBlock; i += kLanes<Real>) {
        const V in = logistic<Real>(load(s.gates + i)).value;
        const V forget = logistic<Real>(load(s.gates + h * kBlock + i)).value;
        const V candidate = hyperbolic_tangent<Real>(load(s.gates + 2 * h * kBlock + i)).value;
        const V out = logistic<Real>(load(s.gates + 3 * h * kBlock + i)).value;
        const V c = forget * load(s.c + i) + in * candidate, t = hyperbolic_tangent<Real>(c).value;
        store(s.gates + i, in);
        store(s.gates + h * kBlock + i, forget);
        store(s.gates + 2 * h * kBlock + i, candidate);
        store(s.gates + 3 * h * kBlock + i, out);
        store(s.next_c + i, c);
        store(s.tanh_c + i, t);
        store(z + i, out * t);
      }
    }
  }

  // After forward: what it is called for.
  void write_forward() {
    const Real* const w = a_.weights[3 * a_.layers];
    const Real b = *a_.weights[3 * a_.layers + 1];
    alignas(kVectorBytes) Real updates[kBlock];
    for (int64_t lane = 0; lane < kBlock; lane += kLanes<Real>) {
      V sum = splat(b);
      for (int64_t j = 0; j < hidden_; ++j) sum += w[j] * load(top_ + j * kBlock + lane);
      store(updates + lane, sum);
    }
    std::copy_n(updates, count_, a_.updates + first_);
    for (int64_t l = 0; l < a_.layers; ++l) {
      write(l + 1 < a_.layers ? layer_[l + 1].z : top_, a_.next, 2 * l);
      write(layer_[l].next_c, a_.next, 2 * l + 1);
    }
  }

  // After forward; `begins`: weight gradients start here.
  void backward(bool begins) {
    const int64_t h = hidden_;
    alignas(kVectorBytes) Real d_updates[kBlock] = {};
    if (a_.d_updates != nullptr) std::copy_n(a_.d_updates + first_, count_, d_updates);
    if (begins) std::fill_n(d_output_, (h + 1) * kLanes<Real>, Real(0));
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

    for (int64_t l = a_.layers - 1; l >= 0; --l) {
      const Layer& s = layer_[l];
      const int64_t k = rows(l), n = inputs(l), gate = h * kBlock;
      read(a_.d_next, 2 * l, d_h_);
      read(a_.d_next, 2 * l + 1, d_c_);
      for (int64_t i = 0; i < gate; i += kLanes<Real>) {
        const V in = load(s.gates + i), forget = load(s.gates + gate + i),
                candidate = load(s.gates + 2 * gate + i), out = load(s.gates + 3 * gate + i),
                t = load(s.tanh_c + i);
        const V d_h = load(d_z_ + i) + load(d_h_ + i);
        const V d_c = load(d_c_ + i) + d_h * out * (1 - t * t);
        store(d_gates_ + i, d_c * candidate * in * (1 - in));
        store(d_gates_ + gate + i, d_c * load(s.c + i) * forget * (1 - forget));
        store(d_gates_ + 2 * gate + i, d_c * in * (1 - candidate * candidate));
        store(d_gates_ + 3 * gate + i, d_h * t * out * (1 - out));
        store(d_c_ + i, d_c * forget);
      }
      write(d_c_, a_.d_state, 2 * l + 1);
      const int64_t wide = whole(k);
      transpose(s.z, k, kBlock, kBlock, transposed_, wide);
      outer<Real>(nullptr, Walk{1, 1, kBlock, 0, 0, 0, 1, 0, 0, 0, wide}, d_gates_, a_.gate_rows, 4 * h,
                  transposed_, nullptr, nullptr, lanes_of<Real>(k), s.d_w, wide, !begins);
      product(s.wt, 4 * h, k - 1, d_gates_, 4 * h, d_z_);
      write(d_z_ + n * kBlock, a_.d_state, 2 * l);
    }
    for (int64_t i = 0; i < count_; ++i) {
      const Real g = a_.grads[first_ + i];
      // d log|g| / dg is 1 / g; the sign does not move.
      a_.d_grads[first_ + i] =
          absolute_of(g) >= a_.least ? d_z_[i] / (a_.p * g) : a_.steep * d_z_[kBlock + i];
    }
  }

  // The sums over the blocks since `begins`, in the user's order, one weight after the other.
  void write_weights(Real* to) const {
    for (int64_t l = 0; l < a_.layers; ++l) {
      const int64_t k = rows(l), n = inputs(l), wide = whole(k);
      const Real* const d = layer_[l].d_w;
      for (int64_t g = 0; g < 4 * hidden_; ++g, to += n) std::copy_n(d + g * wide, n, to);
      for (int64_t g = 0; g < 4 * hidden_; ++g, to += hidden_) std::copy_n(d + g * wide + n, hidden_, to);
      for (int64_t g = 0; g < 4 * hidden_; ++g) *to++ = d[g * wide + k - 1];
    }
    for (int64_t j = 0; j <= hidden_; ++j) *to++ = sum_of_lanes<Real>(load(d_output_ + j * kLanes<Real>));
  }

 private:
  // w (4H, K), wt (K - 1, 4H), d_w (4H, K in whole vectors); z (K, block), c, next_c, tanh_c (H, block),
  // gates (4H, block), activated.
  struct Layer {
    Real *w, *wt, *d_w, *z, *c, *gates, *next_c, *tanh_c;
  };

  static int64_t whole(int64_t count) {
    constexpr int64_t kVector = kVectorBytes / int64_t(sizeof(Real));
    return (count + kVector - 1) / kVector * kVector;
  }
  static Real absolute_of(Real x) { return x < 0 ? -x : x; }
  int64_t inputs(int64_t l) const { return l == 0 ? 2 : hidden_; }
  int64_t rows(int64_t l) const { return inputs(l) + hidden_ + 1; }

  // to (count, block) = a (count, k) z (k, block), rows of a lda apart.
  static void product(const Real* a, int64_t lda, int64_t count, const Real* z, int64_t k, Real* to) {
    const int64_t offset = 0;
    multiply(nullptr, Walk{1, 1, count, 0, 0, 0, lda, 0, 0, 0, kBlock}, a,
             Taps<Real>{1, &offset, &z, k, kBlock}, kBlock, Finish<Real>{}, to);
  }

  void preprocess(Real* z) const {
    for (int64_t i = 0; i < kBlock; ++i) {
      const Real g = i < count_ ? a_.grads[first_ + i] : Real(0), size = absolute_of(g);
      const bool small = size < a_.least;
      z[i] = small ? Real(-1) : natural_log(size) / a_.p;
      z[kBlock + i] = small ? a_.steep * g : g > 0 ? Real(1) : g < 0 ? Real(-1) : g;
    }
  }

  // Plane number `plane` of a (.., N, H) as (H, block); zeros where it is null and beyond the last
  // coordinate.
  void read(const Real* planes, int64_t plane, Real* to) const {
    if (planes == nullptr) {
      std::fill_n(to, hidden_ * kBlock, Real(0));
    } else {
      to_lanes(planes + (plane * a_.coordinates + first_) * hidden_, to);
    }
  }
  void write(const Real* from, Real* planes, int64_t plane) const {
    from_lanes(from, planes + (plane * a_.coordinates + first_) * hidden_);
  }

  // (count, H) to (H, block) and back, a square at a time; never beyond a row's end, which is another
  // thread's.
#if defined(__AVX2__)
  static constexpr int kSide = Block<Real>::kSide;
  using Square = typename Block<Real>::Row;
  using Unaligned = typename Block<Real>::Memory;

  // The first `width` of a row, zeros after them. Half a row is the common rest, of 20 units for instance.
  static Square load_some(const Real* from, int64_t width) {
    Square row{};
    if (width == kSide / 2) {
      __builtin_memcpy(&row, from, sizeof(row) / 2);
    } else {
      for (int64_t j = 0; j < width; ++j) row[j] = from[j];
    }
    return row;
  }
  static void store_some(Square row, int64_t width, Real* to) {
    if (width == kSide / 2) {
      __builtin_memcpy(to, &row, sizeof(row) / 2);
    } else {
      for (int64_t j = 0; j < width; ++j) to[j] = row[j];
    }
  }
  // A square whose first coordinate is i and first unit c, `high` coordinates and `wide` units of it.
  template <bool kWhole>
  void square_to_lanes(const Real* from, int64_t i, int64_t c, int64_t high, int64_t wide, Real* to) const {
    Square rows[kSide];
#pragma GCC unroll 8
    for (int r = 0; r < kSide; ++r) {
      const Real* const row = from + (i + r) * hidden_ + c;
      if constexpr (kWhole) {
        rows[r] = *reinterpret_cast<const Unaligned*>(row);
      } else {
        rows[r] = r < high ? load_some(row, wide) : Square{};
      }
    }
    transpose_block(rows);
#pragma GCC unroll 8
    for (int r = 0; r < kSide; ++r) {
      if (kWhole || r < wide) *reinterpret_cast<Unaligned*>(to + (c + r) * kBlock + i) = rows[r];
    }
  }
  template <bool kWhole>
  void square_from_lanes(const Real* from, int64_t i, int64_t c, int64_t high, int64_t wide, Real* to) const {
    Square rows[kSide];
#pragma GCC unroll 8
    for (int r = 0; r < kSide; ++r) {
      const bool there = kWhole || r < wide;
      rows[r] = there ? *reinterpret_cast<const Unaligned*>(from + (c + r) * kBlock + i) : Square{};
    }
    transpose_block(rows);
#pragma GCC unroll 8
    for (int r = 0; r < kSide; ++r) {
      Real* const row = to + (i + r) * hidden_ + c;
      if constexpr (kWhole) {
        *reinterpret_cast<Unaligned*>(row) = rows[r];
      } else if (r < high) {
        store_some(rows[r], wide, row);
      }
    }
  }
  void to_lanes(const Real* from, Real* to) const {
    for (int64_t i = 0; i < kBlock; i += kSide) {
      for (int64_t c = 0; c < hidden_; c += kSide) {
        const int64_t high = std::min<int64_t>(kSide, count_ - i),
                      wide = std::min<int64_t>(kSide, hidden_ - c);
        if (high == kSide && wide == kSide) {
          square_to_lanes<true>(from, i, c, high, wide, to);
        } else {
          square_to_lanes<false>(from, i, c, high, wide, to);
        }
      }
    }
  }
  void from_lanes(const Real* from, Real* to) const {
    for (int64_t i = 0; i < count_; i += kSide) {
      for (int64_t c = 0; c < hidden_; c += kSide) {
        const int64_t high = std::min<int64_t>(kSide, count_ - i),
                      wide = std::min<int64_t>(kSide, hidden_ - c);
        if (high == kSide && wide == kSide) {
          square_from_lanes<true>(from, i, c, high, wide, to);
        } else {
          square_from_lanes<false>(from, i, c, high, wide, to);
        }
      }
    }
  }
#else
  void to_lanes(const Real* from, Real* to) const {
    for (int64_t j = 0; j < hidden_; ++j) {
      for (int64_t i = 0; i < kBlock; ++i) to[j * kBlock + i] = i < count_ ? from[i * hidden_ + j] : Real(0);
    }
  }
  void from_lanes(const Real* from, Real* to) const {
    for (int64_t i = 0; i < count_; ++i) {
      for (int64_t j = 0; j < hidden_; ++j) to[i * hidden_ + j] = from[j * kBlock + i];
    }
  }
#endif

  const Lstm<Real>& a_;
  int64_t hidden_, size_, first_ = 0, count_ = 0;
  Layer layer_[kMostLstmLayers];
  Real *top_, *d_z_, *d_gates_, *d_h_, *d_c_, *transposed_, *d_output_;
};

template <class Real>
int64_t lstm_workspace(const Lstm<Real>& lstm) {
  return LstmBlocks<Real>(lstm, nullptr).size();
}

template <class Real>
void lstm_forward(const Lstm<Real>& lstm, int64_t begin, int64_t end, Real* workspace) {
  LstmBlocks<Real> blocks(lstm, workspace);
  blocks.pack(false);
  for (int64_t b = begin; b < end; ++b) {
    blocks.forward(b);
    blocks.write_forward();
  }
}

template <class Real>
void lstm_backward(const Lstm<Real>& lstm, int64_t begin, int64_t end, Real* d_weights, Real* workspace) {
  LstmBlocks<Real> blocks(lstm, workspace);
  blocks.pack(true);
  for (int64_t b = begin; b < end; ++b) {
    blocks.forward(b);
    blocks.backward(b == begin);
  }
  blocks.write_weights(d_weights);
}

template <class Real>
constexpr LstmFunctions<Real> kLstmFunctions{lstm_workspace<Real>, lstm_forward<Real>, lstm_backward<Real>};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
