// Batch normalisation with the statistics of the batch itself: over the M = N H W pixels of each channel
//
//   y = gamma xhat + beta,   xhat = r (x - mean),   r = 1 / sqrt(var + eps),   var biased
//   bwd    db = sum dy,  dg = sum dy xhat,  u = dy - db / M - xhat dg / M,  dx = gamma r u
//   tfwd   c = mean(xhat tx),  txhat = r (tx - mean tx - xhat c),  ty = tgamma xhat + gamma txhat + tbeta
//   tbwd   tdb = sum tdy,  tdg = sum (tdy xhat + dy txhat)
//          tu = tdy - tdb / M - txhat dg / M - xhat tdg / M,  tdx = gamma r tu + (tgamma - gamma r c) r u
// (r' = -r^2 c.) Parameters, where affine: gamma [pixel], beta [pixel]; else gamma 1, beta 0.
// saved: mean, r, db / M, dg / M, [pixel] each; tsaved: mean tx, c. All four overwrite.
// The variance is never sum x^2 - mean^2, which would lose digits. Tested by tests/engine/test_layers.py.
#pragma once

#include "call.h"
#include "simd.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// Rows of pixels, one vector of the call's channels at a time: row(lane, offset in `in`, offset in `out`,
// pixels), which lie `in_step` and `out_step` apart; `before`: pixels of the rows before. Samples of one
// pixel are one row.
template <class Real, class Row>
inline void for_each_channel_row(const Call<Real>& c, const Row& row) {
  const Value &in = *c.in, &out = *c.out;
  const bool features = in.h == 1 && in.w == 1;
  const int64_t samples = features ? 1 : c.samples, pixels = features ? c.samples : in.w;
  const int64_t in_step = features ? in.sample : in.pixel, out_step = features ? out.sample : out.pixel;
  int64_t before = 0;
  for (int64_t n = 0; n < samples; ++n) {
    for (int64_t i = 0; i < in.h; ++i, before += pixels) {
      const int64_t from = in.origin + n * in.sample + i * in.row,
                    to = out.origin + n * out.sample + i * out.row;
      for (int64_t lane = c.first_lane; lane < c.last_lane; lane += kLanes<Real>)
        row(lane, from + lane, to + lane, pixels, in_step, out_step, before);
    }
  }
}

// The sums over all pixels of S quantities of each channel: f(offset in `in`, offset in `out`, lane, sums)
// adds one pixel's to sums[S]; the result goes to done(lane, sums). A row's sum first, for the rounding.
// Takes the second half of `scratch`.
template <class Real, int S, class F, class Done>
inline void channel_sums(const Call<Real>& c, const F& f, const Done& done) {
  const int64_t pixel = c.in->pixel;
  Real* const totals = c.scratch + 2 * pixel;
  for (int s = 0; s < S; ++s) {
    for (int64_t lane = c.first_lane; lane < c.last_lane; ++lane) totals[s * pixel + lane] = 0;
  }
  for_each_channel_row(c, [&](int64_t lane, int64_t from, int64_t to, int64_t pixels, int64_t in_step,
                              int64_t out_step, int64_t) {
    Vec<Real> sum[S] = {};
    for (int64_t j = 0; j < pixels; ++j, from += in_step, to += out_step) f(from, to, lane, sum);
    for (int s = 0; s < S; ++s) {
      Real* const total = totals + s * pixel + lane;
      store(total, load(total) + sum[s]);
    }
  });
  for (int64_t lane = c.first_lane; lane < c.last_lane; lane += kLanes<Real>) {
    Vec<Real> total[S];
    for (int s = 0; s < S; ++s) total[s] = load(totals + s * pixel + lane);
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
        for (int64_t lane = c.first_lane; lane < c.last_lane; lane += kLanes<Real>)
          f(from + lane, to + lane, lane);
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

// mean and r of each channel. The pixels are read from afar once: a row's mean and squared deviations while
// it is near, which are then combined (T. Chan, G. Golub and R. LeVeque 1983).
template <class Real>
void batch_norm_statistics(const Call<Real>& c, const BatchNorm<Real>& bn) {
  using V = Vec<Real>;
  // r is the sum of squares until the end.
  for (int64_t lane = c.first_lane; lane < c.last_lane; ++lane) bn.mean[lane] = bn.r[lane] = 0;
  for_each_channel_row(
      c, [&](int64_t lane, int64_t from, int64_t, int64_t pixels, int64_t step, int64_t, int64_t before) {
        V sum{}, squares{};
        for (int64_t j = 0; j < pixels; ++j) sum += load(c.x + from + j * step);
        const V mean = sum * (Real(1) / Real(pixels));
        for (int64_t j = 0; j < pixels; ++j) {
          const V centred = load(c.x + from + j * step) - mean;
          squares += centred * centred;
        }
        const V shift = mean - load(bn.mean + lane);
        const Real share = Real(pixels) / Real(before + pixels);  // of the pixels so far, this row's
        store(bn.mean + lane, load(bn.mean + lane) + share * shift);
        store(bn.r + lane, load(bn.r + lane) + squares + (Real(before) * share) * (shift * shift));
      });
  for (int64_t lane = c.first_lane; lane < c.last_lane; lane += kLanes<Real>) {
    store(bn.r + lane, inverse_root<Real>(load(bn.r + lane) * bn.per_pixel + Real(c.layer->number)));
  }
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
constexpr LayerFunctions<Real> kBatchNorm{Split::lanes, batch_norm_fwd<Real>, batch_norm_bwd<Real>,
                                          batch_norm_tfwd<Real>, batch_norm_tbwd<Real>};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
