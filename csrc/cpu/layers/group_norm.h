// Group normalisation: each sample's channels in `groups` groups of neighbours, each over its M = C / groups
// H W elements. A group's numbers are kept in each of its channels' lanes, so that vectors need not know the
// groups:
//
//   y = gamma xhat + beta,   xhat = r (x - mean),   r = 1 / sqrt(var + eps),   var biased
//   bwd    per sample and channel b = sum dy, g = sum dy xhat over pixels;  db = sum_n b,  dg = sum_n g
//          p = sum_group(gamma b) / M,  q = sum_group(gamma g) / M,  u = gamma dy - p - xhat q,  dx = r u
//   tfwd   m = mean tx,  c = mean(xhat tx),  txhat = r (tx - m - xhat c)
//          ty = tgamma xhat + gamma txhat + tbeta
//   tbwd   tb = sum tdy,  tg = sum(tdy xhat + dy txhat);  tdb = sum_n tb,  tdg = sum_n tg
//          tp = sum_group(tgamma b + gamma tb) / M,  tq = sum_group(tgamma g + gamma tg) / M
//          tu = tgamma dy + gamma tdy - tp - txhat q - xhat tq,  tdx = r tu - r^2 c u
// (r' = -r^2 c.) Parameters, where affine: gamma [pixel], beta [pixel]; else gamma 1, beta 0.
// saved, 4 pixel a sample: mean, r, p, q, [pixel] each; tsaved, 4 pixel a sample: m, c, tp, tq; all are zero
// in lanes beyond C, and so are then y and ty. scratch: 4 pixel. All four overwrite. Variance in two passes
// with partial sums a row. Tested by tests/engine/test_layers.py.
#pragma once

#include "pixels.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// sums[s * pixel + channel], s < S: over the pixels of sample n; f(offset in `in`, offset in `out`, lane,
// sums) adds one vector's.
template <class Real, int S, class F>
inline void pixel_sums(const Call<Real>& c, int64_t n, Real* sums, const F& f) {
  const Value &in = *c.in, &out = *c.out;
  for (int64_t lane = 0; lane < in.pixel; lane += kLanes<Real>) {
    Vec<Real> total[S] = {};
    for (int64_t i = 0; i < in.h; ++i) {
      int64_t from = in.origin + n * in.sample + i * in.row + lane,
              to = out.origin + n * out.sample + i * out.row + lane;
      Vec<Real> row[S] = {};
      for (int64_t j = 0; j < in.w; ++j, from += in.pixel, to += out.pixel) f(from, to, lane, row);
      for (int s = 0; s < S; ++s) total[s] += row[s];
    }
    for (int s = 0; s < S; ++s) store(sums + s * in.pixel + lane, total[s]);
  }
}

// f(offset in `in`, offset in `out`, lane) for all vectors of sample n.
template <class Real, class F>
inline void for_each_lane(const Call<Real>& c, int64_t n, const F& f) {
  const int64_t pixel = c.in->pixel;
  for_each_pixel(*c.in, *c.out, n, [=](int64_t from, int64_t to, int64_t) {
    for (int64_t lane = 0; lane < pixel; lane += kLanes<Real>) f(from + lane, to + lane, lane);
  });
}

// Where a sample's numbers are.
template <class Real>
struct GroupNorm {
  using V = Vec<Real>;
  const Real *w, *tw;
  Real *mean, *r, *p, *q, *m, *c, *tp, *tq;
  int64_t channels, groups, pixel, elements;

  GroupNorm(const Call<Real>& call, int64_t n)
      : w(call.layer->bias ? call.w : nullptr),
        tw(call.layer->bias ? call.tw : nullptr),
        mean(call.saved + 4 * n * call.in->pixel),
        r(mean + call.in->pixel),
        p(r + call.in->pixel),
        q(p + call.in->pixel),
        m(call.tsaved == nullptr ? nullptr : call.tsaved + 4 * n * call.in->pixel),
        c(m == nullptr ? nullptr : m + call.in->pixel),
        tp(m == nullptr ? nullptr : c + call.in->pixel),
        tq(m == nullptr ? nullptr : tp + call.in->pixel),
        channels(call.in->c),
        groups(call.layer->groups),
        pixel(call.in->pixel),
        elements(call.in->c / call.layer->groups * call.in->h * call.in->w) {}

