// Batch normalisation with the statistics of the batch itself: over the M = N H W pixels of each channel
//
//   y = gamma xhat + beta,   xhat = r (x - mean),   r = 1 / sqrt(var + eps),   var biased
//   bwd    db = sum dy,  dg = sum dy xhat,  u = dy - db / M - xhat dg / M,  dx = gamma r u
//   tfwd   c = mean(xhat tx),  txhat = r (tx - mean tx - xhat c),  ty = tgamma xhat + gamma txhat + tbeta
//   tbwd   tdb = sum tdy,  tdg = sum (tdy xhat + dy txhat)
//          tu = tdy - tdb / M - txhat dg / M - xhat tdg / M,  tdx = gamma r tu + (tgamma - gamma r c) r u
// (r' = -r^2 c.) Parameters, where affine: gamma [pixel], beta [pixel]; else gamma 1, beta 0.
// saved: mean, r, db / M, dg / M, [pixel] each; tsaved: mean tx, c. All four overwrite.
// Variance in two passes with partial sums a row: sum x^2 - mean^2 would lose digits. Tested by
// tests/engine/test_layers.py.
#pragma once

#include "call.h"
#include "simd.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// The sums over all pixels of S quantities of each channel: f(offset in `in`, offset in `out`, sums) adds one
// pixel's to sums[S]; the result goes to done(lane, sums).
template <class Real, int S, class F, class Done>
inline void channel_sums(const Call<Real>& c, const F& f, const Done& done) {
  const Value &in = *c.in, &out = *c.out;
  for (int64_t lane = 0; lane < in.pixel; lane += kLanes<Real>) {
    Vec<Real> total[S] = {};
    const int64_t h =
        in.h == 1 && in.w == 1 ? c.samples : in.h;  // samples of one pixel: one column of pixels
    const int64_t samples = in.h == 1 && in.w == 1 ? 1 : c.samples;
    const int64_t in_row = samples == 1 && c.samples > 1 ? in.sample : in.row;
    const int64_t out_row = samples == 1 && c.samples > 1 ? out.sample : out.row;
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t i = 0; i < h; ++i) {
        int64_t from = in.origin + n * in.sample + i * in_row + lane,
                to = out.origin + n * out.sample + i * out_row + lane;
        Vec<Real> sum[S] = {};
        for (int64_t j = 0; j < in.w; ++j, from += in.pixel, to += out.pixel) f(from, to, lane, sum);
        for (int s = 0; s < S; ++s) total[s] += sum[s];
      }
    }
    done(lane, total);
  }
}

// f(offset in `in`, offset in `out`, lane) for every vector of every pixel.
template <class Real, class F>
inline void for_each_channel(const Call<Real>& c, const F& f) {
  const Value &in = *c.in, &out = *c.out;
  for (int64_t n = 0; n < c.samples; ++n) {
    for (int64_t i = 0; i < in.h; ++i) {
      int64_t from = in.origin + n * in.sample + i * in.row, to = out.origin + n * out.sample + i * out.row;
      for (int64_t j = 0; j < in.w; ++j, from += in.pixel, to += out.pixel) {
        for (int64_t lane = 0; lane < in.pixel; lane += kLanes<Real>) f(from + lane, to + lane, lane);
      }
    }
  }
}

// Where a call's per-channel numbers are.
template <class Real>
struct BatchNorm {
  using V = Vec<Real>;
  const Real *w, *tw;
  Real *mean, *r, *db, *dg, *tmean, *tc;
  int64_t pixel;
  bool affine;
  Real per_pixel;  // 1 / M

  explicit BatchNorm(const Call<Real>& c)
      : w(c.w),
        tw(c.tw),
        mean(c.saved),
        r(mean + c.in->pixel),
        db(r + c.in->pixel),
        dg(db + c.in->pixel),
        tmean(c.tsaved),
        tc(c.tsaved + c.in->pixel),
        pixel(c.in->pixel),
        affine(c.layer->bias != 0),
        per_pixel(Real(1) / Real(c.samples * c.in->h * c.in->w)) {}

  V gamma(int64_t lane) const { return affine ? load(w + lane) : splat(Real(1)); }
  V beta(int64_t lane) const { return affine ? load(w + pixel + lane) : V{}; }
  V tgamma(int64_t lane) const { return affine ? load(tw + lane) : V{}; }
  V tbeta(int64_t lane) const { return affine ? load(tw + pixel + lane) : V{}; }
  V xhat(V x, int64_t lane) const { return (x - load(mean + lane)) * load(r + lane); }
  V txhat(V xhat, V tx, int64_t lane) const {
    return load(r + lane) * (tx - load(tmean + lane) - xhat * load(tc + lane));
  }
};

template <class Real>
inline Vec<Real> inverse_root(Vec<Real> x) {
  Vec<Real> y;
  for (int i = 0; i < kLanes<Real>; ++i) y[i] = Real(1) / Real(__builtin_sqrt(double(x[i])));
  return y;
}

// mean and r of each channel.
template <class Real>
void batch_norm_statistics(const Call<Real>& c, const BatchNorm<Real>& bn) {
  using V = Vec<Real>;
  channel_sums<Real, 1>(
      c, [&](int64_t i, int64_t, int64_t, V* sum) { sum[0] += load(c.x + i); },
      [&](int64_t lane, V* sum) { store(bn.mean + lane, sum[0] * bn.per_pixel); });
  channel_sums<Real, 1>(
      c,
      [&](int64_t i, int64_t, int64_t lane, V* sum) {
        const V centred = load(c.x + i) - load(bn.mean + lane);
        sum[0] += centred * centred;
      },
      [&](int64_t lane, V* sum) {
        store(bn.r + lane, inverse_root<Real>(sum[0] * bn.per_pixel + Real(c.layer->number)));
      });
}

