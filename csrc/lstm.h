// The coordinatewise LSTM optimiser: what its kernels get. The equations stand in metafast/lstm.py.
#pragma once

#include <cstdint>

namespace metafast {

constexpr int64_t kMostLstmLayers = 8;

// H hidden units, L layers; gates i, f, m, o.
template <class Real>
struct LstmWeights {
  int64_t hidden, layers;
  Real p, least, steep;  // range of the preprocessing, e^-p, e^p
  const Real* const*
      weights;        // for each layer (4H, inputs), (4H, H), (4H,), inputs being 2, then H; (H,), ()
  const Real* start;  // (L, 2, H): h and c before the first step of an inner loop; null: zeros

  // Numbers of all weights together, and with those of `start` after them.
  int64_t count() const {
    return 4 * hidden * (2 + (layers - 1) * hidden + layers * (hidden + 1)) + hidden + 1;
  }
  int64_t count_with_start() const { return count() + (start == nullptr ? 0 : 2 * layers * hidden); }
};

// K steps of N coordinates along gradients that are known. On CUDA K is 1, and of T tasks, of N coordinates
// each, all arrays have T rows as they are here.
template <class Real>
struct Lstm {
  const LstmWeights<Real>* rule;
  int64_t steps, coordinates;
  const Real* grads;               // (K, N)
  const Real* state;               // (L, 2, N, H): h, c
  Real *updates, *next;            // forward: (K, N), (L, 2, N, H)
  const Real *d_updates, *d_next;  // backward: cotangents of these, null: zero
  Real *d_grads, *d_state;         // of these; the latter null on the CPU: not wanted
  int64_t tasks = 1;               // T, on CUDA
};

// Coordinates of a block: four vectors of 64 bytes.
template <class Real>
constexpr int64_t kLstmBlock = 256 / int64_t(sizeof(Real));

template <class Real>
constexpr int64_t lstm_blocks(int64_t coordinates) {
  return (coordinates + kLstmBlock<Real> - 1) / kLstmBlock<Real>;
}

}  // namespace metafast