  bool affine() const { return w != nullptr; }
  V gamma(int64_t lane) const { return affine() ? load(w + lane) : splat(Real(1)); }
  V beta(int64_t lane) const { return affine() ? load(w + pixel + lane) : V{}; }
  V tgamma(int64_t lane) const { return affine() ? load(tw + lane) : V{}; }
  V tbeta(int64_t lane) const { return affine() ? load(tw + pixel + lane) : V{}; }
  V xhat(V x, int64_t lane) const { return (x - load(mean + lane)) * load(r + lane); }
  V txhat(V xhat, V tx, int64_t lane) const {
    return load(r + lane) * (tx - load(m + lane) - xhat * load(c + lane));
  }

  // to[channel] = finish(mean over its group), where part(channel) is a channel's part of the group's sum.
  template <class Part, class Finish>
  void by_group(Real* to, const Part& part, const Finish& finish) const {
    const int64_t size = channels / groups;
    for (int64_t first = 0; first < channels; first += size) {
      Real sum = 0;
      for (int64_t k = first; k < first + size; ++k) sum += part(k);
      const Real result = finish(sum / Real(elements));
      for (int64_t k = first; k < first + size; ++k) to[k] = result;
    }
    for (int64_t k = channels; k < pixel; ++k) to[k] = 0;
  }
  template <class Part>
  void by_group(Real* to, const Part& part) const {
    by_group(to, part, [](Real mean) { return mean; });
  }
  Real scalar_gamma(int64_t channel) const { return affine() ? w[channel] : Real(1); }
  Real scalar_tgamma(int64_t channel) const { return affine() ? tw[channel] : Real(0); }

  // A sample's part of the gradient; the first's overwrites.
  void add(Real* dw, int64_t n, const Real* dgamma, const Real* dbeta) const {
    for (int64_t lane = 0; lane < pixel; lane += kLanes<Real>) {
      store(dw + lane, (n == 0 ? V{} : load(dw + lane)) + load(dgamma + lane));
      store(dw + pixel + lane, (n == 0 ? V{} : load(dw + pixel + lane)) + load(dbeta + lane));
    }
  }
};

template <class Real>
void group_norm_fwd(const Call<Real>& c) {
  using V = Vec<Real>;
  const Real* const x = c.x;
  Real *const y = c.y, *const sums = c.scratch;
  const double eps = c.layer->number;
  for (int64_t n = 0; n < c.samples; ++n) {
    const GroupNorm<Real> norm(c, n);
    pixel_sums<Real, 1>(c, n, sums, [=](int64_t i, int64_t, int64_t, V* sum) { sum[0] += load(x + i); });
    norm.by_group(norm.mean, [=](int64_t k) { return sums[k]; });
    pixel_sums<Real, 1>(c, n, sums, [=](int64_t i, int64_t, int64_t lane, V* sum) {
      const V centred = load(x + i) - load(norm.mean + lane);
      sum[0] += centred * centred;
    });
    norm.by_group(
        norm.r, [=](int64_t k) { return sums[k]; },
        [=](Real var) { return Real(1 / __builtin_sqrt(double(var) + eps)); });
    for_each_lane(c, n, [=](int64_t i, int64_t o, int64_t lane) {
      store(y + o, norm.gamma(lane) * norm.xhat(load(x + i), lane) + norm.beta(lane));
    });
  }
}

template <class Real>
void group_norm_bwd(const Call<Real>& c) {
  using V = Vec<Real>;
  const Real *const x = c.x, *const dy = c.dy;
  Real* const dx = c.dx;
  Real *const b = c.scratch, *const g = c.scratch + c.in->pixel;
  for (int64_t n = 0; n < c.samples; ++n) {
    const GroupNorm<Real> norm(c, n);
    pixel_sums<Real, 2>(c, n, b, [=](int64_t i, int64_t o, int64_t lane, V* sum) {
      const V d = load(dy + o);
      sum[0] += d;
      sum[1] += d * norm.xhat(load(x + i), lane);
    });
    if (c.dw != nullptr && norm.affine()) norm.add(c.dw, n, g, b);
    if (dx == nullptr) continue;
    norm.by_group(norm.p, [=](int64_t k) { return norm.scalar_gamma(k) * b[k]; });
    norm.by_group(norm.q, [=](int64_t k) { return norm.scalar_gamma(k) * g[k]; });
    for_each_lane(c, n, [=](int64_t i, int64_t o, int64_t lane) {
      const V xhat = norm.xhat(load(x + i), lane);
      const V u = norm.gamma(lane) * load(dy + o) - load(norm.p + lane) - xhat * load(norm.q + lane);
      store(dx + i, load(norm.r + lane) * u);
    });
  }
}

