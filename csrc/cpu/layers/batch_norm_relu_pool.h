// Batch normalisation, ReLU and k x k max-pooling of stride k in one layer (k = 1: no pooling), since between
// them they would only move memory. With the letters of batch_norm.h, for the window of each output pixel:
//
//   y = max(0, max_j (gamma xhat_j + beta)),  taken at j = a, the first of equals;  alive where y > 0
//   bwd    dh = dy where alive, else 0;  db = sum dh,  dg = sum dh xhat_a
//          dx_j = gamma r u_j,  u_j = [j = a] dh - db / M - xhat_j dg / M
//   tfwd   ty = tgamma xhat_a + gamma txhat_a + tbeta where alive, else 0
//   tbwd   tdh = tdy where alive, else 0;  tdb = sum tdh,  tdg = sum (tdh xhat_a + dh txhat_a)
//          tu_j = [j = a] tdh - tdb / M - txhat_j dg / M - xhat_j tdg / M
//          tdx_j = gamma r tu_j + (tgamma - gamma r c) r u_j
//
// The sums of the backward functions run over output pixels alone. Pixels that no window covers count in the
// statistics. engine/build.cpp puts this layer in the place of the three. Parameters as batch_norm.h, always
// affine. saved: mean, r, db / M, dg / M, [pixel] each, then for each output pixel xhat_a and a (-1: not
// alive), [pixel] each; tsaved: mean tx, c, two unused, then for each output pixel txhat_a and one unused.
// All four overwrite. Tested by tests/engine/test_layers.py.
#pragma once

#include "batch_norm.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// Rows of pixels with one vector of channels at a time, so that what belongs to the channel stays in
// registers. Calls row(n, i, lane) for i in 0..h-1.
template <class Real, class Row>
inline void for_each_channel_row(int64_t samples, int64_t h, int64_t lanes, const Row& row) {
  for (int64_t n = 0; n < samples; ++n) {
    for (int64_t i = 0; i < h; ++i) {
      for (int64_t lane = 0; lane < lanes; lane += kLanes<Real>) row(n, i, lane);
    }
  }
}

template <class Real>
struct PooledNorm : BatchNorm<Real> {
  using V = Vec<Real>;
  const Call<Real>& c;
  int64_t window, lanes, plane;  // k; lanes in use; elements of one pooled plane

  explicit PooledNorm(const Call<Real>& call)
      : BatchNorm<Real>(call),
        c(call),
        window(call.layer->kernel_h),
        lanes(lanes_of<Real>(call.in->c)),
        plane(call.samples * call.out->h * call.out->w * call.in->pixel) {}

  // For output pixel (n, i, 0), lane: xhat_a, a, and after tfwd txhat_a; pixels are `pixel` apart.
  int64_t pooled(int64_t n, int64_t i, int64_t lane) const {
    return (n * c.out->h + i) * c.out->w * this->pixel + lane;
  }
  Real* chosen() const { return c.saved + 4 * this->pixel; }
  Real* place() const { return chosen() + plane; }
  Real* tchosen() const { return c.tsaved + 4 * this->pixel; }
  int64_t in_row(int64_t n, int64_t i, int64_t lane) const {
    return c.in->origin + n * c.in->sample + i * c.in->row + lane;
  }
  int64_t out_row(int64_t n, int64_t i, int64_t lane) const {
    return c.out->origin + n * c.out->sample + i * c.out->row + lane;
  }

  // Calls f(offset of the pixel in x, window's number in its row or -1, place in the window) along row i.
  template <class F>
  void along(int64_t n, int64_t i, int64_t lane, const F& f) const {
    const int64_t covered = i / window < c.out->h ? c.out->w * window : 0;
    int64_t at = in_row(n, i, lane), j = 0;
    const int64_t first = i % window * window;
    for (int64_t w = 0; j < covered; ++w) {
      for (int64_t k = 0; k < window; ++k, ++j, at += this->pixel) f(at, w, Real(first + k));
    }
    for (; j < c.in->w; ++j, at += this->pixel) f(at, int64_t(-1), Real(0));
  }
};

