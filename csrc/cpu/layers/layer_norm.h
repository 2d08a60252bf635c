// Layer normalisation of each sample over all its L = C H W elements:
//
//   y = gamma xhat + beta,   xhat = r (x - mean),   r = 1 / sqrt(var + eps),   var biased
//   bwd    db = sum_n dy,  dg = sum_n dy xhat,  v = gamma dy,  p = mean v,  q = mean(v xhat)
//          u = v - p - xhat q,  dx = r u
//   tfwd   c = mean(xhat tx),  txhat = r (tx - mean tx - xhat c),  ty = tgamma xhat + gamma txhat + tbeta
//   tbwd   tdb = sum_n tdy,  tdg = sum_n (tdy xhat + dy txhat),  tv = tgamma dy + gamma tdy
//          tp = mean tv,  tq = mean(tv xhat + v txhat),  tu = tv - tp - txhat q - xhat tq
//          tdx = r tu - r^2 c u
// (r' = -r^2 c.) Parameters, where affine: gamma [H][W][pixel], then beta as gamma; else gamma 1, beta 0.
// saved, 4 numbers a sample: mean, r, p, q; tsaved, 4 a sample: mean tx, c, and 2 unused; scratch: none.
// All four overwrite; lanes beyond C of y and ty become zero. Variance in two passes with partial sums a row.
// Tested by tests/engine/test_layers.py.
#pragma once

#include "pixels.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// One sample's means of S quantities: f(offset in `in`, offset in `out`, offset in gamma, sums) adds a
// vector's to sums[S]. Lanes beyond C do not count.
template <class Real, int S, class F>
inline void sample_means(const Call<Real>& c, int64_t n, Real (&means)[S], const F& f) {
  using V = Vec<Real>;
  const Value &in = *c.in, &out = *c.out;
  const int64_t whole = in.c / kLanes<Real> * kLanes<Real>;
  const auto inside = first_lanes<Real>(in.c - whole);
  V total[S] = {};
  for (int64_t i = 0; i < in.h; ++i) {
    int64_t from = in.origin + n * in.sample + i * in.row, to = out.origin + n * out.sample + i * out.row;
    int64_t at = i * in.w * in.pixel;
    V row[S] = {};
    for (int64_t j = 0; j < in.w; ++j, from += in.pixel, to += out.pixel, at += in.pixel) {
      for (int64_t lane = 0; lane < whole; lane += kLanes<Real>) f(from + lane, to + lane, at + lane, row);
      if (whole == in.c) continue;
      V last[S] = {};
      f(from + whole, to + whole, at + whole, last);
      for (int s = 0; s < S; ++s) row[s] += select(inside, last[s], V{});
    }
    for (int s = 0; s < S; ++s) total[s] += row[s];
  }
  for (int s = 0; s < S; ++s) means[s] = sum_of_lanes<Real>(total[s]) / Real(in.c * in.h * in.w);
}

// f(offset in `in`, offset in `out`, offset in gamma, a vector's lanes that are channels) for all vectors of
// a sample.
template <class Real, class F>
inline void for_each_of_sample(const Call<Real>& c, int64_t n, const F& f) {
  const int64_t whole = c.in->c / kLanes<Real> * kLanes<Real>, pixel = c.in->pixel;
  const auto all = first_lanes<Real>(kLanes<Real>), inside = first_lanes<Real>(c.in->c - whole);
  for_each_pixel(*c.in, *c.out, n, [&](int64_t from, int64_t to, int64_t number) {
    int64_t lane = 0;
    for (; lane < whole; lane += kLanes<Real>) f(from + lane, to + lane, number * pixel + lane, all);
    if (lane < c.in->c) {
      f(from + lane, to + lane, number * pixel + lane, inside);
      lane += kLanes<Real>;
    }
    for (; lane < pixel; lane += kLanes<Real>) f(from + lane, to + lane, number * pixel + lane, ~all);
  });
}

template <class Real>
struct LayerNorm {
  using V = Vec<Real>;
  const Real *w, *tw;
  int64_t size;  // of gamma

