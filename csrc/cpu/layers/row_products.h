// The two products of matrices whose rows lie evenly apart: linear layers, the LSTM's gates and the prototype
// head are made of them. (multiply.h has those whose rows lie anywhere, for convolutions.)
//
//   run_row_product     c[n, :] = bias + sum_k a[n, k] b[k, :]
//   run_outer_product   d[m, :] = sum_n x[n, m] g[n, :]
//
// each of one pair of factors or two. Scalars of a and x are broadcast, rows of b, c, d, g are whole grains
// (simd.h). A team, which may be null, takes tiles.
#pragma once

#include "multiply.h"
#include "sums.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// Two matrices, (rows, depth) and (depth, columns), whose rows lie so far apart.
template <class Real>
struct Factors {
  const Real *a = nullptr, *b = nullptr;  // null: there are none
  int64_t a_row = 0, b_row = 0, depth = 0;
};

// c[n, :] = bias + sum_k a[n, k] b[k, :], of one pair of factors or two. Rows of c and gate lie c_row apart.
template <class Real>
struct RowProduct {
  Factors<Real> first, second = {};
  Real* c;
  int64_t c_row;
  const Real* bias = nullptr;
  bool add = false;            // to what c holds, in the place of bias
  bool relu = false;           // max(0, .)
  const Real* gate = nullptr;  // not null: 0 where this is not above 0
};

// So many tiles of kRows rows from row `first` on.
template <class Real>
struct RowProductTiles {
  template <int kRows, int kVectors, bool kHalf>
  static void run(const RowProduct<Real>& p, int64_t first, int64_t tiles, int64_t column) {
    const int64_t c_row = p.c_row;
    const Real* const bias = p.bias == nullptr ? nullptr : p.bias + column;
    const auto begin_of = [first](const Factors<Real>& f) {
      return f.a == nullptr ? nullptr : f.a + first * f.a_row;
    };
    const Real *a = begin_of(p.first), *a1 = begin_of(p.second);
    for (int64_t at = first * c_row + column; tiles > 0; --tiles, at += kRows * c_row) {
      Sums<Real, kRows, kVectors, kHalf> sums;
      Shared<Real, kVectors, kHalf> shared;
      if (p.add) {
        sums.load_from([&](int m) { return p.c + at + m * c_row; });
      } else if (bias == nullptr) {
        sums.clear();
      } else {
        sums.load_from([bias](int) { return bias; });
      }
      const auto add = [&](const Factors<Real>& f, const Real*& rows) {
        const int64_t b_row = f.b_row, depth = f.depth;
        const Real* row[kRows];
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) row[m] = rows + m * f.a_row;
        const Real* b = f.b + column;
        for (int64_t k = 0; k < depth; ++k, b += b_row) {
          shared.load_from(b);
          sums.add_products([&](int m) { return row[m][k]; }, shared);
        }
        rows += kRows * f.a_row;
      };
      add(p.first, a);
      if (a1 != nullptr) add(p.second, a1);
      if (p.relu) sums.rectify();
      if (p.gate != nullptr) sums.close([&](int m) { return p.gate + at + m * c_row; });
      sums.store_to([&](int m) { return p.c + at + m * c_row; });
    }
  }
};

// d[m, :] = sum_n x[n, m] g[n, :], and with a second pair + x1[n, m] g1[n, :], or onto what lies like d. Rows
// lie x_row (x, x1), g_row (g, g1) and d_row apart.
template <class Real>
struct OuterProduct {
  const Real *x, *g;
  int64_t x_row, g_row, samples;
  Real* d;
  int64_t d_row;
  const Real *x1 = nullptr, *g1 = nullptr;  // a second pair, unless x1 is null
  Onto<Real> onto = {};
};

