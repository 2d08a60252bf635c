#include <algorithm>

#include "../launch.h"
#include "loss.cuh"
#include "loss.h"

namespace metafast::METAFAST_GPU {
namespace {

// So many items, `each` of a block; more than a grid has go round the kernel's loop.
template <class... Params, class... Args>
void start(const char* name, void (*kernel)(Params...), int64_t items, int64_t each, CUstream_st* stream,
           Args&&... args) {
  constexpr int64_t kMostBlocks = 0x7fffffff;
  const int64_t blocks = std::min((items + each - 1) / each, kMostBlocks);
  if (blocks == 0) return;  // CUDA refuses an empty grid
  launch(name, kernel, dim3(unsigned(blocks)), dim3(kLossThreads), 0, stream, static_cast<Args&&>(args)...);
}

template <class Real>
LossLaunch<Real> by_value(const Value& out, int64_t tasks, int64_t samples) {
  LossLaunch<Real> a{};
  a.out = out, a.tasks = tasks, a.samples = samples;
  return a;
}

}  // namespace

template <class Real>
void loss_gradient(LossKind kind, const Value& out, int64_t tasks, int64_t samples, Batch<const Real> y,
                   Targets<Real> targets, Batch<Real> dy, Real* losses, CUstream_st* stream) {
  auto a = by_value<Real>(out, tasks, samples);
  a.y = y, a.targets = targets, a.dy = dy, a.losses = losses;
  if (kind == LossKind::cross_entropy)
    return start("cross_entropy", cross_entropy_kernel<Real>, tasks, 1, stream, a);
  start("mse", mse_kernel<Real>, tasks, 1, stream, a);
}

template <class Real>
void loss_gradient_tangent(LossKind kind, const Value& out, int64_t tasks, int64_t samples,
                           Batch<const Real> y, Batch<const Real> ty, Batch<Real> tdy, CUstream_st* stream) {
  auto a = by_value<Real>(out, tasks, samples);
  a.y = y, a.ty = ty, a.tdy = tdy;
  if (kind == LossKind::cross_entropy) {
    return start("cross_entropy_tangent", cross_entropy_tangent_kernel<Real>, tasks * samples, kLossWarps,
                 stream, a);
  }
  start("mse_tangent", mse_tangent_kernel<Real>, tasks * samples * out.pixel, kLossThreads, stream, a);
}

template <class Real>
void accuracy(const Value& out, int64_t tasks, int64_t samples, Batch<const Real> y, const int64_t* labels,
              Real* share, CUstream_st* stream) {
  auto a = by_value<Real>(out, tasks, samples);
  a.y = y;
  start("accuracy", accuracy_kernel<Real>, tasks, 1, stream, a, labels, share);
}

template <class Real>
void copy_outputs(const Value& out, int64_t tasks, int64_t samples, Batch<const Real> y, Real* outputs,
                  CUstream_st* stream) {
  auto a = by_value<Real>(out, tasks, samples);
  a.y = y;
  start("copy_outputs", copy_outputs_kernel<Real>, tasks * samples * out.c, kLossThreads, stream, a, outputs);
}

template <class Real>
void set_adjoint(const Value& out, int64_t tasks, int64_t samples, const Real* cotangent, Batch<Real> dy,
                 CUstream_st* stream) {
  auto a = by_value<Real>(out, tasks, samples);
  a.dy = dy;
  start("set_adjoint", set_adjoint_kernel<Real>, tasks * samples * out.pixel, kLossThreads, stream, a,
        cotangent);
}

template <class Real>
void set_input(const Value& in, int64_t tasks, int64_t samples, const Real* inputs, Batch<Real> x,
               CUstream_st* stream) {
  start("set_input", set_input_kernel<Real>, tasks * samples * in.h * in.w * in.c, kLossThreads, stream, in,
        tasks, samples, inputs, x);
}

#define METAFAST_INSTANTIATE(Real)                                                                        \
  template void loss_gradient(LossKind, const Value&, int64_t, int64_t, Batch<const Real>, Targets<Real>, \
                              Batch<Real>, Real*, CUstream_st*);                                          \
  template void loss_gradient_tangent(LossKind, const Value&, int64_t, int64_t, Batch<const Real>,        \
                                      Batch<const Real>, Batch<Real>, CUstream_st*);                      \
  template void accuracy(const Value&, int64_t, int64_t, Batch<const Real>, const int64_t*, Real*,        \
                         CUstream_st*);                                                                   \
  template void copy_outputs(const Value&, int64_t, int64_t, Batch<const Real>, Real*, CUstream_st*);     \
  template void set_adjoint(const Value&, int64_t, int64_t, const Real*, Batch<Real>, CUstream_st*);      \
  template void set_input(const Value&, int64_t, int64_t, const Real*, Batch<Real>, CUstream_st*)
METAFAST_INSTANTIATE(float);
METAFAST_INSTANTIATE(double);
#undef METAFAST_INSTANTIATE

}  // namespace metafast::METAFAST_GPU
