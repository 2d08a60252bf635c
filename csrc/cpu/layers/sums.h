// The accumulators of a register tile: kRows x kVectors of them, to which a tile adds products of a scalar
// for each row and vectors that all rows share.
//
// The last vector may be half of one, where 40 lanes are 2 1/2 of AVX-512's: two rows' halves then share a
// register, so that no half of a multiply-add is idle.
#pragma once

#include "simd.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// The vectors that all rows of a tile share; a half one lies in `half_twice` two times.
template <class Real, int kVectors, bool kHalf>
struct Shared {
  static constexpr int kWhole = kVectors - (kHalf ? 1 : 0);
  Vec<Real> whole[kWhole > 0 ? kWhole : 1], half_twice;

  inline void load_from(const Real* p) {
#pragma GCC unroll 16
    for (int v = 0; v < kWhole; ++v) whole[v] = load(p + v * kLanes<Real>);
    if constexpr (kHalf) half_twice = twice(p + kWhole * kLanes<Real>);
  }
};

template <class Real, int kRows, int kVectors, bool kHalf>
struct Sums {
  using V = Vec<Real>;
  static constexpr int kWhole = kVectors - (kHalf ? 1 : 0), kPairs = kHalf ? (kRows + 1) / 2 : 0;
  static constexpr int kHalfAt = kWhole * kLanes<Real>;
  V whole[kRows][kWhole > 0 ? kWhole : 1], pair[kPairs > 0 ? kPairs : 1];

  // at(m): where row m lies.
  template <class At>
  inline void load_from(const At& at) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
      for (int v = 0; v < kWhole; ++v) whole[m][v] = load(at(m) + v * kLanes<Real>);
    }
    if constexpr (kHalf) {
#pragma GCC unroll 16
      for (int p = 0; p < kPairs; ++p) pair[p] = halves_at(at, p);
    }
  }
  template <class At>
  inline void store_to(const At& at) const {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
      for (int v = 0; v < kWhole; ++v) store(at(m) + v * kLanes<Real>, whole[m][v]);
      if constexpr (kHalf)
        store_half(at(m) + kHalfAt, m % 2 == 0 ? low_half(pair[m / 2]) : high_half(pair[m / 2]));
    }
  }
  inline void clear() {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
      for (int v = 0; v < kWhole; ++v) whole[m][v] = V{};
    }
#pragma GCC unroll 16
    for (int p = 0; p < kPairs; ++p) pair[p] = V{};
  }
  // Row m += x(m) * shared.
  template <class Scalar>
  inline void add_products(const Scalar& x, const Shared<Real, kVectors, kHalf>& shared) {
    add(x, shared, [](V& sum, V scalar, V vector) { sum += scalar * vector; });
  }
  // Row m += (x(m) - shared)^2.
  template <class Scalar>
  inline void add_squares(const Scalar& x, const Shared<Real, kVectors, kHalf>& shared) {
    add(x, shared, [](V& sum, V scalar, V vector) {
      const V difference = scalar - vector;
      sum += difference * difference;
    });
  }
  // What lies at(m) + factor * row m.
  template <class At>
  inline void scale_onto(Real factor, const At& at) {
    const V by = splat(factor);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
      for (int v = 0; v < kWhole; ++v) whole[m][v] = load(at(m) + v * kLanes<Real>) + by * whole[m][v];
    }
#pragma GCC unroll 16
    for (int p = 0; p < kPairs; ++p) {
      if constexpr (kHalf) pair[p] = halves_at(at, p) + by * pair[p];
    }
  }
  // Zero where what lies at(m) is <= 0: where that is NaN, things stay as they are.
  template <class At>
  inline void close(const At& at) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
      for (int v = 0; v < kWhole; ++v)
        whole[m][v] = load(at(m) + v * kLanes<Real>) <= V{} ? V{} : whole[m][v];
    }
    if constexpr (kHalf) {
#pragma GCC unroll 16
      for (int p = 0; p < kPairs; ++p) pair[p] = halves_at(at, p) <= V{} ? V{} : pair[p];
    }
  }
  // max(0, .)
  inline void rectify() {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
      for (int v = 0; v < kWhole; ++v) whole[m][v] = whole[m][v] <= V{} ? V{} : whole[m][v];
    }
#pragma GCC unroll 16
    for (int p = 0; p < kPairs; ++p) pair[p] = pair[p] <= V{} ? V{} : pair[p];
  }

 private:
  // combine(a vector of row m, x(m) in all lanes, the vector that all rows share)
  template <class Scalar, class Combine>
  inline void add(const Scalar& x, const Shared<Real, kVectors, kHalf>& shared, const Combine& combine) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; m += 2) {
      const V even = splat(x(m));
#pragma GCC unroll 16
      for (int v = 0; v < kWhole; ++v) combine(whole[m][v], even, shared.whole[v]);
      V halves = even;
      if (m + 1 < kRows) {
        const V odd = splat(x(m + 1));
#pragma GCC unroll 16
        for (int v = 0; v < kWhole; ++v) combine(whole[m + 1][v], odd, shared.whole[v]);
        if constexpr (kHalf) halves = high_from(odd, even);
      }
      if constexpr (kHalf) combine(pair[m / 2], halves, shared.half_twice);
    }
  }
  // The half vectors of rows 2 p and, if there is one, 2 p + 1.
  template <class At>
  static V halves_at(const At& at, int p) {
    const int odd = 2 * p + 1 < kRows ? 2 * p + 1 : 2 * p;
    return join_halves<Real>(load_half(at(2 * p) + kHalfAt), load_half(at(odd) + kHalfAt));
  }
};

// How many vectors a tile has across: few enough that enough rows fit besides. With few registers usually
// two, and three where one would be left over.
constexpr int kUsualVectors = kAccumulators >= 24 ? 4 : 2;
constexpr int kMostVectors = kAccumulators >= 24 ? 4 : 3;
constexpr int kMostRows = 12;
constexpr int most_rows(int vectors) {
  return kAccumulators / vectors < kMostRows ? kAccumulators / vectors : kMostRows;
}

// A function for each shape of tile, Of::template run<kRows, kVectors, kHalf>:
// [last vector is half][vectors - 1][rows - 1], null where a tile would not fit in registers.
template <class Real, class Function, class Of>
struct TilesOf {
  Function of[2][kMostVectors][kMostRows] = {};

  constexpr TilesOf() {
    fill<1, 1, false>();
    if constexpr (kGrain<Real> < kLanes<Real>) fill<1, 1, true>();
  }
  template <int kRows, int kVectors, bool kHalf>
  constexpr void fill() {
    of[kHalf][kVectors - 1][kRows - 1] = Of::template run<kRows, kVectors, kHalf>;
    if constexpr (kRows < most_rows(kVectors)) {
      fill<kRows + 1, kVectors, kHalf>();
    } else if constexpr (kVectors < kMostVectors) {
      fill<1, kVectors + 1, kHalf>();
    }
  }
};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