template <class Real>
struct OuterProductTiles {
  template <int kRows, int kVectors, bool kHalf>
  static void run(const OuterProduct<Real>& p, int64_t first, int64_t tiles, int64_t column) {
    const int64_t x_row = p.x_row, g_row = p.g_row, d_row = p.d_row, samples = p.samples;
    int64_t at = first * d_row + column;
    for (; tiles > 0; --tiles, first += kRows, at += kRows * d_row) {
      Sums<Real, kRows, kVectors, kHalf> sums;
      Shared<Real, kVectors, kHalf> shared;
      sums.clear();
      const auto add = [&](const Real* x, const Real* g) {
        x += first;
        g += column;
        for (int64_t n = samples; n > 0; --n, x += x_row, g += g_row) {
          shared.load_from(g);
          sums.add_products([&](int m) { return x[m]; }, shared);
        }
      };
      add(p.x, p.g);
      if (p.x1 != nullptr) add(p.x1, p.g1);
      if (p.onto.base != nullptr)
        sums.scale_onto(p.onto.factor, [&](int m) { return p.onto.base + at + m * d_row; });
      sums.store_to([&](int m) { return p.d + at + m * d_row; });
    }
  }
};

// Calls run(rows of a tile, first row, tiles) for tiles begin..end of those cut: first the larger ones.
template <class Run>
inline void for_tiles(const Parts& cut, int64_t begin, int64_t end, const Run& run) {
  const int64_t larger = std::min(end, cut.larger), others = std::max(begin, cut.larger);
  if (begin < larger) run(cut.size + 1, cut.begin(begin), larger - begin);
  if (others < end) run(cut.size, cut.begin(others), end - others);
}

template <class Real>
constexpr TilesOf<Real, void (*)(const RowProduct<Real>&, int64_t, int64_t, int64_t), RowProductTiles<Real>>
    kRowProductTiles{};
template <class Real>
constexpr TilesOf<Real, void (*)(const OuterProduct<Real>&, int64_t, int64_t, int64_t),
                  OuterProductTiles<Real>>
    kOuterProductTiles{};

// All rows and so many columns, whole grains.
template <class Real>
void run_row_product(const Team* team, const RowProduct<Real>& p, int64_t rows, int64_t columns) {
  const Columns<Real> cut(columns);
  const double work = team == nullptr ? 0
                                      : 2.0 * double(rows) * double(p.first.depth) * double(columns) /
                                            double(cut.groups.count);
  for (int64_t group = 0, column = 0; group < cut.groups.count; ++group) {
    const int across = cut.across(group);
    const auto& tiles_of = kRowProductTiles<Real>.of[cut.ends_half(group)][across - 1];
    const Parts tiles(rows, kMostRowsOf.of[across]);
    in_parts(team, tiles.count, work, [&](int64_t begin, int64_t end) {
      for_tiles(tiles, begin, end,
                [&](int64_t high, int64_t row, int64_t count) { tiles_of[high - 1](p, row, count, column); });
    });
    column += across * kLanes<Real>;
  }
}

template <class Real>
void run_outer_product(const Team* team, const OuterProduct<Real>& whole, int64_t rows, int64_t columns) {
  const int64_t bytes = (whole.x_row + whole.g_row) * int64_t(sizeof(Real));
  const double work =
      (whole.x1 == nullptr ? 2.0 : 4.0) * double(whole.samples) * double(rows) * double(columns);
  for_outer_tiles<Real>(team, whole.samples, bytes, rows, columns, work,
                        [&](bool half, int across, int64_t column, int64_t first_sample, int64_t samples,
                            const Parts& tiles, int64_t first, int64_t last) {
                          OuterProduct<Real> p = whole;
                          const auto skip = [&](const Real*& factor, int64_t row) {
                            factor += first_sample * row;
                          };
                          skip(p.x, p.x_row), skip(p.g, p.g_row);
                          if (p.x1 != nullptr) skip(p.x1, p.x_row), skip(p.g1, p.g_row);
                          p.samples = samples;
                          if (first_sample > 0) p.onto.base = p.d;
                          for_tiles(tiles, first, last, [&](int64_t high, int64_t row, int64_t count) {
                            kOuterProductTiles<Real>.of[half][across - 1][high - 1](p, row, count, column);
                          });
                        });
}

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
