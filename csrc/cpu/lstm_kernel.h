// Steps of the coordinatewise LSTM optimiser on (L, 2, N, H) states, and their vector-Jacobian product:
// blocks of lstm_cell.h, through all steps while they are in the cache, between which and the user's rows of
// units they are transposed at either end.
//
// The backward kernel computes the forward again: what that takes is less than to write and read the gates of
// all coordinates. Weight gradients are sums over the blocks of a part, in order; the caller adds the parts
// up, in order, and which blocks are a part does not hang on the threads. Tested by tests/ops/test_lstm.py.
#pragma once

#include <algorithm>
#include <type_traits>

#include "lstm.h"
#include "lstm_cell.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

template <class Real>
class LstmBlocks {
 public:
  static constexpr int64_t kBlock = kLstmBlock<Real>;

  // With a null workspace it only tells the size.
  LstmBlocks(const Lstm<Real>& lstm, bool backward, Real* workspace)
      : a_(lstm), hidden_(lstm.rule->hidden), carver_(workspace), cell(*lstm.rule, carver_) {
    // The way back wants all steps'.
    frames_kept_ = backward ? a_.steps : 2;
    gates_kept_ = backward ? a_.steps : 1;
    frames_ = carver_.take(frames_kept_ * cell.frame_size());
    gates_ = carver_.take(gates_kept_ * cell.gates_size());
    carry_ = carver_.take(cell.carry_size());
  }

  int64_t size() const { return carver_.size(); }

  void forward(int64_t block) {
    start(block);
    fetch<true>(a_.next, block);
    alignas(kVectorBytes) Real updates[kBlock];
    for (int64_t k = 0; k < a_.steps; ++k) {
      step(k, frame(k + 1));
      cell.updates(gates(k), updates);
      std::copy_n(updates, count_, a_.updates + k * a_.coordinates + first_);
    }
    for_each_plane([&](int64_t plane) { write(plane_of(frame(a_.steps), plane), a_.next, plane); });
  }

  void backward(int64_t block) {
    start(block);
    fetch<false>(a_.d_next, block);
    fetch<true>(a_.d_state, block);
    const int64_t last = a_.steps - 1;
    for (int64_t k = 0; k <= last; ++k) step(k, k < last ? frame(k + 1) : nullptr);
    for_each_plane([&](int64_t plane) { read(a_.d_next, plane, carry_ + plane * hidden_ * kBlock); });
    alignas(kVectorBytes) Real d_updates[kBlock] = {}, d_grads[kBlock];
    for (int64_t k = last; k >= 0; --k) {
      const int64_t row = k * a_.coordinates + first_;
      if (a_.d_updates != nullptr) std::copy_n(a_.d_updates + row, count_, d_updates);
      cell.backward(frame(k), gates(k), d_updates, carry_, d_grads, from_zero(k),
                    k > 0 || a_.d_state != nullptr);
      std::copy_n(d_grads, count_, a_.d_grads + row);
    }
    if (a_.d_state == nullptr) return;
    for_each_plane([&](int64_t plane) { write(carry_ + plane * hidden_ * kBlock, a_.d_state, plane); });
  }

 private:
  Real* frame(int64_t k) const { return frames_ + k % frames_kept_ * cell.frame_size(); }
  Real* gates(int64_t k) const { return gates_ + k % gates_kept_ * cell.gates_size(); }
  bool from_zero(int64_t k) const { return k == 0 && zero_; }
  template <class Visit>
  void for_each_plane(const Visit& visit) const {
    for (int64_t plane = 0; plane < 2 * a_.rule->layers; ++plane) visit(plane);
  }
  Real* plane_of(Real* frame, int64_t plane) const {
    return plane % 2 == 0 ? cell.hidden(frame, plane / 2) : cell.cell(frame, plane / 2);
  }

  // Rows of a block are short and far from those of other planes: the caches do not guess them. There is time
  // to fetch them while a block is computed.
  template <bool kToWrite>
  void fetch(const Real* planes, int64_t block) const {
    const int64_t first = block * kBlock, count = std::min(kBlock, a_.coordinates - first);
    if (planes == nullptr || count <= 0) return;
    constexpr int64_t kLine = 64 / int64_t(sizeof(Real));
    for (int64_t plane = 0; plane < 2 * a_.rule->layers; ++plane) {
      const Real* const from = planes + (plane * a_.coordinates + first) * hidden_;
      for (int64_t i = 0; i < count * hidden_; i += kLine) __builtin_prefetch(from + i, kToWrite, 2);
    }
  }

