// One step of the coordinatewise LSTM optimiser on CUDA, and its vector-Jacobian product; overwrites. The
// equations and the order of work are those of cpu/lstm_cell.h:
//
//   Z_l = (inputs; h_l; 1),  (K, tile)       G = (W_l V_l b_l) Z_l
//   backward    d(W_l V_l b_l) += dG Z_l',    dZ_l = (W_l V_l)' dG
//
// A block takes a tile of 64 coordinates, a thread two of them, a warp a share of the products' outputs. What
// a tile's step makes lies in rows of coordinates, in shared memory where they fit, else in the block's piece
// of a workspace; weights pass through shared memory a tile at a time, where a warp's lanes read the same
// one. Rows are one longer than the tile, so that lanes that read a column read from different banks.
//
// The backward computes the forward again. Of the weights' gradients each thread has its own, sums them over
// the coordinates of a tile in order, and over the block's tiles in the block's row of `partial`; a second
// kernel adds a task's rows up in order. Tested by tests/ops/test_lstm.py on the emulator, and where there is
// a GPU.
#pragma once

#include "../lstm.h"
#include "gpu.h"
#include "layers/elements.cuh"

namespace metafast::METAFAST_GPU {

// Lstm by value, without the host's arrays.
template <class Real>
struct LstmLaunch {
  int hidden, layers;
  int64_t coordinates, tiles;  // of a task, which is a block's y
  Real p, least, steep;
  const Real* weights[3 * kMostLstmLayers + 2];
  const Real *grads, *state;
  Real *updates, *next;
  const Real *d_updates, *d_next;
  Real *d_grads, *d_state;
  Real* rows;     // (T, blocks, rows of a tile, kLstmRow) where shared memory is too small
  int64_t count;  // numbers of all weights
  Real* partial;  // (T, blocks, count) of the weights' gradients
};

constexpr int kLstmThreads = 128, kLstmWarps = kLstmThreads / 32;
constexpr int kLstmTile = 64;            // coordinates
constexpr int kLstmRow = kLstmTile + 1;  // between rows
constexpr int kLstmOutputs = 8;          // of a warp at a time: the gates of two units
constexpr int kLstmDepth = 64;           // of the weights in shared memory at a time
constexpr int kLstmStaged = kLstmWarps * kLstmOutputs;
constexpr int kLstmStagedRow = kLstmStaged + 4;  // spreads the writes over banks, keeps vectors aligned
constexpr int kLstmWeightTile = kLstmDepth * kLstmStagedRow;

template <class Real>
__device__ Real logistic(Real x) {
  return Real(1) / (Real(1) + std::exp(-x));
}

template <class Real>
class LstmTile {
 public:
  __device__ LstmTile(const LstmLaunch<Real>& launch, Real* staged)
      : a_(launch),
        staged_(staged),
        h_(launch.hidden),
        warp_(int(threadIdx.x) / 32),
        lane_(int(threadIdx.x) % 32),
        task_(blockIdx.y * launch.coordinates) {}

  __device__ int inputs(int l) const { return l == 0 ? 2 : h_; }
  // Rows of layer l's Z but the ones; of its weights the first in the user's order.
  __device__ int depth(int l) const { return inputs(l) + h_; }
  __device__ int64_t first_weight(int l) const {
    return l == 0 ? 0 : 4 * int64_t(h_) * (3 + h_ + int64_t(l - 1) * (2 * h_ + 1));
  }

  __device__ void begin(int64_t tile) {
    first_ = tile * kLstmTile;
    const int64_t left = a_.coordinates - first_;
    count_ = left < kLstmTile ? int(left) : kLstmTile;
  }

  // A coordinate's share of (N,), 0 where there is none; for the threads below kLstmTile.
  __device__ Real one(const Real* of) const {
    return of != nullptr && int(threadIdx.x) < count_ ? of[task_ + first_ + threadIdx.x] : Real(0);
  }
  __device__ void write_one(Real value, Real* to) const {
    if (int(threadIdx.x) < count_) to[task_ + first_ + threadIdx.x] = value;
  }

  __device__ void preprocess(Real* z) const {
    if (threadIdx.x >= kLstmTile) return;
    const Real g = one(a_.grads), size = std::fabs(g);
    const bool small = size < a_.least;
    z[threadIdx.x] = small ? Real(-1) : std::log(size) / a_.p;
    z[kLstmRow + threadIdx.x] = small ? a_.steep * g : g > 0 ? Real(1) : g < 0 ? Real(-1) : g;
  }

