// The losses on CUDA, for all tasks at once: the mean over a task's samples, its derivative with respect to
// the outputs, and the derivative of that along the outputs' tangent, as cpu/layers/loss.h has them. The
// functions are in loss.cu, the kernels in loss.cuh.
#pragma once

#include "call.h"

namespace metafast::METAFAST_GPU {

template <class Real>
struct Targets {
  const int64_t* labels;  // (T, N), for cross_entropy
  const Real* values;     // (T, N, C), for mse
};

// losses (T,) and dy, either of which may be null.
template <class Real>
void loss_gradient(LossKind kind, const Value& out, int64_t tasks, int64_t samples, Batch<const Real> y,
                   Targets<Real> targets, Batch<Real> dy, Real* losses, CUstream_st* stream);

// tdy; for cross_entropy y are the outputs again.
template <class Real>
void loss_gradient_tangent(LossKind kind, const Value& out, int64_t tasks, int64_t samples,
                           Batch<const Real> y, Batch<const Real> ty, Batch<Real> tdy, CUstream_st* stream);

// (T,): the share of samples whose largest output is their label's; the first of equals counts.
template <class Real>
void accuracy(const Value& out, int64_t tasks, int64_t samples, Batch<const Real> y, const int64_t* labels,
              Real* share, CUstream_st* stream);

// The outputs (T, N, C) without padding, and a cotangent of them into the adjoint dy.
template <class Real>
void copy_outputs(const Value& out, int64_t tasks, int64_t samples, Batch<const Real> y, Real* outputs,
                  CUstream_st* stream);
template <class Real>
void set_adjoint(const Value& out, int64_t tasks, int64_t samples, const Real* cotangent, Batch<Real> dy,
                 CUstream_st* stream);

// Inputs (T, N, C, H, W) into value 0.
template <class Real>
void set_input(const Value& in, int64_t tasks, int64_t samples, const Real* inputs, Batch<Real> x,
               CUstream_st* stream);

}  // namespace metafast::METAFAST_GPU
