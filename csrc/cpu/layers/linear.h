// Linear layers, rows of features times a matrix.
//
//   y[n, :] = b + sum_c x[n, c] w[c, :]
//   bwd    dw[c, :] = sum_n x[n, c] dy[n, :],  db = sum_n dy;  dx[n, :] = sum_o dy[n, o] w^T[o, :]
//   tfwd   ty = tb + x tw + tx w
//   tbwd   tdw = x tdy + tx dy,  tdb = sum_n tdy;  tdx = tdy w^T + dy tw^T
//
// The layer may have a ReLU's part (program.h, `relu` and `gated`): y = max(0, .), ty = 0 where y is 0; dx =
// tdx = 0 where x is. Where only a batch normalisation reads y, which takes out what b adds, db = tdb = 0.
// Parameters: w as [C of x][pixel of y], then b [pixel of y] where there is one. saved, tsaved: w and tw
// transposed, [C of y][pixel of x], where dx is wanted. Networks of few and narrow layers spend their time
// between the products rather than in them: nothing here is general that need not be. Tested by
// tests/engine/test_layers.py.
#pragma once

#include "call.h"
#include "multiply.h"
#include "sums.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// Two matrices, (rows, depth) and (depth, columns), whose rows lie so far apart.
template <class Real>
struct Factors {
  const Real *a, *b;  // null: there are none
  int64_t a_row, b_row, depth;
};

// c[n, :] = bias + sum_k a[n, k] b[k, :], of one pair of factors or two. Rows of c and gate lie c_row apart.
template <class Real>
struct RowProduct {
  Factors<Real> first, second;
  const Real* bias;  // null: 0
  bool add;          // to what c holds, in the place of bias
  bool relu;         // max(0, .)
  const Real* gate;  // not null: 0 where this is not above 0
  Real* c;
  int64_t c_row;
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

// d[m, :] = sum_n x[n, m] g[n, :], and with a second pair + x1[n, m] g1[n, :]. Rows lie x_row (x, x1), g_row
// (g, g1) and d_row apart.
template <class Real>
struct OuterProduct {
  const Real *x, *g, *x1, *g1;
  int64_t x_row, g_row, samples;
  Real* d;
  int64_t d_row;
  bool add;  // to what is there
};

template <class Real>
struct OuterProductTiles {
  template <int kRows, int kVectors, bool kHalf>
  static void run(const OuterProduct<Real>& p, int64_t first, int64_t tiles, int64_t column) {
    const int64_t x_row = p.x_row, g_row = p.g_row, d_row = p.d_row, samples = p.samples;
    Real* d = p.d + first * d_row + column;
    for (; tiles > 0; --tiles, first += kRows, d += kRows * d_row) {
      Sums<Real, kRows, kVectors, kHalf> sums;
      Shared<Real, kVectors, kHalf> shared;
      const auto row = [&](int m) { return d + m * d_row; };
      if (p.add) {
        sums.load_from(row);
      } else {
        sums.clear();
      }
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
      sums.store_to(row);
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
  const double work = 2.0 * double(rows) * double(p.first.depth) * double(columns) / double(cut.groups.count);
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
                          p.add = whole.add || first_sample > 0;
                          for_tiles(tiles, first, last, [&](int64_t high, int64_t row, int64_t count) {
                            kOuterProductTiles<Real>.of[half][across - 1][high - 1](p, row, count, column);
                          });
                        });
}

// The sizes of a call, and its pointers at the first sample.
template <class Real>
struct LinearCall {
  const Call<Real>& c;
  int64_t from, to;       // a sample of x, of y
  int64_t x_at, y_at;     // where the first lies
  int64_t inputs, lanes;  // C of x; lanes of a row of w

  explicit LinearCall(const Call<Real>& call)
      : c(call),
        from(call.in->sample),
        to(call.out->sample),
        x_at(call.in->origin),
        y_at(call.out->origin),
        inputs(call.in->c),
        lanes(call.out->pixel) {}

