// MAML's meta-step of a small chain of linear layers on CUDA, a block a task, one launch; overwrites. The
// equations stand in ../mlp_meta_step.h. Parameters, adjoint and activations are in shared memory; only the
// parameters before each step, which the way back needs again, go to a tape in global memory.
//
// A sweep goes forward and back through the network, with the tangents of both where Hessian times vector is
// wanted (forward over reverse): with X_0 the inputs, Z_l = X_l W_l' + b_l, X_l+1 = act(Z_l),
//
//   tZ = tX W' + X V' + v_b                tX = act'(Z) tZ
//   dX = dZ W        dZ = act' dX          tdX = tdZ W + dZ V      tdZ = act' tdX + act'' tZ dX
//   dW = dZ' X                             tdW = tdZ' X + dZ' tX
//
// V being the vector, tZ of the loss' inputs giving tdZ there. Each output has one thread, which sums in
// order: the bits hang on nothing else. Rows of activations have an odd length, so that lanes that read a
// column read from different banks. Tested by tests/ops/test_mlp_meta_step.py.
#pragma once

#include "../mlp_meta_step.h"
#include "gpu.h"

namespace metafast::METAFAST_GPU {

constexpr int kMlpThreads = 256;

// Where things are in shared memory, and in a task's parameters; counted on the host.
struct MlpLayout {
  int weights_at[kMostMlpLayers + 1];  // the last one is P
  int x_at[kMostMlpLayers + 1];        // X_l from l = 1 up; tX_l follows it
  int d_at, losses_at, size;           // dZ twice, tdZ twice; (N,); elements
  int rows;                            // the larger set's N
  int d_size;                          // of one dZ

  static int row(int width) { return width | 1; }

  MlpLayout(const MlpShape& shape, int samples) : rows(samples) {
    int at = 2 * shape.size(), most = 1;
    for (int l = 0; l <= shape.layers; ++l) {
      weights_at[l] = shape.weights_at(l);
      x_at[l] = at;
      if (l == 0) continue;
      const int width = row(shape.widths[l]);
      most = most < width ? width : most;
      at += 2 * rows * width;
    }
    d_at = at, d_size = rows * most;
    losses_at = d_at + 4 * d_size;
    size = losses_at + rows;
  }
};

template <class Real>
class MlpTask {
 public:
  __device__ MlpTask(const MlpMetaStep<Real>& step, const MlpLayout& layout, Real* memory, int64_t task)
      : a_(step),
        at_(layout),
        memory_(memory),
        phi(memory),
        adjoint(memory + layout.weights_at[step.shape.layers]),
        task_(task) {}

  // Gradients, or with tangents Hessian times `adjoint`, of the mean loss: take(parameter, value) for each,
  // once the layer's weights are read no more. Then all threads are at one point, as they must be before.
  template <bool kTangents, class Take>
  __device__ void sweep(const MlpSet<Real>& set, Take take, Real* loss, Real* outputs) const {
    const int n = int(set.samples);
    const Real* const inputs = set.x + task_ * n * a_.shape.widths[0];
    for (int l = 0; l < a_.shape.layers; ++l) {
      forward<kTangents>(l, n, inputs);
      __syncthreads();
    }
    const int last = a_.shape.layers, width = a_.shape.widths[last], row = width | 1;
    loss_of<kTangents>(set, loss != nullptr);
    if (outputs != nullptr) {
      for (int e = int(threadIdx.x); e < n * width; e += kMlpThreads)
        outputs[e] = memory_[at_.x_at[last] + e / width * row + e % width];
    }
    __syncthreads();
    if (loss != nullptr && threadIdx.x == 0) {
      Real sum = 0;
      for (int i = 0; i < n; ++i) sum += memory_[at_.losses_at + i];
      *loss = sum / Real(n);
    }
    int now = 0;
    for (int l = last - 1; l >= 0; --l, now = 1 - now) {
      const Real *const d = memory_ + at_.d_at + now * at_.d_size, *const td = d + 2 * at_.d_size;
      if (l > 0) {
        Real* const below = memory_ + at_.d_at + (1 - now) * at_.d_size;
        backward_inputs<kTangents>(l, n, d, td, below, below + 2 * at_.d_size);
        __syncthreads();
      }
      backward_weights<kTangents>(l, n, inputs, d, td, take);
      __syncthreads();
    }
  }

