// The two products that the prototype head is made of, in differences, where a matrix product would cancel.
//
//   score   s[m, c] = sum_d (q[m, d] - p[d, c])^2                      lanes are classes
//   pull    to[m, :] = sum_k w[m, k] (b[k, :] - a[m, :])               lanes are features
//
// and without differences: s = sum_d q p, and for cosines to = self[m] a[m, :] + sum_k w b. A difference
// costs an addition beside each multiply-add, which many cores do at once with it, and saves the centring of
// queries and means, their squares, and all cancellation: a small distance is as exact as a large one.
#pragma once

#include "layers/multiply.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// Features of a sum before it is put aside: fewer roundings, and the means stay in the cache.
constexpr int64_t kDepth = 256;

template <class Real>
struct Score {
  const Real* q;  // rows of `depth` features
  int64_t q_row;
  const Real* p;  // (depth, p_row)
  int64_t p_row, depth;
  Real* to;  // rows like p's
  bool add;
};

template <class Real, bool kDifference>
struct ScoreTile {
  template <int kRows, int kVectors, bool kHalf>
  static void run(const Score<Real>& s) {
    Sums<Real, kRows, kVectors, kHalf> sums;
    Shared<Real, kVectors, kHalf> shared;
    sums.clear();
    const Real* p = s.p;
    for (int64_t d = 0; d < s.depth; ++d, p += s.p_row) {
      shared.load_from(p);
      const Real* const q = s.q + d;
      const auto scalar = [&](int m) { return q[m * s.q_row]; };
      if constexpr (kDifference) {
        sums.add_squares(scalar, shared);
      } else {
        sums.add_products(scalar, shared);
      }
    }
    const auto row = [&](int m) { return s.to + m * s.p_row; };
    if (s.add) sums.scale_onto(Real(1), row);
    sums.store_to(row);
  }
};

template <class Real, bool kDifference>
constexpr TilesOf<Real, void (*)(const Score<Real>&), ScoreTile<Real, kDifference>> kScoreTiles{};

// to (rows, p_row) for q (rows, ...) and p (features, p_row), of which `columns` lanes are wanted.
template <bool kDifference, class Real>
void score(const Real* q, int64_t q_row, int64_t rows, const Real* p, int64_t p_row, int64_t features,
           int64_t columns, Real* to) {
  const Columns<Real> cut(columns);
  for (int64_t d = 0; d < features; d += kDepth) {
    const int64_t depth = features - d < kDepth ? features - d : kDepth;
    for (int64_t group = 0, column = 0; group < cut.groups.count; ++group) {
      const int across = cut.across(group);
      const auto& tiles_of = kScoreTiles<Real, kDifference>.of[cut.ends_half(group)][across - 1];
      const Parts tiles(rows, kMostRowsOf.of[across]);
      for (int64_t tile = 0, row = 0; tile < tiles.count; ++tile) {
        const int high = tiles.of(tile);
        tiles_of[high - 1]({q + row * q_row + d, q_row, p + d * p_row + column, p_row, depth,
                            to + row * p_row + column, d > 0});
        row += high;
      }
      column += across * kLanes<Real>;
    }
  }
}

// A tile keeps its rows of a beside their sums.
constexpr int kPullRows = 6;
constexpr int kPullVectors = kAccumulators >= 24 ? 2 : 1;

template <class Real>
struct Pull {
  const Real* a;  // (M, columns), its rows a_row apart, and so on
  int64_t a_row;
  const Real* b;  // (K, columns)
  int64_t b_row, count;
  const Real* w;  // (m, k) lies at m * w_row + k * w_step
  int64_t w_row, w_step;
  const Real* self;  // (M,), without differences
  Real* to;          // (M, columns)
  int64_t to_row;
  bool add;
};

template <class Real, int kRows, int kVectors, bool kDifference>
inline void pull_columns(const Pull<Real>& p, int64_t column) {
  using V = Vec<Real>;
  V sum[kRows][kVectors], a[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      a[m][v] = load(p.a + m * p.a_row + column + v * kLanes<Real>);
      sum[m][v] = kDifference ? V{} : p.self[m] * a[m][v];
    }
  }
  const Real *b = p.b + column, *w = p.w;
  for (int64_t k = 0; k < p.count; ++k, b += p.b_row, w += p.w_step) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const V factor = load(b + v * kLanes<Real>);
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        if constexpr (kDifference) {
          sum[m][v] += w[m * p.w_row] * (factor - a[m][v]);
        } else {
          sum[m][v] += w[m * p.w_row] * factor;
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Real* const to = p.to + m * p.to_row + column + v * kLanes<Real>;
      store(to, p.add ? load(to) + sum[m][v] : sum[m][v]);
    }
  }
}

// `columns` of kRows rows, whole vectors.
template <class Real, int kRows, bool kDifference>
void pull_tile(const Pull<Real>& p, int64_t columns) {
  int64_t column = 0;
  for (; column + kPullVectors * kLanes<Real> <= columns; column += kPullVectors * kLanes<Real>)
    pull_columns<Real, kRows, kPullVectors, kDifference>(p, column);
  for (; column < columns; column += kLanes<Real>) pull_columns<Real, kRows, 1, kDifference>(p, column);
}

template <class Real, bool kDifference>
constexpr void (*kPullTiles[kPullRows])(const Pull<Real>&, int64_t) = {
    pull_tile<Real, 1, kDifference>, pull_tile<Real, 2, kDifference>, pull_tile<Real, 3, kDifference>,
    pull_tile<Real, 4, kDifference>, pull_tile<Real, 5, kDifference>, pull_tile<Real, 6, kDifference>};

// All rows, a panel of `panel` columns at a time: few, and b's stay in the cache over all tiles; all, and the
// rows of a and `to` stream.
template <bool kDifference, class Real>
void pull(const Pull<Real>& all, int64_t rows, int64_t columns, int64_t panel) {
  const Parts tiles(rows, kPullRows);
  for (int64_t column = 0; column < columns; column += panel) {
    const int64_t wide = columns - column < panel ? columns - column : panel;
    Pull<Real> p = all;
    p.a += column, p.b += column, p.to += column;
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const int high = tiles.of(tile);
      kPullTiles<Real, kDifference>[high - 1](p, wide);
      p.a += high * p.a_row, p.w += high * p.w_row, p.to += high * p.to_row;
      if (!kDifference) p.self += high;
    }
  }
}

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
