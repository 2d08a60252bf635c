// Losses of one task, over N samples of D outputs f (features), and their derivatives.
//
//   cross_entropy  mean_n -log softmax(f_n)[y_n]   df = (softmax - onehot) / N  tdf = s (tf - <s, tf>) / N
//   mse            mean over all N D of (f - y)^2  df = 2 (f - y) / (N D)       tdf = 2 tf / (N D)
//
// Overwrite df, tdf, zero in lanes D.. of each pixel. Tested by tests/engine/test_layers.py.
#pragma once

#include "call.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// Targets of one task: labels (N,) for cross_entropy, targets (N, D) for mse; the other is null.
template <class Real>
struct Targets {
  const int64_t* labels;
  const Real* values;
};

inline float exponential(float x) { return __builtin_expf(x); }
inline double exponential(double x) { return __builtin_exp(x); }
inline float logarithm(float x) { return __builtin_logf(x); }
inline double logarithm(double x) { return __builtin_log(x); }

// Softmax of one sample's D outputs into s; returns log sum exp.
template <class Real>
inline Real softmax(const Real* f, int64_t d, Real* s) {
  Real top = f[0], sum = 0;
  for (int64_t c = 1; c < d; ++c) top = f[c] > top ? f[c] : top;
  for (int64_t c = 0; c < d; ++c) sum += s[c] = exponential(f[c] - top);
  const Real scale = Real(1) / sum;
  for (int64_t c = 0; c < d; ++c) s[c] *= scale;
  return top + logarithm(sum);
}

// The loss; df may be null where only the loss is wanted, but `scratch` (D) not then.
template <class Real>
Real loss_gradient(LossKind kind, const Value& v, int64_t samples, const Real* f, Targets<Real> y, Real* df,
                   Real* scratch) {
  const int64_t d = v.c;
  Real total = 0;
  const Real per_sample = Real(1) / Real(samples), per_element = Real(1) / Real(samples * d);
  for (int64_t n = 0; n < samples; ++n) {
    const Real* out = f + v.origin + n * v.sample;
    Real* gradient = df == nullptr ? scratch : df + v.origin + n * v.sample;
    if (kind == LossKind::cross_entropy) {
      total += (softmax(out, d, gradient) - out[y.labels[n]]) * per_sample;
      gradient[y.labels[n]] -= Real(1);
      for (int64_t c = 0; c < d; ++c) gradient[c] *= per_sample;
    } else {
      const Real* target = y.values + n * d;
      Real sum = 0;
      for (int64_t c = 0; c < d; ++c) {
        const Real difference = out[c] - target[c];
        sum += difference * difference;
        gradient[c] = 2 * per_element * difference;
      }
      total += sum * per_element;
    }
    if (df == nullptr) continue;
    for (int64_t c = d; c < v.pixel; ++c) gradient[c] = 0;
  }
  return total;
}

// tdf along tf.
template <class Real>
void loss_gradient_tangent(LossKind kind, const Value& v, int64_t samples, const Real* f, const Real* tf,
                           Real* tdf) {
  const int64_t d = v.c;
  for (int64_t n = 0; n < samples; ++n) {
    const int64_t at = v.origin + n * v.sample;
    Real* result = tdf + at;
    if (kind == LossKind::cross_entropy) {
      softmax(f + at, d, result);
      Real mean = 0;
      for (int64_t c = 0; c < d; ++c) mean += result[c] * tf[at + c];
      for (int64_t c = 0; c < d; ++c) result[c] *= (tf[at + c] - mean) / Real(samples);
    } else {
      for (int64_t c = 0; c < d; ++c) result[c] = 2 * tf[at + c] / Real(samples * d);
    }
    for (int64_t c = d; c < v.pixel; ++c) result[c] = 0;
  }
}

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