  const Real* bias(const Real* w) const { return c.layer->bias ? w + inputs * lanes : nullptr; }

  // Factors of outputs, x w; and of input gradients, dy wt. None where x or dy is null.
  Factors<Real> forth(const Real* x, const Real* w) const {
    return {x == nullptr ? nullptr : x + x_at, w, from, lanes, inputs};
  }
  Factors<Real> back(const Real* dy, const Real* wt) const {
    return {dy == nullptr ? nullptr : dy + y_at, wt, to, c.in->pixel, c.out->c};
  }

  // y = bias + x w (+ x1 w1)
  void outputs(const Factors<Real>& first, const Factors<Real>& second, const Real* b, bool relu,
               const Real* gate, Real* y) const {
    run_row_product<Real>(
        c.team, {first, second, b, false, relu, gate == nullptr ? nullptr : gate + y_at, y + y_at, to},
        c.samples, lanes_of<Real>(c.out->c));
  }
  // dw = x^T dy (+ x1^T dy1), db = sum dy
  void weight_gradient(const Real* x, const Real* dy, const Real* x1, const Real* dy1, Real* dw) const {
    const bool both = x1 != nullptr;
    run_outer_product<Real>(c.team,
                            {x + x_at, dy + y_at, both ? x1 + x_at : nullptr, both ? dy1 + y_at : nullptr,
                             from, to, c.samples, dw, lanes, false},
                            inputs, lanes_of<Real>(c.out->c));
    if (!c.layer->bias) return;
    Real* const db = dw + inputs * lanes;
    for (int64_t lane = 0; lane < lanes; lane += kLanes<Real>) store(db + lane, Vec<Real>{});
    if (!c.layer->bias_cancels) add_rows_to(dy + y_at, c.samples, to, lanes, db);
  }
  // dx = dy wt (+ dy1 wt1)
  void input_gradient(const Factors<Real>& first, const Factors<Real>& second, Real* dx) const {
    run_row_product<Real>(
        c.team,
        {first, second, nullptr, false, false, c.layer->gated ? c.x + x_at : nullptr, dx + x_at, from},
        c.samples, lanes_of<Real>(c.in->c));
  }
  void transposed(const Real* w, Real* wt) const { transpose(w, inputs, c.out->c, lanes, wt, c.in->pixel); }
};

template <class Real>
void linear_fwd(const Call<Real>& c) {
  const LinearCall<Real> l(c);
  l.outputs(l.forth(c.x, c.w), {}, l.bias(c.w), c.layer->relu != 0, nullptr, c.y);
}

template <class Real>
void linear_bwd(const Call<Real>& c) {
  const LinearCall<Real> l(c);
  if (c.dw != nullptr) l.weight_gradient(c.x, c.dy, nullptr, nullptr, c.dw);
  if (c.dx == nullptr) return;
  if (!c.w_is_known) l.transposed(c.w, c.saved);
  l.input_gradient(l.back(c.dy, c.saved), {}, c.dx);
}

template <class Real>
void linear_tfwd(const Call<Real>& c) {
  const LinearCall<Real> l(c);
  l.outputs(l.forth(c.x, c.tw), l.forth(c.tx, c.w), l.bias(c.tw), false, c.layer->relu ? c.y : nullptr, c.ty);
}

template <class Real>
void linear_tbwd(const Call<Real>& c) {
  const LinearCall<Real> l(c);
  l.weight_gradient(c.x, c.tdy, c.tx, c.dy, c.tdw);
  if (c.tdx == nullptr) return;
  l.transposed(c.tw, c.tsaved);
  l.input_gradient(l.back(c.tdy, c.saved), l.back(c.dy, c.tsaved), c.tdx);
}

template <class Real>
constexpr LayerFunctions<Real> kLinear{Split::inside, linear_fwd<Real>, linear_bwd<Real>, linear_tfwd<Real>,
                                       linear_tbwd<Real>};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
