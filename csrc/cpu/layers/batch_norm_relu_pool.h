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

// kWindow: k, or 0 where it is known at run time only.
template <class Real, int kWindow>
struct PooledNorm : BatchNorm<Real> {
  using V = Vec<Real>;
  const Call<Real>& c;
  int64_t lanes, plane;  // up to where the call's lanes are in use; elements of one pooled plane

  explicit PooledNorm(const Call<Real>& call)
      : BatchNorm<Real>(call),
        c(call),
        lanes(std::min(lanes_of<Real>(call.in->c), call.last_lane)),
        plane(call.samples * call.out->h * call.out->w * call.in->pixel) {}

  int64_t window() const { return kWindow > 0 ? kWindow : c.layer->kernel_h; }

  // For each output pixel: xhat_a, a, and after tfwd txhat_a; pixels are `pixel` apart.
  Real* chosen() const { return c.saved + 4 * this->pixel; }
  Real* place() const { return chosen() + plane; }
  Real* tchosen() const { return c.tsaved + 4 * this->pixel; }

  // Rows of output pixels with one vector of channels at a time, so that what belongs to the channel stays in
  // registers: row(lane, offset in x of the first window, offset in y, offset in chosen).
  template <class Row>
  void for_each_output_row(const Row& row) const {
    const Value &in = *c.in, &out = *c.out;
    for (int64_t n = 0; n < c.samples; ++n) {
      for (int64_t i = 0; i < out.h; ++i) {
        for (int64_t lane = c.first_lane; lane < lanes; lane += kLanes<Real>) {
          row(lane, in.origin + n * in.sample + i * window() * in.row + lane,
              out.origin + n * out.sample + i * out.row + lane, (n * out.h + i) * out.w * this->pixel + lane);
        }
      }
    }
  }

  // Calls f(offset in x, place) for the pixels of the window whose first is at x.
  template <class F>
  void for_each_in_window(int64_t x, const F& f) const {
    if constexpr (kWindow > 0) {
#pragma GCC unroll 3
      for (int u = 0; u < kWindow; ++u) {
#pragma GCC unroll 3
        for (int v = 0; v < kWindow; ++v) f(x + u * c.in->row + v * this->pixel, Real(u * kWindow + v));
      }
    } else {
      for (int64_t u = 0; u < window(); ++u) {
        for (int64_t v = 0; v < window(); ++v) f(x + u * c.in->row + v * this->pixel, Real(u * window() + v));
      }
    }
  }

  // Calls f(lane, offset in x) for the pixels that no window covers.
  template <class F>
  void for_each_uncovered(const F& f) const {
    const Value &in = *c.in, &out = *c.out;
    for (int64_t n = 0; n < c.samples; ++n) {
      for (int64_t i = 0; i < in.h; ++i) {
        const int64_t row = in.origin + n * in.sample + i * in.row;
        for (int64_t j = i < out.h * window() ? out.w * window() : 0; j < in.w; ++j) {
          for (int64_t lane = c.first_lane; lane < lanes; lane += kLanes<Real>)
            f(lane, row + j * this->pixel + lane);
        }
      }
    }
  }

  // Two sums over the alive output pixels of each channel, a row's first; f(offset in y, offset in chosen,
  // alive, sums) adds one pixel's. The result goes to `first` and `second`, divided by M, and undivided to
  // the gradients of beta and gamma in dw, where that is wanted. Takes the second half of `scratch`.
  template <class F>
  void gradient_sums(Real* first, Real* second, Real* dw, const F& f) const {
    const int64_t pixel = this->pixel, across = c.out->w;
    Real* const totals = c.scratch + 2 * pixel;
    const Real* const place = this->place();
    for (int64_t lane = c.first_lane; lane < c.last_lane; ++lane) totals[lane] = totals[pixel + lane] = 0;
    for_each_output_row([&](int64_t lane, int64_t, int64_t y, int64_t at) {
      V sum[2] = {};
      for (int64_t j = 0; j < across; ++j, y += pixel, at += pixel) f(y, at, load(place + at) >= V{}, sum);
      store(totals + lane, load(totals + lane) + sum[0]);
      store(totals + pixel + lane, load(totals + pixel + lane) + sum[1]);
    });
    for (int64_t lane = c.first_lane; lane < c.last_lane; lane += kLanes<Real>) {
      const V db = load(totals + lane), dg = load(totals + pixel + lane);
      store(first + lane, db * this->per_pixel);
      store(second + lane, dg * this->per_pixel);
      if (dw == nullptr) continue;
      store(dw + lane, dg);
      store(dw + pixel + lane, db);
    }
  }
};