  // Plane `plane` of (.., N, H) as H rows, zeros where it is null and beyond the last coordinate; and back.
  __device__ void read(const Real* planes, int plane, Real* rows) const {
    const int64_t first = first_of(plane);
    const int there = planes == nullptr ? 0 : count_ * h_;
    for (int at = int(threadIdx.x); at < kLstmTile * h_; at += kLstmThreads)
      rows[at % h_ * kLstmRow + at / h_] = at < there ? planes[first + at] : Real(0);
  }
  __device__ void write(const Real* rows, Real* planes, int plane) const {
    Real* const to = planes + first_of(plane);
    for (int at = int(threadIdx.x); at < count_ * h_; at += kLstmThreads)
      to[at] = rows[at % h_ * kLstmRow + at / h_];
  }

  // h of layer l, H rows, from Z and c, which the new c replaces, unless the activated gates are wanted, 4H
  // rows. Begins with a barrier.
  __device__ void forward(int l, const Real* z, Real* c, Real* out, Real* gates) const {
    const Real *const w = a_.weights[3 * l], *const v = a_.weights[3 * l + 1],
                      *const b = a_.weights[3 * l + 2];
    const int h = h_, n = inputs(l), lane = lane_, gate = h * kLstmRow;
    product(
        4 * h, n + h, z,
        [=](int output, int d) {
          const int row = output % 4 * h + output / 4;
          return d < n ? w[row * n + d] : v[row * h + d - n];
        },
        [=](int first, const Real(&sums)[2][kLstmOutputs]) {
          for (int unit = 0; unit < kLstmOutputs / 4; ++unit) {
            const int j = first / 4 + unit;
            if (j >= h) continue;
            for (int half = 0; half < 2; ++half) {
              const Real* const s = sums[half] + 4 * unit;
              const int at = j * kLstmRow + lane + 32 * half;
              const Real in = logistic(b[j] + s[0]), forget = logistic(b[h + j] + s[1]),
                         candidate = std::tanh(b[2 * h + j] + s[2]), output = logistic(b[3 * h + j] + s[3]);
              const Real now = forget * c[at] + in * candidate;
              out[at] = output * std::tanh(now);
              if (gates == nullptr) {
                c[at] = now;
              } else {
                gates[at] = in, gates[gate + at] = forget;
                gates[2 * gate + at] = candidate, gates[3 * gate + at] = output;
              }
            }
          }
        });
  }

  // From the cotangents of h, d + u, and of c, v: those of the gates before their activation, in place of
  // the gates, and of c before the step, in place of v.
  __device__ void backward_gates(const Real* d, const Real* u, Real* v, const Real* c, Real* gates) const {
    const int gate = h_ * kLstmRow;
    for (int e = int(threadIdx.x); e < h_ * kLstmTile; e += kLstmThreads) {
      const int at = e / kLstmTile * kLstmRow + e % kLstmTile;
      const Real in = gates[at], forget = gates[gate + at], candidate = gates[2 * gate + at],
                 out = gates[3 * gate + at], before = c[at], t = std::tanh(forget * before + in * candidate);
      const Real d_h = d[at] + u[at], d_c = v[at] + d_h * out * (1 - t * t);
      gates[at] = d_c * candidate * in * (1 - in);
      gates[gate + at] = d_c * before * forget * (1 - forget);
      gates[2 * gate + at] = d_c * in * (1 - candidate * candidate);
      gates[3 * gate + at] = d_h * t * out * (1 - out);
      v[at] = d_c * forget;
    }
  }

  // d_w = or += dG Z': a thread has the four gates of a unit and four columns at a time.
  __device__ void backward_weights(int l, const Real* z, const Real* d_gates, bool add, Real* d_w) const {
    const int h = h_, n = inputs(l), deep = n + h, columns = (deep + 1 + 3) / 4;
    for (int share = int(threadIdx.x); share < h * columns; share += kLstmThreads) {
      const int j = share / columns, k = share % columns;
      Real sums[4][4] = {};
      for (int i = 0; i < kLstmTile; ++i) {
        Real x[4];
        for (int q = 0; q < 4; ++q) {
          const int row = k + q * columns;
          x[q] = row < deep ? z[row * kLstmRow + i] : Real(1);  // the bias; columns beyond it are dropped
        }
        for (int gate = 0; gate < 4; ++gate) {
          const Real d = d_gates[(gate * h + j) * kLstmRow + i];
          for (int q = 0; q < 4; ++q) sums[gate][q] += d * x[q];
        }
      }
      for (int gate = 0; gate < 4; ++gate) {
        const int row = gate * h + j;
        for (int q = 0; q < 4; ++q) {
          const int column = k + q * columns;
          if (column > deep) continue;
          const int64_t at = column < n      ? int64_t(row) * n + column
                             : column < deep ? int64_t(4) * h * n + int64_t(row) * h + column - n
                                             : int64_t(4) * h * deep + row;
          d_w[at] = add ? d_w[at] + sums[gate][q] : sums[gate][q];
        }
      }
    }
  }

