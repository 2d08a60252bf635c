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

// Lanes of whole vectors that C of x takes: those of a pixel may be more.
template <class Real>
inline int64_t narrow_features(const Call<Real>& c) {
  constexpr int64_t kL = kLanes<Real>;
  return (c.in->c + kL - 1) / kL * kL;
}

// So many rows or vectors at once: each output's is a chain of additions, and together they fill the
// registers.
constexpr int narrow_at_once(int outputs) { return outputs == 1 ? 4 : outputs == 2 ? 2 : 1; }

// run(first, a constant): 0..count in parts of so many, then of half as many.
template <int kAtOnce, class Run>
inline void in_blocks(int64_t count, const Run& run, int64_t first = 0) {
  for (; first + kAtOnce <= count; first += kAtOnce) run(first, std::integral_constant<int, kAtOnce>{});
  if constexpr (kAtOnce > 1) in_blocks<kAtOnce / 2>(count, run, first);
}

// One by one, in registers: the compiler would clear the array in memory.
template <class V, int kRows, int kColumns>
inline void clear(V (&all)[kRows][kColumns]) {
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) all[i][j] = V{};
  }
}

// y[n, :] = b + w x[n] (+ w1 x1[n]); zeros in y's other lanes.
template <class Real>
void narrow_outputs(const Call<Real>& c, NarrowPair<Real> x, NarrowPair<Real> w, const Real* b, Real* y) {
  const int64_t row = c.in->pixel, features = narrow_features(c), lanes = c.out->pixel;
  const int64_t from = c.in->sample, to = c.out->sample;
  y += c.out->origin;
  with_outputs(c.out->c, [&](auto outputs) {
    constexpr int kOutputs = decltype(outputs)::value;
    in_blocks<narrow_at_once(kOutputs)>(c.samples, [&](int64_t first, auto at_once) {
      constexpr int kSamples = decltype(at_once)::value;
      Vec<Real> sum[kSamples][kOutputs];
      clear(sum);
      const auto add = [&](const Real* x, const Real* w) {
        x += c.in->origin + first * from;
        for (int64_t i = 0; i < features; i += kLanes<Real>) {
          for (int o = 0; o < kOutputs; ++o) {
            const Vec<Real> weight = load(w + o * row + i);
            for (int n = 0; n < kSamples; ++n) sum[n][o] += load(x + n * from + i) * weight;
          }
        }
      };
      add(x.first, w.first);
      if (x.second != nullptr) add(x.second, w.second);
      for (int n = 0; n < kSamples; ++n) {
        Real* const out = y + (first + n) * to;
        for (int64_t lane = 0; lane < lanes; lane += kLanes<Real>) store(out + lane, Vec<Real>{});
        for (int o = 0; o < kOutputs; ++o)
          out[o] = sum_of_lanes<Real>(sum[n][o]) + (b == nullptr ? Real(0) : b[o]);
      }
    });
  });
}

// dw[o, :] = sum_n dy[n, o] x[n, :] (+ dy1 x1) and db = sum_n dy, the first of both. x may hold anything in
// the lanes that are padding.
template <class Real>
void narrow_weight_gradient(const Call<Real>& c, NarrowPair<Real> x, NarrowPair<Real> dy, Real* dw) {
  const int64_t row = c.in->pixel, lanes = c.out->pixel, samples = c.samples;
  const int64_t from = c.in->sample, to = c.out->sample;
  with_outputs(c.out->c, [&](auto outputs) {
    constexpr int kOutputs = decltype(outputs)::value;
    in_blocks<narrow_at_once(kOutputs)>(narrow_features(c) / kLanes<Real>, [&](int64_t first, auto at_once) {
      constexpr int kVectors = decltype(at_once)::value;
      const int64_t i = first * kLanes<Real>;
      Vec<Real> sum[kOutputs][kVectors];
      clear(sum);
      const auto add = [&](const Real* x, const Real* dy) {
        x += c.in->origin + i, dy += c.out->origin;
        for (int64_t n = 0; n < samples; ++n, x += from, dy += to) {
          for (int v = 0; v < kVectors; ++v) {
            const Vec<Real> value = load(x + v * kLanes<Real>);
            for (int o = 0; o < kOutputs; ++o) sum[o][v] += dy[o] * value;
          }
        }
      };
      add(x.first, dy.first);
      if (x.second != nullptr) add(x.second, dy.second);
      for (int o = 0; o < kOutputs; ++o) {
        for (int v = 0; v < kVectors; ++v) {
          const int64_t at = o * row + i + v * kLanes<Real>;
          store(dw + at, c.onto.at(at, sum[o][v]));
        }
      }
    });
    for (int o = 0; o < kOutputs; ++o) {
      for (int64_t i = c.in->c; i < row; ++i) dw[o * row + i] = 0;
    }
  });
  if (!c.layer->bias) return;
  const int64_t bias_at = c.out->c * row;
  sum_rows(dy.first + c.out->origin, samples, to, lanes, c.onto.from(bias_at), dw + bias_at);
}

// dx[n, :] = sum_o dy[n, o] w[o, :] (+ dy1 w1).
template <class Real, bool kBoth>
void narrow_input_gradient(const Call<Real>& c, NarrowPair<Real> dy, NarrowPair<Real> w, Real* dx) {
  using V = Vec<Real>;
  const int64_t row = c.in->pixel, features = narrow_features(c), samples = c.samples;
  const int64_t from = c.in->sample, to = c.out->sample;
  const bool gated = c.layer->gated != 0;
  with_outputs(c.out->c, [&](auto outputs) {
    for (int64_t i = 0; i < features; i += kLanes<Real>) {
      V w0[outputs], w1[outputs] = {};
      for (int o = 0; o < outputs; ++o) {
        w0[o] = load(w.first + o * row + i);
        if constexpr (kBoth) w1[o] = load(w.second + o * row + i);
      }
      const int64_t at = c.in->origin + i;
      for (int64_t n = 0; n < samples; ++n) {
        const Real* const d0 = dy.first + c.out->origin + n * to;
        V sum{};
        for (int o = 0; o < outputs; ++o) sum += d0[o] * w0[o];
        if constexpr (kBoth) {
          const Real* const d1 = dy.second + c.out->origin + n * to;
          for (int o = 0; o < outputs; ++o) sum += d1[o] * w1[o];
        }
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
  if (c.dx != nullptr) narrow_input_gradient<Real, false>(c, {c.dy, nullptr}, {c.w, nullptr}, c.dx);
}

template <class Real>
void linear_narrow_tfwd(const Call<Real>& c) {
  const Real* const tb = c.layer->bias ? c.tw + c.out->c * c.in->pixel : nullptr;
  narrow_outputs<Real>(c, {c.x, c.tx}, {c.tw, c.w}, tb, c.ty);
}

template <class Real>
void linear_narrow_tbwd(const Call<Real>& c) {
  if (c.tdx != nullptr) narrow_input_gradient<Real, true>(c, {c.tdy, c.dy}, {c.w, c.tw}, c.tdx);
  narrow_weight_gradient<Real>(c, {c.x, c.tx}, {c.tdy, c.dy}, c.tdw);
}

template <class Real>
constexpr LayerFunctions<Real> kLinearNarrow{Split::none,
                                             linear_narrow_fwd<Real>,
                                             linear_narrow_bwd<Real>,
                                             linear_narrow_tfwd<Real>,
                                             linear_narrow_tbwd<Real>,
                                             true};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