template <class Real, int kWindow>
void pooled_norm_fwd(const Call<Real>& c) {
  using V = Vec<Real>;
  const PooledNorm<Real, kWindow> bn(c);
  batch_norm_statistics<Real>(c, bn);
  const int64_t k = bn.window(), pixel = bn.pixel, across = c.out->w;
  Real *const chosen = bn.chosen(), *const place = bn.place(), *const y = c.y;
  const Real* const x = c.x;
  bn.for_each_output_row([&](int64_t lane, int64_t from, int64_t to, int64_t at) {
    const V mean = load(bn.mean + lane), r = load(bn.r + lane), gamma = bn.gamma(lane), beta = bn.beta(lane);
    for (int64_t j = 0; j < across; ++j, from += k * pixel, to += pixel, at += pixel) {
      V best = splat(-Real(__builtin_inf())), best_xhat{}, best_place = splat(Real(-1));
      bn.for_each_in_window(from, [&](int64_t in, Real here) {
        const V xhat = (load(x + in) - mean) * r, value = gamma * xhat + beta;
        const auto better = ~(value <= best);  // also where it is NaN, which must not be lost
        best = select(better, value, best);
        best_xhat = select(better, xhat, best_xhat);
        best_place = select(better, splat(here), best_place);
      });
      const auto alive = ~(best <= V{});
      store(y + to, select(alive, best, V{}));
      store(chosen + at, best_xhat);
      store(place + at, select(alive, best_place, splat(Real(-1))));
    }
  });
}

template <class Real, int kWindow>
void pooled_norm_bwd(const Call<Real>& c) {
  using V = Vec<Real>;
  const PooledNorm<Real, kWindow> bn(c);
  const int64_t k = bn.window(), pixel = bn.pixel, across = c.out->w;
  const Real *const chosen = bn.chosen(), *const place = bn.place(), *const x = c.x, *const dy = c.dy;
  Real* const dx = c.dx;
  bn.gradient_sums(bn.db, bn.dg, c.dw, [&](int64_t y, int64_t at, auto alive, V* sum) {
    const V dh = select(alive, load(dy + y), V{});
    sum[0] += dh;
    sum[1] += dh * load(chosen + at);
  });
  if (dx == nullptr) return;
  bn.for_each_output_row([&](int64_t lane, int64_t in, int64_t out, int64_t at) {
    const V mean = load(bn.mean + lane), r = load(bn.r + lane), scale = bn.gamma(lane) * r;
    const V db = load(bn.db + lane), dg = load(bn.dg + lane) * r;
    for (int64_t j = 0; j < across; ++j, in += k * pixel, out += pixel, at += pixel) {
      const V dh = load(dy + out), a = load(place + at);
      bn.for_each_in_window(in, [&](int64_t i, Real here) {
        const V u = select(a == splat(here), dh, V{}) - db - (load(x + i) - mean) * dg;
        store(dx + i, scale * u);
      });
    }
  });
  bn.for_each_uncovered([&](int64_t lane, int64_t i) {
    const V xhat = bn.xhat(load(x + i), lane), scale = bn.gamma(lane) * load(bn.r + lane);
    store(dx + i, scale * (-load(bn.db + lane) - xhat * load(bn.dg + lane)));
  });
}

template <class Real, int kWindow>
void pooled_norm_tfwd(const Call<Real>& c) {
  using V = Vec<Real>;
  const PooledNorm<Real, kWindow> bn(c);
  const int64_t k = bn.window(), pixel = bn.pixel, across = c.out->w;
  const Real *const chosen = bn.chosen(), *const place = bn.place(), *const tx = c.tx;
  Real *const tchosen = bn.tchosen(), *const ty = c.ty;
  const bool moves = tx != nullptr;
  if (moves) batch_norm_tangent_statistics<Real>(c, bn);
  bn.for_each_output_row([&](int64_t lane, int64_t from, int64_t to, int64_t at) {
    const V gamma = bn.gamma(lane), tgamma = bn.tgamma(lane), tbeta = bn.tbeta(lane), r = load(bn.r + lane);
    const V tmean = moves ? load(bn.tmean + lane) : V{}, tc = moves ? load(bn.tc + lane) : V{};
    for (int64_t j = 0; j < across; ++j, from += k * pixel, to += pixel, at += pixel) {
      const V a = load(place + at), xhat = load(chosen + at);
      V txhat{};
      if (moves) {
        V taken{};
        bn.for_each_in_window(
            from, [&](int64_t i, Real here) { taken = select(a == splat(here), load(tx + i), taken); });
        txhat = r * (taken - tmean - xhat * tc);
      }
      store(tchosen + at, txhat);
      store(ty + to, select(a >= V{}, tgamma * xhat + gamma * txhat + tbeta, V{}));
    }
  });
}

