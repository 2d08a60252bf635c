// The launchers of lstm_update's CUDA kernels. Real is float or double.
#pragma once

#include "../lstm.h"

struct CUstream_st;

namespace metafast {

// Start kernels on the stream of the current device, which holds all that is pointed to but the rule with its
// arrays, and the workspace, lstm_workspace elements of any content; throw std::runtime_error where a launch
// is refused. Do not wait. The backward writes d_weights, all of a task's in a row,
// (T, numbers), too.
namespace cuda {
template <class Real>
int64_t lstm_workspace(const Lstm<Real>& lstm, bool backward);
template <class Real>
void lstm_update(const Lstm<Real>& lstm, Real* workspace, CUstream_st* stream);
template <class Real>
void lstm_update_backward(const Lstm<Real>& lstm, Real* d_weights, Real* workspace, CUstream_st* stream);
}  // namespace cuda

// The same kernels on the emulator (csrc/simt), on the CPU's memory.
namespace simt {
template <class Real>
int64_t lstm_workspace(const Lstm<Real>& lstm, bool backward);
template <class Real>
void lstm_update(const Lstm<Real>& lstm, Real* workspace, CUstream_st* stream);
template <class Real>
void lstm_update_backward(const Lstm<Real>& lstm, Real* d_weights, Real* workspace, CUstream_st* stream);
}  // namespace simt

}  // namespace metafast