 private:
  const MlpMetaStep<Real>& a_;
  const MlpLayout& at_;
  Real* memory_;

 public:
  Real *phi, *adjoint;

 private:
  int64_t task_;

  __device__ Real* x_of(int l) const { return memory_ + at_.x_at[l]; }
  __device__ int row_of(int l) const { return l == 0 ? a_.shape.widths[0] : a_.shape.widths[l] | 1; }
  __device__ Real* tangent_of(int l) const { return x_of(l) + at_.rows * row_of(l); }

  // X and tX of l + 1.
  template <bool kTangents>
  __device__ void forward(int l, int n, const Real* inputs) const {
    const int in = a_.shape.widths[l], out = a_.shape.widths[l + 1], row = row_of(l), to_row = row_of(l + 1);
    const bool last = l + 1 == a_.shape.layers;
    const Real *const w = phi + at_.weights_at[l], *const v = adjoint + at_.weights_at[l];
    const Real *const x = l == 0 ? inputs : x_of(l), *const tx = l == 0 ? nullptr : tangent_of(l);
    Real *const y = x_of(l + 1), *const ty = tangent_of(l + 1);
    for (int e = int(threadIdx.x); e < n * out; e += kMlpThreads) {
      const int i = e % n, o = e / n;
      Real sum = w[out * in + o], tangent = kTangents ? v[out * in + o] : Real(0);
      for (int k = 0; k < in; ++k) {
        sum += w[o * in + k] * x[i * row + k];
        if (!kTangents) continue;
        tangent += v[o * in + k] * x[i * row + k];
        if (l > 0) tangent += w[o * in + k] * tx[i * row + k];
      }
      if (!last) {
        sum = a_.shape.tanh ? std::tanh(sum) : sum < 0 ? Real(0) : sum;  // NaN stays
        if (kTangents) tangent *= slope(sum);
      }
      y[i * to_row + o] = sum;
      if (kTangents) ty[i * to_row + o] = tangent;
    }
  }
  // act' from act.
  __device__ Real slope(Real y) const { return a_.shape.tanh ? 1 - y * y : y == 0 ? Real(0) : Real(1); }

  // dZ and tdZ of the outputs, and each sample's loss.
  template <bool kTangents>
  __device__ void loss_of(const MlpSet<Real>& set, bool wanted) const {
    const int n = int(set.samples), last = a_.shape.layers, width = a_.shape.widths[last], row = width | 1;
    for (int i = int(threadIdx.x); i < n; i += kMlpThreads) {
      const Real *const z = x_of(last) + i * row, *const tz = tangent_of(last) + i * row;
      Real *const d = memory_ + at_.d_at + i * row, *const td = d + 2 * at_.d_size;
      Real value = 0;
      if (a_.shape.cross_entropy) {
        const int label = int(set.labels[task_ * n + i]);
        Real most = z[0], sum = 0, along = 0;
        for (int c = 1; c < width; ++c) most = z[c] > most ? z[c] : most;
        for (int c = 0; c < width; ++c) sum += d[c] = std::exp(z[c] - most);
        if (wanted) value = std::log(sum) + (most - z[label]);
        if (kTangents) {
          for (int c = 0; c < width; ++c) along += d[c] / sum * tz[c];
        }
        for (int c = 0; c < width; ++c) {
          const Real p = d[c] / sum;
          d[c] = (p - (c == label ? Real(1) : Real(0))) / Real(n);
          if (kTangents) td[c] = p * (tz[c] - along) / Real(n);
        }
      } else {
        const Real* const y = set.targets + (task_ * n + i) * width;
        for (int c = 0; c < width; ++c) {
          const Real apart = z[c] - y[c];
          value += apart * apart / Real(width);
          d[c] = 2 * apart / Real(n * width);
          if (kTangents) td[c] = 2 * tz[c] / Real(n * width);
        }
      }
      if (wanted) memory_[at_.losses_at + i] = value;
    }
  }

