// Linear layers of few outputs, as regression's last one: there whole vectors of outputs would be mostly
// padding, so the lanes are the inputs and an output is a dot product.
//
//   y[n, o] = b[o] + sum_c w[o, c] x[n, c]
//   bwd    dw[o, :] = sum_n dy[n, o] x[n, :],  db = sum_n dy;  dx[n, :] = sum_o dy[n, o] w[o, :]
//   tfwd   ty = tw x + w tx + tb
//   tbwd   tdw = sum tdy x + dy tx,  tdb = sum tdy;  tdx = sum dy tw + tdy w
//
// dx and tdx are zero where x is, if that came through a ReLU (program.h, `gated`).
// Parameters: w as [C of y][pixel of x], then b [pixel of y] where there is one. Nothing is saved.
// engine/build.cpp puts this layer in the place of linear. Tested by tests/engine/test_layers.py.
#pragma once

#include <type_traits>

#include "call.h"
#include "simd.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// run(number of outputs, a constant): 1 to 4.
template <class Run>
inline void with_outputs(int64_t outputs, const Run& run) {
  switch (outputs) {
    case 1:
      return run(std::integral_constant<int, 1>{});
    case 2:
      return run(std::integral_constant<int, 2>{});
    case 3:
      return run(std::integral_constant<int, 3>{});
    case 4:
      return run(std::integral_constant<int, 4>{});
  }
  __builtin_unreachable();
}

// One pair of factors or two, of which the second may be null.
template <class Real>
struct NarrowPair {
  const Real *first, *second;
};

// y[n, :] = b + w x[n] (+ w1 x1[n]); zeros in y's other lanes.
template <class Real>
void narrow_outputs(const Call<Real>& c, NarrowPair<Real> x, NarrowPair<Real> w, const Real* b, Real* y) {
  const int64_t features = c.in->pixel, lanes = c.out->pixel, samples = c.samples;
  const int64_t from = c.in->sample, to = c.out->sample;
  y += c.out->origin;
  with_outputs(c.out->c, [&](auto outputs) {
    for (int64_t n = 0; n < samples; ++n, y += to) {
      Vec<Real> sum[outputs] = {};
      const auto add = [&](const Real* x, const Real* w) {
        for (int64_t i = 0; i < features; i += kLanes<Real>) {
          const Vec<Real> value = load(x + i);
          for (int o = 0; o < outputs; ++o) sum[o] += value * load(w + o * features + i);
        }
      };
      add(x.first + c.in->origin + n * from, w.first);
      if (x.second != nullptr) add(x.second + c.in->origin + n * from, w.second);
      for (int64_t lane = 0; lane < lanes; lane += kLanes<Real>) store(y + lane, Vec<Real>{});
      for (int o = 0; o < outputs; ++o) y[o] = sum_of_lanes<Real>(sum[o]) + (b == nullptr ? Real(0) : b[o]);
    }
  });
}

// dw[o, :] = sum_n dy[n, o] x[n, :] (+ dy1 x1) and db = sum_n dy, the first of both. x may hold anything in
// the lanes that are padding.
template <class Real>
void narrow_weight_gradient(const Call<Real>& c, NarrowPair<Real> x, NarrowPair<Real> dy, Real* dw) {
  const int64_t features = c.in->pixel, lanes = c.out->pixel, samples = c.samples;
  const int64_t from = c.in->sample, to = c.out->sample;
  with_outputs(c.out->c, [&](auto outputs) {
    for (int64_t i = 0; i < features; i += kLanes<Real>) {
      Vec<Real> sum[outputs] = {};
      const auto add = [&](const Real* x, const Real* dy) {
        for (int64_t n = 0; n < samples; ++n, x += from, dy += to) {
          const Vec<Real> value = load(x);
          for (int o = 0; o < outputs; ++o) sum[o] += dy[o] * value;
        }
      };
      add(x.first + c.in->origin + i, dy.first + c.out->origin);
      if (x.second != nullptr) add(x.second + c.in->origin + i, dy.second + c.out->origin);
      for (int o = 0; o < outputs; ++o) store(dw + o * features + i, sum[o]);
    }
    for (int o = 0; o < outputs; ++o) {
      for (int64_t i = c.in->c; i < features; ++i) dw[o * features + i] = 0;
    }
  });
  if (!c.layer->bias) return;
  for (int64_t lane = 0; lane < lanes; lane += kLanes<Real>) {
    const Real* row = dy.first + c.out->origin + lane;
    Vec<Real> sum{};
    for (int64_t n = 0; n < samples; ++n, row += to) sum += load(row);
    store(dw + c.out->c * features + lane, sum);
  }
}

// dx[n, :] = sum_o dy[n, o] w[o, :] (+ dy1 w1).
template <class Real>
void narrow_input_gradient(const Call<Real>& c, NarrowPair<Real> dy, NarrowPair<Real> w, Real* dx) {
  using V = Vec<Real>;
  const int64_t features = c.in->pixel, samples = c.samples, from = c.in->sample, to = c.out->sample;
  const bool gated = c.layer->gated != 0, both = dy.second != nullptr;
  with_outputs(c.out->c, [&](auto outputs) {
    for (int64_t i = 0; i < features; i += kLanes<Real>) {
      V w0[outputs], w1[outputs] = {};
      for (int o = 0; o < outputs; ++o) {
        w0[o] = load(w.first + o * features + i);
        if (both) w1[o] = load(w.second + o * features + i);
      }
      const int64_t at = c.in->origin + i;
      for (int64_t n = 0; n < samples; ++n) {
        const Real* const d0 = dy.first + c.out->origin + n * to;
        const Real* const d1 = both ? dy.second + c.out->origin + n * to : d0;
        V sum{};
        for (int o = 0; o < outputs; ++o) sum += d0[o] * w0[o] + d1[o] * w1[o];
        if (gated) sum = load(c.x + at + n * from) <= V{} ? V{} : sum;
        store(dx + at + n * from, sum);
      }
    }
  });
}

template <class Real>
void linear_narrow_fwd(const Call<Real>& c) {
  const Real* const b = c.layer->bias ? c.w + c.out->c * c.in->pixel : nullptr;
  narrow_outputs<Real>(c, {c.x, nullptr}, {c.w, nullptr}, b, c.y);
}

template <class Real>
void linear_narrow_bwd(const Call<Real>& c) {
  if (c.dw != nullptr) narrow_weight_gradient<Real>(c, {c.x, nullptr}, {c.dy, nullptr}, c.dw);
  if (c.dx != nullptr) narrow_input_gradient<Real>(c, {c.dy, nullptr}, {c.w, nullptr}, c.dx);
}

template <class Real>
void linear_narrow_tfwd(const Call<Real>& c) {
  const Real* const tb = c.layer->bias ? c.tw + c.out->c * c.in->pixel : nullptr;
  narrow_outputs<Real>(c, {c.x, c.tx}, {c.tw, c.w}, tb, c.ty);
}

template <class Real>
void linear_narrow_tbwd(const Call<Real>& c) {
  narrow_weight_gradient<Real>(c, {c.x, c.tx}, {c.tdy, c.dy}, c.tdw);
  if (c.tdx != nullptr) narrow_input_gradient<Real>(c, {c.tdy, c.dy}, {c.w, c.tw}, c.tdx);
}

template <class Real>
constexpr LayerFunctions<Real> kLinearNarrow{Split::none, linear_narrow_fwd<Real>, linear_narrow_bwd<Real>,
                                             linear_narrow_tfwd<Real>, linear_narrow_tbwd<Real>};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