// mean tx and c = mean(xhat tx) of each channel, after the statistics.
template <class Real>
void batch_norm_tangent_statistics(const Call<Real>& c, const BatchNorm<Real>& bn) {
  using V = Vec<Real>;
  channel_sums<Real, 2>(
      c,
      [&](int64_t i, int64_t, int64_t lane, V* sum) {
        const V tx = load(c.tx + i);
        sum[0] += tx;
        sum[1] += tx * bn.xhat(load(c.x + i), lane);
      },
      [&](int64_t lane, V* sum) {
        store(bn.tmean + lane, sum[0] * bn.per_pixel);
        store(bn.tc + lane, sum[1] * bn.per_pixel);
      });
}

template <class Real>
void batch_norm_fwd(const Call<Real>& c) {
  const BatchNorm<Real> bn(c);
  batch_norm_statistics(c, bn);
  for_each_channel(c, [&](int64_t i, int64_t o, int64_t lane) {
    store(c.y + o, bn.gamma(lane) * bn.xhat(load(c.x + i), lane) + bn.beta(lane));
  });
}

template <class Real>
void batch_norm_bwd(const Call<Real>& c) {
  using V = Vec<Real>;
  const BatchNorm<Real> bn(c);
  channel_sums<Real, 2>(
      c,
      [&](int64_t i, int64_t o, int64_t lane, V* sum) {
        const V dy = load(c.dy + o);
        sum[0] += dy;
        sum[1] += dy * bn.xhat(load(c.x + i), lane);
      },
      [&](int64_t lane, V* sum) {
        store(bn.db + lane, sum[0] * bn.per_pixel);
        store(bn.dg + lane, sum[1] * bn.per_pixel);
        if (c.dw == nullptr || !bn.affine) return;
        store(c.dw + lane, sum[1]);
        store(c.dw + bn.pixel + lane, sum[0]);
      });
  if (c.dx == nullptr) return;
  for_each_channel(c, [&](int64_t i, int64_t o, int64_t lane) {
    const V xhat = bn.xhat(load(c.x + i), lane);
    const V u = load(c.dy + o) - load(bn.db + lane) - xhat * load(bn.dg + lane);
    store(c.dx + i, bn.gamma(lane) * load(bn.r + lane) * u);
  });
}

template <class Real>
void batch_norm_tfwd(const Call<Real>& c) {
  using V = Vec<Real>;
  const BatchNorm<Real> bn(c);
  if (c.tx == nullptr) {
    for_each_channel(c, [&](int64_t i, int64_t o, int64_t lane) {
      store(c.ty + o, bn.tgamma(lane) * bn.xhat(load(c.x + i), lane) + bn.tbeta(lane));
    });
    return;
  }
  batch_norm_tangent_statistics(c, bn);
  for_each_channel(c, [&](int64_t i, int64_t o, int64_t lane) {
    const V xhat = bn.xhat(load(c.x + i), lane), txhat = bn.txhat(xhat, load(c.tx + i), lane);
    store(c.ty + o, bn.tgamma(lane) * xhat + bn.gamma(lane) * txhat + bn.tbeta(lane));
  });
}

template <class Real>
void batch_norm_tbwd(const Call<Real>& c) {
  using V = Vec<Real>;
  const BatchNorm<Real> bn(c);
  const bool moves = c.tx != nullptr;
  Real* const tdb = c.scratch;
  Real* const tdg = c.scratch + bn.pixel;
  channel_sums<Real, 2>(
      c,
      [&](int64_t i, int64_t o, int64_t lane, V* sum) {
        const V tdy = load(c.tdy + o), xhat = bn.xhat(load(c.x + i), lane);
        sum[0] += tdy;
        sum[1] += tdy * xhat;
        if (moves) sum[1] += load(c.dy + o) * bn.txhat(xhat, load(c.tx + i), lane);
      },
      [&](int64_t lane, V* sum) {
        store(tdb + lane, sum[0] * bn.per_pixel);
        store(tdg + lane, sum[1] * bn.per_pixel);
        if (!bn.affine) return;
        store(c.tdw + lane, sum[1]);
        store(c.tdw + bn.pixel + lane, sum[0]);
      });
  if (c.tdx == nullptr) return;
  for_each_channel(c, [&](int64_t i, int64_t o, int64_t lane) {
    const V xhat = bn.xhat(load(c.x + i), lane), r = load(bn.r + lane), gamma = bn.gamma(lane);
    const V u = load(c.dy + o) - load(bn.db + lane) - xhat * load(bn.dg + lane);
    V tu = load(c.tdy + o) - load(tdb + lane) - xhat * load(tdg + lane);
    V tscale = bn.tgamma(lane);
    if (moves) {
      tu -= bn.txhat(xhat, load(c.tx + i), lane) * load(bn.dg + lane);
      tscale -= gamma * r * load(bn.tc + lane);
    }
    store(c.tdx + i, gamma * r * tu + tscale * r * u);
  });
}

template <class Real>
constexpr LayerFunctions<Real> kBatchNorm{batch_norm_fwd<Real>, batch_norm_bwd<Real>, batch_norm_tfwd<Real>,
                                          batch_norm_tbwd<Real>};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
