// One step of the coordinatewise LSTM optimiser: what the kernels get. The equations stand in
// metafast/lstm.py.
#pragma once

#include <cstdint>

namespace metafast {

constexpr int64_t kMostLstmLayers = 8;

// N coordinates, H hidden units, L layers; gates i, f, m, o.
template <class Real>
struct Lstm {
  int64_t coordinates, hidden, layers;
  Real p, least, steep;  // range of the preprocessing, e^-p, e^p
  const Real* grads;     // (N,)
  const Real* state;     // (L, 2, N, H): h, c
  const Real* const*
      weights;               // for each layer (4H, inputs), (4H, H), (4H,), inputs being 2, then H; (H,), ()
  const int64_t* gate_rows;  // (4H,): k * kLstmBlock
  Real *updates, *next;      // forward: (N,), (L, 2, N, H)
  const Real *d_updates, *d_next;  // backward: cotangents of these, null: zero
  Real *d_grads, *d_state;         // of these
};

// Coordinates of a block: four vectors of 64 bytes.
template <class Real>
constexpr int64_t kLstmBlock = 256 / int64_t(sizeof(Real));

}  // namespace metafast
