// out(m, n) = sum over k of a(m, k) b(k, n) for each task, and with a second pair of factors the sum over
// both: the one product that linear and convolution layers are made of, outputs, gradients and tangents alike
// (conv.cu). Overwrites.
//
// Each of m, k and n may be three indices in one - a pixel's sample, row and column; a tap's row, column and
// channel -, so that a convolution is a product of values as they lie, and nothing is unfolded in memory.
//
// A block makes a tile of 4096 outputs, a thread 4 x 4 of them; the factors pass through shared memory, 16 of
// k at a time, and of floats a sum of 16 comes first, for the rounding. A thread sums in the order of k: the
// bits hang on the sizes alone. Any grid covers all.
//
// Large products of plain matrices may go by a library, cuBLAS on a device (../../batched_product.h), which
// conv.cu then starts in this kernel's place; finish_product_kernel does to its sums what is left.
// Tested by tests/simt/test_kernels.py and, with a library's product, tests/engine/test_batched_product.py.
#pragma once

#include "elements.cuh"

namespace metafast::METAFAST_GPU {

constexpr int kProductThreads = 256, kProductDeep = 16;
constexpr int kProductSide = 4;  // of a thread's outputs
constexpr int64_t kMostProduct = int64_t(1)
                                 << 30;  // indices and offsets within a task: ints, with room to spare

// Whether sums of 16 come first. Doubles have digits enough, and no registers to spare.
template <class Real>
constexpr bool kInParts = sizeof(Real) < sizeof(double);

// Divides numbers below 2^31 by one: a multiplication, where a GPU's division takes some twenty instructions.
struct Divisor {
  unsigned by = 1, multiplier = 0, shift = 0;

  Divisor() : Divisor(1) {}
  // With 2^bits >= by, multiplier = (2^(31 + bits) + e) / by where 0 < e <= 2^bits: the quotient is too large
  // by less than 1 / by.
  explicit Divisor(int64_t divisor) : by(unsigned(divisor)), shift(31) {
    while ((int64_t(1) << (shift - 31)) < divisor) ++shift;
    multiplier = unsigned((uint64_t(1) << shift) / by + 1);
  }
  __device__ unsigned quotient(unsigned n) const { return unsigned(uint64_t(n) * multiplier >> shift); }
};

// Where the elements of an index lie that is three in one, (i0 * size1 + i1) * size2 + i2.
struct Axis {
  int origin = 0, step0 = 0, step1 = 0, step2 = 0;
  Divisor size1, size2;

  __device__ int at(int index) const {
    if (size1.by == 1 && size2.by == 1) return origin + index * step0;
    const unsigned high = size2.quotient(unsigned(index)), i2 = unsigned(index) - high * size2.by;
    const unsigned i0 = size1.quotient(high), i1 = high - i0 * size1.by;
    return origin + int(i0) * step0 + int(i1) * step1 + int(i2) * step2;
  }
};

// By value, as the kernel takes it.
template <class Real>
struct Product {
  int64_t tasks;
  int rows, columns, depth;   // of the factors
  int out_rows, out_columns;  // what is written, zeros beyond rows and columns
  bool ones;                  // but a has one row more, of ones in the first pair
  int pairs;
  Batch<const Real> a[2], b[2];  // a second pair lies as the first
  Axis a_row, a_depth, b_depth, b_column;
  Batch<Real> out;
  Axis out_row;
  Batch<const Real> bias;  // (columns,), what sums start from; null: 0
  bool relu;               // max(0, .)
  Batch<const Real> gate;  // lies as out does: 0 where it is not above 0; null: none

  __device__ int column_tiles(int wide) const { return (out_columns + wide - 1) / wide; }
  __device__ int row_tiles(int high) const { return (out_rows + high - 1) / high; }
};

template <class Real>
struct alignas(16) Quad {
  Real v[4];
};

// A thread's share of a factor's way into shared memory, kSide rows or columns at a time. Threads beside each
// other take elements beside each other along the depth, or the side, whichever lies so in memory.
template <class Real, int kSide, bool kAlongDepth>
class Loader {
  static constexpr int kFast = kAlongDepth ? kProductDeep : kSide, kStep = kProductThreads / kFast;
  static constexpr int kCount = kSide * kProductDeep / kProductThreads;
  static constexpr int kSides = kAlongDepth ? kCount : 1, kDepths = kAlongDepth ? 1 : kCount;
  static_assert(kFast * kStep == kProductThreads && kCount >= 1);

 public:
  using Tile = Quad<Real>[kProductDeep][kSide / 4 + 1];  // a Quad more spreads the writes over banks

  // For `first` and those after it, of which `end` is the first that is not there and `ones`, if any, is 1.
  __device__ Loader(const Axis& axis, int first, int end, int ones)
      : fast_(int(threadIdx.x) % kFast),
        slow_(int(threadIdx.x) / kFast),
        left_(end - first),
        ones_(ones - first) {
#pragma unroll
    for (int i = 0; i < kSides; ++i) at_[i] = axis.at(first + side(i));
  }
  __device__ void load(const Real* from, const Axis& axis, int first, int end, Real one, Tile& to) const {
#pragma unroll
    for (int i = 0; i < kDepths; ++i) {
      const int deep = kAlongDepth ? fast_ : slow_ + i * kStep;
      const bool there = first + deep < end;
      const int at = axis.at(first + deep);
#pragma unroll
      for (int j = 0; j < kSides; ++j) {
        const int s = side(j);
        Real x = there && s < left_ ? from[at_[j] + at] : Real(0);
        if (there && s == ones_) x = one;
        to[deep][s / 4].v[s % 4] = x;
      }
    }
  }

