// MAML's whole meta-step for a small chain of linear layers: what its kernel gets.
//
//   phi_0 = theta, phi_k+1 = phi_k - lr grad L_s(phi_k)      loss = L_q(phi_K)
//   a_K = grad L_q(phi_K), a_k = a_k+1 - lr H_s(phi_k) a_k+1    d loss / d theta = a_0 (first order: a_K)
//
// Letters: T tasks, K inner steps, P parameters, N samples of a task, D features. Parameters are layer by
// layer (D_l+1, D_l) weights, then (D_l+1,) biases; `source` says where each of them lies in the caller's
// order.
#pragma once

#include <cstdint>

namespace metafast {

constexpr int kMostMlpLayers = 8;

struct MlpShape {
  int layers;                      // linear ones; between them the activation
  int widths[kMostMlpLayers + 1];  // D_0, what goes in, to what comes out
  bool tanh;                       // or ReLU
  bool cross_entropy;              // or mean squared error

  int weights_at(int layer) const { return layer == 0 ? 0 : weights_at(layer - 1) + size_of(layer - 1); }
  int size_of(int layer) const { return widths[layer + 1] * (widths[layer] + 1); }
  int size() const { return weights_at(layers); }  // P
};

template <class Real>
struct MlpSet {
  int64_t samples;        // N
  const Real* x;          // (T, N, D_0)
  const Real* targets;    // (T, N, D_L), of the mean squared error
  const int64_t* labels;  // (T, N), of the cross-entropy; in range
};

template <class Real>
struct MlpMetaStep {
  MlpShape shape;
  int64_t tasks, steps;
  Real lr;
  bool first_order;
  // (size,): which parameter each element of theta and of a gradient is, -1: none, 0; null: the same, size P.
  const int64_t* source;
  int64_t size;
  const Real* theta;  // (size,)
  MlpSet<Real> support, query;
  Real *losses, *logits, *grads;  // (T,), (T, Nq, D_L), (T, size), overwritten; grads null: not wanted
  Real* tape;                     // (T, K, P) of any content, unless first order or without grads
};

}  // namespace metafast