  // dZ = (W V)' dG: the inputs' rows to d, the state's to u. Begins with a barrier.
  __device__ void backward_inputs(int l, const Real* d_gates, Real* d, Real* u) const {
    const Real *const w = a_.weights[3 * l], *const v = a_.weights[3 * l + 1];
    const int h = h_, n = inputs(l), lane = lane_;
    product(
        n + h, 4 * h, d_gates, [=](int k, int g) { return k < n ? w[g * n + k] : v[g * h + k - n]; },
        [=](int first, const Real(&sums)[2][kLstmOutputs]) {
          for (int o = 0; o < kLstmOutputs; ++o) {
            const int k = first + o;
            if (k >= n + h) continue;
            Real* const to = (k < n ? d + k * kLstmRow : u + (k - n) * kLstmRow) + lane;
            to[0] = sums[0][o], to[32] = sums[1][o];
          }
        });
  }

  // The updates' cotangents in row d_updates: the output's weights', and d of the last h.
  __device__ void backward_output(const Real* d_updates, const Real* top, bool add, Real* d_w,
                                  Real* d) const {
    for (int j = int(threadIdx.x); j <= h_; j += kLstmThreads) {
      Real sum = 0;
      for (int i = 0; i < kLstmTile; ++i) sum += d_updates[i] * (j < h_ ? top[j * kLstmRow + i] : Real(1));
      d_w[j] = add ? d_w[j] + sum : sum;
    }
    const Real* const w = a_.weights[3 * a_.layers];
    for (int e = int(threadIdx.x); e < h_ * kLstmTile; e += kLstmThreads)
      d[e / kLstmTile * kLstmRow + e % kLstmTile] = w[e / kLstmTile] * d_updates[e % kLstmTile];
  }

 private:
  // Of the task's planes (2 L, N, H), the tile's first number.
  __device__ int64_t first_of(int plane) const {
    return (2 * a_.layers * task_ + plane * a_.coordinates + first_) * h_;
  }

  // Output o is the sum over d of weight(o, d) z[d]; each warp has kLstmOutputs of them at a time, of both
  // its coordinates, and gives them to emit(first, sums). The first barrier is before it reads z.
  template <class Weight, class Emit>
  __device__ void product(int outputs, int deep, const Real* z, Weight weight, Emit emit) const {
    for (int first = 0; first < outputs; first += kLstmStaged) {
      const int mine = first + warp_ * kLstmOutputs;
      Real sums[2][kLstmOutputs] = {};
      for (int start = 0; start < deep; start += kLstmDepth) {
        const int here = deep - start < kLstmDepth ? deep - start : kLstmDepth;
        __syncthreads();  // all have read what is staged
        for (int at = int(threadIdx.x); at < here * kLstmStaged; at += kLstmThreads) {
          const int output = at / here, d = at % here;
          staged_[d * kLstmStagedRow + output] =
              first + output < outputs ? weight(first + output, start + d) : Real(0);
        }
        __syncthreads();
        if (mine >= outputs) continue;
        const Real *x = z + start * kLstmRow + lane_, *w = staged_ + warp_ * kLstmOutputs;
        for (int d = 0; d < here; ++d, x += kLstmRow, w += kLstmStagedRow) {
          const Real low = x[0], high = x[32];
          for (int o = 0; o < kLstmOutputs; ++o) {
            sums[0][o] += w[o] * low;
            sums[1][o] += w[o] * high;
          }
        }
      }
      if (mine < outputs) emit(mine, sums);
    }
  }