  // dZ and tdZ of the layer below, from this one's.
  template <bool kTangents>
  __device__ void backward_inputs(int l, int n, const Real* d, const Real* td, Real* to, Real* t_to) const {
    const int in = a_.shape.widths[l], out = a_.shape.widths[l + 1], row = row_of(l + 1), to_row = row_of(l);
    const Real *const w = phi + at_.weights_at[l], *const v = adjoint + at_.weights_at[l];
    const Real *const x = x_of(l), *const tx = tangent_of(l);
    for (int e = int(threadIdx.x); e < n * in; e += kMlpThreads) {
      const int i = e % n, k = e / n;
      Real sum = 0, tangent = 0;
      for (int o = 0; o < out; ++o) {
        sum += d[i * row + o] * w[o * in + k];
        if (kTangents) tangent += td[i * row + o] * w[o * in + k] + d[i * row + o] * v[o * in + k];
      }
      const Real y = x[i * to_row + k], by = slope(y);
      to[i * to_row + k] = by * sum;
      if (!kTangents) continue;
      // act'' tZ of tanh is -2 y (1 - y^2) tZ, of which the latter two are tX.
      const Real bend = a_.shape.tanh ? -2 * y * tx[i * to_row + k] : Real(0);
      t_to[i * to_row + k] = by * tangent + bend * sum;
    }
  }

  template <bool kTangents, class Take>
  __device__ void backward_weights(int l, int n, const Real* inputs, const Real* d, const Real* td,
                                   Take take) const {
    const int in = a_.shape.widths[l], out = a_.shape.widths[l + 1], row = row_of(l + 1), x_row = row_of(l);
    const Real *const x = l == 0 ? inputs : x_of(l), *const tx = l == 0 ? nullptr : tangent_of(l);
    for (int e = int(threadIdx.x); e < out * (in + 1); e += kMlpThreads) {
      const bool bias = e >= out * in;
      const int o = bias ? e - out * in : e / in, k = bias ? 0 : e % in;
      Real sum = 0;
      for (int i = 0; i < n; ++i) {
        const Real factor = bias ? Real(1) : x[i * x_row + k];
        sum += (kTangents ? td : d)[i * row + o] * factor;
        if (kTangents && l > 0 && !bias) sum += d[i * row + o] * tx[i * x_row + k];
      }
      take(at_.weights_at[l] + e, sum);
    }
  }
};

template <class Real>
__global__ void __launch_bounds__(kMlpThreads, 1)
    mlp_meta_step_kernel(const MlpMetaStep<Real> a, const MlpLayout layout) {
  METAFAST_DYNAMIC_SHARED(Real, memory);
  const int64_t t = blockIdx.x;
  const MlpTask<Real> task(a, layout, memory, t);
  const int size = layout.weights_at[a.shape.layers];
  Real *const phi = task.phi, *const adjoint = task.adjoint, *const tape = a.tape + t * a.steps * size;
  const Real lr = a.lr;
  const bool returns = !a.first_order && a.grads != nullptr;
  const auto parameter = [&](int64_t e) { return a.source == nullptr ? e : a.source[e]; };
  for (int64_t e = int(threadIdx.x); e < a.size; e += kMlpThreads) {
    if (parameter(e) >= 0) phi[parameter(e)] = a.theta[e];
  }
  __syncthreads();
  for (int64_t k = 0; k < a.steps; ++k) {
    for (int p = int(threadIdx.x); p < size && returns; p += kMlpThreads) tape[k * size + p] = phi[p];
    task.template sweep<false>(a.support, [=](int p, Real g) { phi[p] -= lr * g; }, nullptr, nullptr);
  }
  const int64_t outputs = a.query.samples * a.shape.widths[a.shape.layers];
  task.template sweep<false>(
      a.query, [=](int p, Real g) { adjoint[p] = g; }, a.losses + t, a.logits + t * outputs);
  for (int64_t k = a.steps - 1; k >= 0 && returns; --k) {
    for (int p = int(threadIdx.x); p < size; p += kMlpThreads) phi[p] = tape[k * size + p];
    __syncthreads();
    task.template sweep<true>(a.support, [=](int p, Real h) { adjoint[p] -= lr * h; }, nullptr, nullptr);
  }
  if (a.grads == nullptr) return;
  for (int64_t e = int(threadIdx.x); e < a.size; e += kMlpThreads) {
    const int64_t p = parameter(e);
    a.grads[t * a.size + e] = p < 0 ? Real(0) : adjoint[p];
  }
}

}  // namespace metafast::METAFAST_GPU