  // The block's first frame.
  void start(int64_t block) {
    first_ = block * kBlock;
    count_ = std::min(kBlock, a_.coordinates - first_);
    fetch<false>(a_.state, block + 1);
    for_each_plane([&](int64_t plane) { read(a_.state, plane, plane_of(frame(0), plane)); });
    zero_ = true;
    for (int64_t l = 0; l < a_.rule->layers; ++l) {
      const Real* const h = cell.hidden(frame(0), l);
      typename Simd<Real>::Mask any{};
      for (int64_t i = 0; i < hidden_ * kBlock; i += kLanes<Real>) any |= load(h + i) != Vec<Real>{};
      for (int lane = 0; lane < kLanes<Real>; ++lane) zero_ = zero_ && any[lane] == 0;
    }
  }
  void step(int64_t k, Real* next) {
    Real* const grads = cell.grads(frame(k));
    std::copy_n(a_.grads + k * a_.coordinates + first_, count_, grads);
    std::fill(grads + count_, grads + kBlock, Real(0));
    cell.forward(frame(k), gates(k), next, from_zero(k));
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

  // A square whose first coordinate is i and first unit c, `high` coordinates and `wide` units of it: all of
  // the former and kWide of the latter where that is not 0. Half a square is the common rest, of 20 units for
  // instance.
  template <int kWide>
  static Square load_row(const Real* from, int64_t wide) {
    if constexpr (kWide == kSide) return *reinterpret_cast<const Unaligned*>(from);
    if constexpr (kWide == kSide / 2) return load_half_row(from);
    Square row{};
    for (int64_t j = 0; j < wide; ++j) row[j] = from[j];
    return row;
  }
  template <int kWide>
  static void store_row(Square row, int64_t wide, Real* to) {
    if constexpr (kWide == kSide) {
      *reinterpret_cast<Unaligned*>(to) = row;
    } else if constexpr (kWide == kSide / 2) {
      store_half_row(row, to);
    } else {
      for (int64_t j = 0; j < wide; ++j) to[j] = row[j];
    }
  }
  template <int kWide>
  void square_to_lanes(const Real* from, int64_t i, int64_t c, int64_t high, int64_t wide, Real* to) const {
    Square rows[kSide];
#pragma GCC unroll 8
    for (int r = 0; r < kSide; ++r) {
      const bool there = kWide > 0 || r < high;
      rows[r] = there ? load_row<kWide>(from + (i + r) * hidden_ + c, wide) : Square{};
    }
    transpose_block(rows);
#pragma GCC unroll 8
    for (int r = 0; r < kSide; ++r) {
      const bool there = kWide > 0 ? r < kWide : r < wide;
      if (there) *reinterpret_cast<Unaligned*>(to + (c + r) * kBlock + i) = rows[r];
    }
  }
  template <int kWide>
  void square_from_lanes(const Real* from, int64_t i, int64_t c, int64_t high, int64_t wide, Real* to) const {
    Square rows[kSide];
#pragma GCC unroll 8
    for (int r = 0; r < kSide; ++r) {
      const bool there = kWide > 0 ? r < kWide : r < wide;
      rows[r] = there ? *reinterpret_cast<const Unaligned*>(from + (c + r) * kBlock + i) : Square{};
    }
    transpose_block(rows);
#pragma GCC unroll 8
    for (int r = 0; r < kSide; ++r) {
      if (kWide > 0 || r < high) store_row<kWide>(rows[r], wide, to + (i + r) * hidden_ + c);
    }
  }
  // run(width, first coordinate, first unit, coordinates, units) for all squares, the width a constant.
  template <class Run>
  void for_each_square(const Run& run) const {
    for (int64_t i = 0; i < count_; i += kSide) {
      for (int64_t c = 0; c < hidden_; c += kSide) {
        const int64_t high = std::min<int64_t>(kSide, count_ - i),
                      wide = std::min<int64_t>(kSide, hidden_ - c);
        if (high == kSide && wide == kSide) {
          run(std::integral_constant<int, kSide>(), i, c, high, wide);
        } else if (high == kSide && wide == kSide / 2) {
          run(std::integral_constant<int, kSide / 2>(), i, c, high, wide);
        } else {
          run(std::integral_constant<int, 0>(), i, c, high, wide);
        }
      }
    }
  }
  void to_lanes(const Real* from, Real* to) const {
    if (count_ < kBlock) std::fill_n(to, hidden_ * kBlock, Real(0));
    for_each_square([&](auto width, int64_t i, int64_t c, int64_t high, int64_t wide) {
      square_to_lanes<width()>(from, i, c, high, wide, to);
    });
  }
  void from_lanes(const Real* from, Real* to) const {
    for_each_square([&](auto width, int64_t i, int64_t c, int64_t high, int64_t wide) {
      square_from_lanes<width()>(from, i, c, high, wide, to);
    });
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
  int64_t hidden_, first_ = 0, count_ = 0, frames_kept_, gates_kept_;
  bool zero_ = false;
  Carver<Real> carver_;
  Real *frames_, *gates_, *carry_;

 public:
  LstmCell<Real> cell;
};

template <class Real>
int64_t lstm_workspace(const Lstm<Real>& lstm, bool backward) {
  return LstmBlocks<Real>(lstm, backward, nullptr).size();
}

template <class Real>
void lstm_forward(const Lstm<Real>& lstm, int64_t begin, int64_t end, Real* workspace, bool used) {
  LstmBlocks<Real> blocks(lstm, false, workspace);
  if (!used) blocks.cell.pack(false);
  for (int64_t b = begin; b < end; ++b) blocks.forward(b);
}

template <class Real>
void lstm_backward(const Lstm<Real>& lstm, int64_t begin, int64_t end, Real* d_weights, Real* workspace,
                   bool used) {
  LstmBlocks<Real> blocks(lstm, true, workspace);
  if (!used) blocks.cell.pack(true);
  blocks.cell.begin();
  for (int64_t b = begin; b < end; ++b) blocks.backward(b);
  blocks.cell.write_weights(d_weights);
}

template <class Real>
constexpr LstmFunctions<Real> kLstmFunctions{lstm_workspace<Real>, lstm_forward<Real>, lstm_backward<Real>};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