  explicit LayerNorm(const Call<Real>& c)
      : w(c.layer->bias ? c.w : nullptr),
        tw(c.layer->bias ? c.tw : nullptr),
        size(c.in->h * c.in->w * c.in->pixel) {}

  bool affine() const { return w != nullptr; }
  V gamma(int64_t at) const { return affine() ? load(w + at) : splat(Real(1)); }
  V beta(int64_t at) const { return affine() ? load(w + size + at) : V{}; }
  V tgamma(int64_t at) const { return affine() ? load(tw + at) : V{}; }
  V tbeta(int64_t at) const { return affine() ? load(tw + size + at) : V{}; }
  // A sample's part of the gradient.
  void add(Real* dw, int64_t at, V dgamma, V dbeta) const {
    store(dw + at, load(dw + at) + dgamma);
    store(dw + size + at, load(dw + size + at) + dbeta);
  }
  void clear(Real* dw) const {
    for (int64_t at = 0; at < 2 * size; at += kLanes<Real>) store(dw + at, V{});
  }
};

// What is kept of a sample, and what follows from it.
template <class Real>
struct LayerNormSample {
  using V = Vec<Real>;
  Real mean, r, p, q, tmean, c;
  LayerNormSample(const Real* saved, const Real* tsaved, int64_t n)
      : mean(saved[4 * n]),
        r(saved[4 * n + 1]),
        p(saved[4 * n + 2]),
        q(saved[4 * n + 3]),
        tmean(tsaved == nullptr ? Real(0) : tsaved[4 * n]),
        c(tsaved == nullptr ? Real(0) : tsaved[4 * n + 1]) {}

  V xhat(V x) const { return (x - mean) * r; }
  V txhat(V xhat, V tx) const { return r * (tx - tmean - xhat * c); }
};

template <class Real>
void layer_norm_fwd(const Call<Real>& c) {
  using V = Vec<Real>;
  const LayerNorm<Real> norm(c);
  const Real* const x = c.x;
  Real* const y = c.y;
  for (int64_t n = 0; n < c.samples; ++n) {
    Real mean[1], var[1];
    sample_means<Real>(c, n, mean, [=](int64_t i, int64_t, int64_t, V* sum) { sum[0] += load(x + i); });
    sample_means<Real>(c, n, var, [=, mean = mean[0]](int64_t i, int64_t, int64_t, V* sum) {
      const V centred = load(x + i) - mean;
      sum[0] += centred * centred;
    });
    const Real r = Real(1 / __builtin_sqrt(double(var[0]) + c.layer->number));
    c.saved[4 * n] = mean[0];
    c.saved[4 * n + 1] = r;
    for_each_of_sample(c, n, [=, mean = mean[0]](int64_t i, int64_t o, int64_t at, auto inside) {
      const V xhat = (load(x + i) - mean) * r;
      store(y + o, select(inside, norm.gamma(at) * xhat + norm.beta(at), V{}));
    });
  }
}

template <class Real>
void layer_norm_bwd(const Call<Real>& c) {
  using V = Vec<Real>;
  const LayerNorm<Real> norm(c);
  const Real *const x = c.x, *const dy = c.dy;
  Real *const dx = c.dx, *const dw = norm.affine() ? c.dw : nullptr;
  if (dw != nullptr) norm.clear(dw);
  for (int64_t n = 0; n < c.samples; ++n) {
    LayerNormSample<Real> s(c.saved, nullptr, n);
    Real mean[2];
    sample_means<Real>(c, n, mean, [=](int64_t i, int64_t o, int64_t at, V* sum) {
      const V d = load(dy + o), xhat = s.xhat(load(x + i)), v = norm.gamma(at) * d;
      sum[0] += v;
      sum[1] += v * xhat;
      if (dw != nullptr) norm.add(dw, at, d * xhat, d);
    });
    c.saved[4 * n + 2] = s.p = mean[0];
    c.saved[4 * n + 3] = s.q = mean[1];
    if (dx == nullptr) continue;
    for_each_of_sample(c, n, [=](int64_t i, int64_t o, int64_t at, auto inside) {
      const V u = norm.gamma(at) * load(dy + o) - s.p - s.xhat(load(x + i)) * s.q;
      store(dx + i, select(inside, s.r * u, V{}));
    });
  }
}