template <class Real>
void group_norm_tfwd(const Call<Real>& c) {
  using V = Vec<Real>;
  const Real *const x = c.x, *const tx = c.tx;
  Real *const ty = c.ty, *const sums = c.scratch;
  for (int64_t n = 0; n < c.samples; ++n) {
    const GroupNorm<Real> norm(c, n);
    if (tx == nullptr) {
      for_each_lane(c, n, [=](int64_t i, int64_t o, int64_t lane) {
        store(ty + o, norm.tgamma(lane) * norm.xhat(load(x + i), lane) + norm.tbeta(lane));
      });
      continue;
    }
    pixel_sums<Real, 2>(c, n, sums, [=](int64_t i, int64_t, int64_t lane, V* sum) {
      const V t = load(tx + i);
      sum[0] += t;
      sum[1] += t * norm.xhat(load(x + i), lane);
    });
    norm.by_group(norm.m, [=](int64_t k) { return sums[k]; });
    norm.by_group(norm.c, [=](int64_t k) { return sums[norm.pixel + k]; });
    for_each_lane(c, n, [=](int64_t i, int64_t o, int64_t lane) {
      const V xhat = norm.xhat(load(x + i), lane), txhat = norm.txhat(xhat, load(tx + i), lane);
      store(ty + o, norm.tgamma(lane) * xhat + norm.gamma(lane) * txhat + norm.tbeta(lane));
    });
  }
}

template <class Real>
void group_norm_tbwd(const Call<Real>& c) {
  using V = Vec<Real>;
  const Real *const x = c.x, *const tx = c.tx, *const dy = c.dy, *const tdy = c.tdy;
  Real* const tdx = c.tdx;
  Real *const b = c.scratch, *const g = b + c.in->pixel, *const tb = g + c.in->pixel,
              *const tg = tb + c.in->pixel;
  const bool moves = tx != nullptr;
  for (int64_t n = 0; n < c.samples; ++n) {
    const GroupNorm<Real> norm(c, n);
    pixel_sums<Real, 4>(c, n, b, [=](int64_t i, int64_t o, int64_t lane, V* sum) {
      const V d = load(dy + o), td = load(tdy + o), xhat = norm.xhat(load(x + i), lane);
      sum[0] += d;
      sum[1] += d * xhat;
      sum[2] += td;
      sum[3] += td * xhat;
      if (moves) sum[3] += d * norm.txhat(xhat, load(tx + i), lane);
    });
    if (norm.affine()) norm.add(c.tdw, n, tg, tb);
    if (tdx == nullptr) continue;
    norm.by_group(norm.tp,
                  [=](int64_t k) { return norm.scalar_tgamma(k) * b[k] + norm.scalar_gamma(k) * tb[k]; });
    norm.by_group(norm.tq,
                  [=](int64_t k) { return norm.scalar_tgamma(k) * g[k] + norm.scalar_gamma(k) * tg[k]; });
    for_each_lane(c, n, [=](int64_t i, int64_t o, int64_t lane) {
      const V d = load(dy + o), gamma = norm.gamma(lane), r = load(norm.r + lane), q = load(norm.q + lane);
      const V xhat = norm.xhat(load(x + i), lane);
      V tu =
          norm.tgamma(lane) * d + gamma * load(tdy + o) - load(norm.tp + lane) - xhat * load(norm.tq + lane);
      if (moves) {
        tu -= norm.txhat(xhat, load(tx + i), lane) * q;
        tu -= r * load(norm.c + lane) * (gamma * d - load(norm.p + lane) - xhat * q);
      }
      store(tdx + i, r * tu);
    });
  }
}

template <class Real>
constexpr LayerFunctions<Real> kGroupNorm{Split::none, group_norm_fwd<Real>, group_norm_bwd<Real>,
                                          group_norm_tfwd<Real>, group_norm_tbwd<Real>};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