 private:
  __device__ int side(int i) const { return kAlongDepth ? slow_ + i * kStep : fast_; }

  int fast_, slow_, left_, ones_;
  int at_[kSides];
};

// kWide columns of a tile, two blocks of a multiprocessor: at 128 registers nothing spills. kADeep, kBDeep:
// a's, b's neighbours in memory are those along the depth.
template <class Real, int kWide, bool kADeep, bool kBDeep>
__global__ void __launch_bounds__(kProductThreads, 2) product_kernel(const Product<Real> p) {
  constexpr int kSide = kProductSide, kAcross = kWide / kSide, kHigh = kProductThreads / kAcross * kSide;
  using ALoader = Loader<Real, kHigh, kADeep>;
  using BLoader = Loader<Real, kWide, kBDeep>;
  METAFAST_SHARED(typename ALoader::Tile, a_tile);
  METAFAST_SHARED(typename BLoader::Tile, b_tile);
  const int across = int(threadIdx.x) % kAcross, down = int(threadIdx.x) / kAcross;
  const int wide = p.column_tiles(kWide);
  const int64_t tiles = int64_t(wide) * p.row_tiles(kHigh);
  for (int64_t index = blockIdx.x; index < p.tasks * tiles; index += gridDim.x) {
    const int64_t t = index / tiles;
    const int tile = int(index - t * tiles), row_0 = tile / wide * kHigh, column_0 = tile % wide * kWide;
    const int row = row_0 + down * kSide, column = column_0 + across * kSide;  // the thread's first
    const int rows = p.rows + (p.ones ? 1 : 0);
    const bool mine = row < rows && column < p.columns;
    Real sums[kSide][kSide] = {};
    if (!p.bias.null() && mine) {
#pragma unroll
      for (int j = 0; j < kSide; ++j) {
        const Real bias = column + j < p.columns ? p.bias.of(t)[column + j] : Real(0);
#pragma unroll
        for (int i = 0; i < kSide; ++i) sums[i][j] = bias;
      }
    }
    const ALoader a(p.a_row, row_0, p.rows, p.ones ? p.rows : -1);
    const BLoader b(p.b_column, column_0, p.columns, -1);
    for (int pair = 0; pair < p.pairs && row_0 < rows; ++pair) {
      const Real *const from_a = p.a[pair].of(t), *const from_b = p.b[pair].of(t);
      const Real one = pair == 0 ? Real(1) : Real(0);
      for (int first = 0; first < p.depth; first += kProductDeep) {
        __syncthreads();  // all have read what is there
        a.load(from_a, p.a_depth, first, p.depth, one, a_tile);
        b.load(from_b, p.b_depth, first, p.depth, Real(0), b_tile);
        __syncthreads();
        if (!mine) continue;
        Real parts[kSide][kSide] = {};
        Real(&to)[kSide][kSide] = kInParts<Real> ? parts : sums;
#pragma unroll
        for (int k = 0; k < kProductDeep; ++k) {
          const Quad<Real> x = a_tile[k][down], y = b_tile[k][across];
#pragma unroll
          for (int i = 0; i < kSide; ++i) {
#pragma unroll
            for (int j = 0; j < kSide; ++j) to[i][j] += x.v[i] * y.v[j];
          }
        }
        if constexpr (kInParts<Real>) {
#pragma unroll
          for (int i = 0; i < kSide; ++i) {
#pragma unroll
            for (int j = 0; j < kSide; ++j) sums[i][j] += parts[i][j];
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      if (row + i >= p.out_rows) break;
      const int at = p.out_row.at(row + i) + column;
#pragma unroll
      for (int j = 0; j < kSide; ++j) {
        if (column + j >= p.out_columns) break;
        Real sum = sums[i][j];
        // What a NaN would close stays open, so that it is seen.
        if (p.relu && sum <= 0) sum = 0;
        if (!p.gate.null() && p.gate.of(t)[at + j] <= 0) sum = 0;
        p.out.of(t)[at + j] = sum;
      }
    }
  }
}

// What product_kernel does to sums after the factors, where a library made them in p.out: bias, relu, gate,
// and zeros in the columns beyond p.columns.
template <class Real>
__global__ void __launch_bounds__(kElementThreads, 1) finish_product_kernel(const Product<Real> p) {
  for_each_element(p.tasks, int64_t(p.rows) * p.out_columns, [&](int64_t t, int64_t index) {
    const int row = int(index / p.out_columns), column = int(index - int64_t(row) * p.out_columns);
    const int at = p.out_row.at(row) + column;
    Real sum = column < p.columns ? p.out.of(t)[at] : Real(0);
    if (!p.bias.null() && column < p.columns) sum += p.bias.of(t)[column];
    // What a NaN would close stays open, so that it is seen.
    if (p.relu && sum <= 0) sum = 0;
    if (!p.gate.null() && p.gate.of(t)[at] <= 0) sum = 0;
    p.out.of(t)[at] = sum;
  });
}

}  // namespace metafast::METAFAST_GPU