template <class Real, int kWindow>
void pooled_norm_tbwd(const Call<Real>& c) {
  using V = Vec<Real>;
  const PooledNorm<Real, kWindow> bn(c);
  const int64_t k = bn.window(), pixel = bn.pixel, across = c.out->w;
  const Real *const chosen = bn.chosen(), *const place = bn.place(), *const tchosen = bn.tchosen();
  const Real *const x = c.x, *const tx = c.tx, *const dy = c.dy, *const tdy = c.tdy;
  Real *const tdb_of = c.scratch, *const tdg_of = c.scratch + pixel, *const tdx = c.tdx;
  bn.gradient_sums(tdb_of, tdg_of, c.tdw, [&](int64_t y, int64_t at, auto alive, V* sum) {
    const V tdh = select(alive, load(tdy + y), V{}), dh = select(alive, load(dy + y), V{});
    sum[0] += tdh;
    sum[1] += tdh * load(chosen + at) + dh * load(tchosen + at);
  });
  if (tdx == nullptr) return;
  // tdx of the pixel at i, on which dh and tdh arrive.
  const auto put = [&](int64_t i, V dh, V tdh, V mean, V r, V scale, V tscale, V db, V dg, V tdb, V tdg,
                       V tmean, V tc) {
    const V xhat = (load(x + i) - mean) * r;
    const V u = dh - db - xhat * dg;
    V tu = tdh - tdb - xhat * tdg;
    if (tx != nullptr) tu -= r * (load(tx + i) - tmean - xhat * tc) * dg;
    store(tdx + i, scale * tu + tscale * u);
  };
  const auto with_channel = [&](int64_t lane, const auto& f) {
    const V mean = load(bn.mean + lane), r = load(bn.r + lane), scale = bn.gamma(lane) * r;
    const V db = load(bn.db + lane), dg = load(bn.dg + lane), tdb = load(tdb_of + lane),
            tdg = load(tdg_of + lane);
    const V tmean = tx != nullptr ? load(bn.tmean + lane) : V{},
            tc = tx != nullptr ? load(bn.tc + lane) : V{};
    const V tscale = (bn.tgamma(lane) - scale * tc) * r;
    f([&](int64_t i, V dh, V tdh) { put(i, dh, tdh, mean, r, scale, tscale, db, dg, tdb, tdg, tmean, tc); });
  };
  bn.for_each_output_row([&](int64_t lane, int64_t in, int64_t out, int64_t at) {
    with_channel(lane, [&](const auto& put_at) {
      for (int64_t j = 0; j < across; ++j, in += k * pixel, out += pixel, at += pixel) {
        const V dh = load(dy + out), tdh = load(tdy + out), a = load(place + at);
        bn.for_each_in_window(in, [&](int64_t i, Real here) {
          const auto taken = a == splat(here);
          put_at(i, select(taken, dh, V{}), select(taken, tdh, V{}));
        });
      }
    });
  });
  bn.for_each_uncovered(
      [&](int64_t lane, int64_t i) { with_channel(lane, [&](const auto& put_at) { put_at(i, V{}, V{}); }); });
}

// One of the above for each of the common windows.
#define METAFAST_BY_WINDOW(name)                          \
  template <class Real>                                   \
  void batch_norm_relu_pool_##name(const Call<Real>& c) { \
    switch (c.layer->kernel_h) {                          \
      case 1:                                             \
        return pooled_norm_##name<Real, 1>(c);            \
      case 2:                                             \
        return pooled_norm_##name<Real, 2>(c);            \
      default:                                            \
        return pooled_norm_##name<Real, 0>(c);            \
    }                                                     \
  }
METAFAST_BY_WINDOW(fwd)
METAFAST_BY_WINDOW(bwd)
METAFAST_BY_WINDOW(tfwd)
METAFAST_BY_WINDOW(tbwd)
#undef METAFAST_BY_WINDOW

template <class Real>
constexpr LayerFunctions<Real> kBatchNormReluPool{
    Split::lanes, batch_norm_relu_pool_fwd<Real>, batch_norm_relu_pool_bwd<Real>,
    batch_norm_relu_pool_tfwd<Real>, batch_norm_relu_pool_tbwd<Real>};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