template <class Real>
void batch_norm_relu_pool_fwd(const Call<Real>& c) {
  using V = Vec<Real>;
  const PooledNorm<Real> bn(c);
  batch_norm_statistics(c, bn);
  const int64_t k = bn.window, pixel = bn.pixel;
  Real *const chosen = bn.chosen(), *const place = bn.place();
  for_each_channel_row<Real>(c.samples, c.out->h, bn.lanes, [&](int64_t n, int64_t i, int64_t lane) {
    const V mean = load(bn.mean + lane), r = load(bn.r + lane), gamma = bn.gamma(lane), beta = bn.beta(lane);
    int64_t to = bn.out_row(n, i, lane), at = bn.pooled(n, i, lane);
    for (int64_t j = 0; j < c.out->w; ++j, to += pixel, at += pixel) {
      V best = splat(-Real(__builtin_inf())), best_xhat{}, best_place = splat(Real(-1));
      for (int64_t u = 0; u < k; ++u) {
        int64_t from = bn.in_row(n, i * k + u, lane) + j * k * pixel;
        for (int64_t v = 0; v < k; ++v, from += pixel) {
          const V xhat = (load(c.x + from) - mean) * r, value = gamma * xhat + beta;
          const auto better = ~(value <= best);  // also where it is NaN, which must not be lost
          best = select(better, value, best);
          best_xhat = select(better, xhat, best_xhat);
          best_place = select(better, splat(Real(u * k + v)), best_place);
        }
      }
      const auto alive = ~(best <= V{});
      store(c.y + to, select(alive, best, V{}));
      store(chosen + at, best_xhat);
      store(place + at, select(alive, best_place, splat(Real(-1))));
    }
  });
}

template <class Real>
void batch_norm_relu_pool_bwd(const Call<Real>& c) {
  using V = Vec<Real>;
  const PooledNorm<Real> bn(c);
  const int64_t pixel = bn.pixel;
  const Real *const chosen = bn.chosen(), *const place = bn.place();
  for (int64_t lane = 0; lane < pixel; lane += kLanes<Real>) {
    V db{}, dg{};
    for (int64_t n = 0; n < c.samples; ++n) {
      for (int64_t i = 0; i < c.out->h; ++i) {
        V row_db{}, row_dg{};
        int64_t from = bn.out_row(n, i, lane), at = bn.pooled(n, i, lane);
        for (int64_t j = 0; j < c.out->w; ++j, from += pixel, at += pixel) {
          const V dh = select(load(place + at) >= V{}, load(c.dy + from), V{});
          row_db += dh;
          row_dg += dh * load(chosen + at);
        }
        db += row_db;
        dg += row_dg;
      }
    }
    store(bn.db + lane, db * bn.per_pixel);
    store(bn.dg + lane, dg * bn.per_pixel);
    if (c.dw == nullptr) continue;
    store(c.dw + lane, dg);
    store(c.dw + pixel + lane, db);
  }
  if (c.dx == nullptr) return;
  for_each_channel_row<Real>(c.samples, c.in->h, bn.lanes, [&](int64_t n, int64_t i, int64_t lane) {
    const V mean = load(bn.mean + lane), r = load(bn.r + lane), scale = bn.gamma(lane) * r;
    const V db = load(bn.db + lane), dg = load(bn.dg + lane) * r;
    const int64_t from = bn.out_row(n, i / bn.window, lane), at = bn.pooled(n, i / bn.window, lane);
    bn.along(n, i, lane, [&](int64_t x, int64_t w, Real here) {
      V u = -db - (load(c.x + x) - mean) * dg;
      if (w >= 0)
        u += select(load(place + at + w * pixel) == splat(here), load(c.dy + from + w * pixel), V{});
      store(c.dx + x, scale * u);
    });
  });
}