  const LstmLaunch<Real>& a_;
  Real* staged_;
  int h_, warp_, lane_, count_ = 0;
  int64_t task_, first_ = 0;  // coordinates before the task's, and of it before the tile's
};

// Which of all blocks this is.
__device__ inline int64_t lstm_block() { return int64_t(blockIdx.y) * gridDim.x + blockIdx.x; }

// Forward: Z twice, which change places from layer to layer, and c.
inline int64_t lstm_forward_rows(int64_t hidden) { return 2 * (hidden + (hidden < 2 ? 2 : hidden)) + hidden; }

template <class Real, bool kShared>
__global__ void __launch_bounds__(kLstmThreads, 1)
    lstm_forward_kernel(const LstmLaunch<Real> a, int64_t rows) {
  METAFAST_DYNAMIC_SHARED(Real, memory);
  LstmTile<Real> tile(a, memory);
  const int h = a.hidden, both = (h + (h < 2 ? 2 : h)) * kLstmRow;
  Real *z = kShared ? memory + kLstmWeightTile : a.rows + lstm_block() * rows * kLstmRow, *other = z + both;
  Real* const c = other + both;
  for (int64_t at = blockIdx.x; at < a.tiles; at += gridDim.x) {
    tile.begin(at);
    __syncthreads();
    tile.preprocess(z);
    for (int l = 0; l < a.layers; ++l) {
      tile.read(a.state, 2 * l, z + tile.inputs(l) * kLstmRow);
      tile.read(a.state, 2 * l + 1, c);
      tile.forward(l, z, c, other, nullptr);
      __syncthreads();
      tile.write(other, a.next, 2 * l);
      tile.write(c, a.next, 2 * l + 1);  // and a thread reads the next layer's where it took this one's from
      Real* const out = other;
      other = z, z = out;
    }
    if (threadIdx.x < kLstmTile) {
      const Real* const w = a.weights[3 * a.layers];
      Real sum = *a.weights[3 * a.layers + 1];
      for (int j = 0; j < h; ++j) sum += w[j] * z[j * kLstmRow + threadIdx.x];
      tile.write_one(sum, a.updates);
    }
  }
}

// Backward: of each layer Z, gates and c; the last h; the cotangents u and v of h and c, d of a layer's
// inputs, and those of the updates.
inline int64_t lstm_backward_rows(int64_t hidden, int64_t layers) {
  return 2 + 6 * hidden + (layers - 1) * 7 * hidden + 3 * hidden + (hidden < 2 ? 2 : hidden) + 1;
}

template <class Real, bool kShared>
__global__ void __launch_bounds__(kLstmThreads, 1)
    lstm_backward_kernel(const LstmLaunch<Real> a, int64_t rows) {
  METAFAST_DYNAMIC_SHARED(Real, memory);
  LstmTile<Real> tile(a, memory);
  const int h = a.hidden, unit = h * kLstmRow;
  Real* const all = kShared ? memory + kLstmWeightTile : a.rows + lstm_block() * rows * kLstmRow;
  // Layer l's Z, then its gates and c; after the last layer's lies its h.
  const auto z_of = [=](int l) { return all + (l == 0 ? 0 : 2 * kLstmRow + 6 * unit + (l - 1) * 7 * unit); };
  const auto gates_of = [=](int l) { return z_of(l) + unit + (l == 0 ? 2 * kLstmRow : unit); };
  Real *const top = z_of(a.layers), *const u = top + unit, *const v = u + unit, *const d_updates = v + unit,
              *const d = d_updates + kLstmRow, *const d_w = a.partial + lstm_block() * a.count;
  bool add = false;
  for (int64_t at = blockIdx.x; at < a.tiles; at += gridDim.x, add = true) {
    tile.begin(at);
    __syncthreads();
    tile.preprocess(z_of(0));
    if (threadIdx.x < kLstmTile) d_updates[threadIdx.x] = tile.one(a.d_updates);
    for (int l = 0; l < a.layers; ++l) {
      tile.read(a.state, 2 * l, z_of(l) + tile.inputs(l) * kLstmRow);
      tile.read(a.state, 2 * l + 1, gates_of(l) + 4 * unit);
    }
    for (int l = 0; l < a.layers; ++l)
      tile.forward(l, z_of(l), gates_of(l) + 4 * unit, z_of(l + 1), gates_of(l));
    __syncthreads();
    tile.backward_output(d_updates, top, add, d_w + a.count - h - 1, d);
    for (int l = a.layers - 1; l >= 0; --l) {
      Real* const gates = gates_of(l);
      tile.read(a.d_next, 2 * l, u);
      tile.read(a.d_next, 2 * l + 1, v);
      __syncthreads();
      tile.backward_gates(d, u, v, gates + 4 * unit, gates);
      __syncthreads();
      tile.backward_weights(l, z_of(l), gates, add, d_w + tile.first_weight(l));
      tile.backward_inputs(l, gates, d, u);
      __syncthreads();
      tile.write(u, a.d_state, 2 * l);
      tile.write(v, a.d_state, 2 * l + 1);  // as in the forward
    }
    if (threadIdx.x < kLstmTile) {
      const Real g = tile.one(a.grads);
      // d log|g| / dg is 1 / g; the sign does not move.
      tile.write_one(
          std::fabs(g) >= a.least ? d[threadIdx.x] / (a.p * g) : a.steep * d[kLstmRow + threadIdx.x],
          a.d_grads);
    }
  }
}

// d_weights (T, count), the sums of a task's rows of `partial`.
template <class Real>
__global__ void __launch_bounds__(kElementThreads, 1)
    lstm_sum_kernel(int64_t tasks, int64_t blocks, int64_t count, const Real* partial, Real* d_weights) {
  for_each_element(tasks, count, [&](int64_t t, int64_t at) {
    Real sum = 0;
    for (int64_t block = 0; block < blocks; ++block) sum += partial[(t * blocks + block) * count + at];
    d_weights[t * count + at] = sum;
  });
}

}  // namespace metafast::METAFAST_GPU