template <class Real>
void layer_norm_tfwd(const Call<Real>& c) {
  using V = Vec<Real>;
  const LayerNorm<Real> norm(c);
  const Real *const x = c.x, *const tx = c.tx;
  Real* const ty = c.ty;
  for (int64_t n = 0; n < c.samples; ++n) {
    LayerNormSample<Real> s(c.saved, nullptr, n);
    if (tx == nullptr) {
      for_each_of_sample(c, n, [=](int64_t i, int64_t o, int64_t at, auto inside) {
        store(ty + o, select(inside, norm.tgamma(at) * s.xhat(load(x + i)) + norm.tbeta(at), V{}));
      });
      continue;
    }
    Real mean[2];
    sample_means<Real>(c, n, mean, [=](int64_t i, int64_t, int64_t, V* sum) {
      const V t = load(tx + i);
      sum[0] += t;
      sum[1] += t * s.xhat(load(x + i));
    });
    c.tsaved[4 * n] = s.tmean = mean[0];
    c.tsaved[4 * n + 1] = s.c = mean[1];
    for_each_of_sample(c, n, [=](int64_t i, int64_t o, int64_t at, auto inside) {
      const V xhat = s.xhat(load(x + i)), txhat = s.txhat(xhat, load(tx + i));
      store(ty + o, select(inside, norm.tgamma(at) * xhat + norm.gamma(at) * txhat + norm.tbeta(at), V{}));
    });
  }
}

template <class Real>
void layer_norm_tbwd(const Call<Real>& c) {
  using V = Vec<Real>;
  const LayerNorm<Real> norm(c);
  const Real *const x = c.x, *const tx = c.tx, *const dy = c.dy, *const tdy = c.tdy;
  Real *const tdx = c.tdx, *const tdw = norm.affine() ? c.tdw : nullptr;
  const bool moves = tx != nullptr;
  if (tdw != nullptr) norm.clear(tdw);
  for (int64_t n = 0; n < c.samples; ++n) {
    const LayerNormSample<Real> s(c.saved, moves ? c.tsaved : nullptr, n);
    const auto txhat_at = [=](int64_t i, V xhat) { return moves ? s.txhat(xhat, load(tx + i)) : V{}; };
    Real mean[2];
    sample_means<Real>(c, n, mean, [=](int64_t i, int64_t o, int64_t at, V* sum) {
      const V d = load(dy + o), td = load(tdy + o), gamma = norm.gamma(at);
      const V xhat = s.xhat(load(x + i)), txhat = txhat_at(i, xhat), tv = norm.tgamma(at) * d + gamma * td;
      sum[0] += tv;
      sum[1] += tv * xhat + gamma * d * txhat;
      if (tdw != nullptr) norm.add(tdw, at, td * xhat + d * txhat, td);
    });
    if (tdx == nullptr) continue;
    const Real tp = mean[0], tq = mean[1];
    for_each_of_sample(c, n, [=](int64_t i, int64_t o, int64_t at, auto inside) {
      const V d = load(dy + o), gamma = norm.gamma(at), xhat = s.xhat(load(x + i));
      const V u = gamma * d - s.p - xhat * s.q;
      const V tv = norm.tgamma(at) * d + gamma * load(tdy + o);
      const V tu = tv - tp - txhat_at(i, xhat) * s.q - xhat * tq;
      store(tdx + i, select(inside, s.r * (tu - s.r * s.c * u), V{}));
    });
  }
}

template <class Real>
constexpr LayerFunctions<Real> kLayerNorm{Split::none, layer_norm_fwd<Real>, layer_norm_bwd<Real>,
                                          layer_norm_tfwd<Real>, layer_norm_tbwd<Real>};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