template <class Real>
void batch_norm_relu_pool_tfwd(const Call<Real>& c) {
  using V = Vec<Real>;
  const PooledNorm<Real> bn(c);
  const int64_t k = bn.window, pixel = bn.pixel;
  const Real *const chosen = bn.chosen(), *const place = bn.place();
  Real* const tchosen = bn.tchosen();
  const bool moves = c.tx != nullptr;
  if (moves) batch_norm_tangent_statistics(c, bn);
  for_each_channel_row<Real>(c.samples, c.out->h, bn.lanes, [&](int64_t n, int64_t i, int64_t lane) {
    const V gamma = bn.gamma(lane), tgamma = bn.tgamma(lane), tbeta = bn.tbeta(lane), r = load(bn.r + lane);
    const V tmean = moves ? load(bn.tmean + lane) : V{}, tc = moves ? load(bn.tc + lane) : V{};
    int64_t to = bn.out_row(n, i, lane), at = bn.pooled(n, i, lane);
    for (int64_t j = 0; j < c.out->w; ++j, to += pixel, at += pixel) {
      const V a = load(place + at), xhat = load(chosen + at);
      V txhat{};
      if (moves) {
        V tx{};
        for (int64_t u = 0; u < k; ++u) {
          int64_t from = bn.in_row(n, i * k + u, lane) + j * k * pixel;
          for (int64_t v = 0; v < k; ++v, from += pixel)
            tx = select(a == splat(Real(u * k + v)), load(c.tx + from), tx);
        }
        txhat = r * (tx - tmean - xhat * tc);
      }
      store(tchosen + at, txhat);
      store(c.ty + to, select(a >= V{}, tgamma * xhat + gamma * txhat + tbeta, V{}));
    }
  });
}

template <class Real>
void batch_norm_relu_pool_tbwd(const Call<Real>& c) {
  using V = Vec<Real>;
  const PooledNorm<Real> bn(c);
  const int64_t pixel = bn.pixel;
  const Real *const chosen = bn.chosen(), *const place = bn.place(), *const tchosen = bn.tchosen();
  Real *const tdb_of = c.scratch, *const tdg_of = c.scratch + pixel;
  for (int64_t lane = 0; lane < pixel; lane += kLanes<Real>) {
    V tdb{}, tdg{};
    for (int64_t n = 0; n < c.samples; ++n) {
      for (int64_t i = 0; i < c.out->h; ++i) {
        V row_tdb{}, row_tdg{};
        int64_t from = bn.out_row(n, i, lane), at = bn.pooled(n, i, lane);
        for (int64_t j = 0; j < c.out->w; ++j, from += pixel, at += pixel) {
          const auto alive = load(place + at) >= V{};
          const V tdh = select(alive, load(c.tdy + from), V{}), dh = select(alive, load(c.dy + from), V{});
          row_tdb += tdh;
          row_tdg += tdh * load(chosen + at) + dh * load(tchosen + at);
        }
        tdb += row_tdb;
        tdg += row_tdg;
      }
    }
    store(tdb_of + lane, tdb * bn.per_pixel);
    store(tdg_of + lane, tdg * bn.per_pixel);
    store(c.tdw + lane, tdg);
    store(c.tdw + pixel + lane, tdb);
  }
  if (c.tdx == nullptr) return;
  const bool moves = c.tx != nullptr;
  for_each_channel_row<Real>(c.samples, c.in->h, bn.lanes, [&](int64_t n, int64_t i, int64_t lane) {
    const V mean = load(bn.mean + lane), r = load(bn.r + lane), gamma = bn.gamma(lane), scale = gamma * r;
    const V db = load(bn.db + lane), dg = load(bn.dg + lane), tdb = load(tdb_of + lane),
            tdg = load(tdg_of + lane);
    const V tmean = moves ? load(bn.tmean + lane) : V{}, tc = moves ? load(bn.tc + lane) : V{};
    const V tscale = (bn.tgamma(lane) - scale * tc) * r;
    const int64_t from = bn.out_row(n, i / bn.window, lane), at = bn.pooled(n, i / bn.window, lane);
    bn.along(n, i, lane, [&](int64_t x, int64_t w, Real here) {
      const V xhat = (load(c.x + x) - mean) * r;
      V u = -db - xhat * dg, tu = -tdb - xhat * tdg;
      if (moves) tu -= r * (load(c.tx + x) - tmean - xhat * tc) * dg;
      if (w >= 0) {
        const auto taken = load(place + at + w * pixel) == splat(here);
        u += select(taken, load(c.dy + from + w * pixel), V{});
        tu += select(taken, load(c.tdy + from + w * pixel), V{});
      }
      store(c.tdx + x, scale * tu + tscale * u);
    });
  });
}

template <class Real>
constexpr LayerFunctions<Real> kBatchNormReluPool{
    batch_norm_relu_pool_fwd<Real>, batch_norm_relu_pool_bwd<Real>, batch_norm_relu_pool_tfwd<Real>,
    batch_norm_relu_pool_tbwd<Real>};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
