// The engine on CUDA: a job of engine/job.h for all tasks at once. Real is float or double.
#pragma once

#include "../engine/job.h"

struct CUstream_st;

namespace metafast {

// Start kernels on the stream of the current device, which holds all that a job points to but the program,
// whose `source` too is the device's, the layout, the LSTM's weights' table, the head's shape and
// query_weights; throw std::runtime_error where a launch is refused. Do not wait.
//
// Inputs and targets of the support come batch after batch, (batches, T, N, ...). Each task's gradient goes
// to a row of its own. `workspace` is layout->size elements for each task, zeros, none for a job of one
// launch; `shared` as many of any content as shared_workspace says, of a job that needs no data yet.
namespace cuda {
template <class Real>
int64_t shared_workspace(const Job<Real>& job, bool wants_gradient);
template <class Real>
void run(const Job<Real>& job, Real* workspace, Real* shared, CUstream_st* stream);

// Rows (R, params) in the engine's order from the user's (R, P) and the constants that follow, null: zeros;
// and the adapting ones back.
template <class Real>
void to_engine(const Program& program, int64_t rows, const Real* user, const Real* constants, Real* w,
               CUstream_st* stream);
template <class Real>
void to_user(const Program& program, int64_t rows, const Real* w, Real* user, CUstream_st* stream);
}  // namespace cuda

// The same kernels on the emulator (csrc/simt), on the CPU's memory.
namespace simt {
template <class Real>
int64_t shared_workspace(const Job<Real>& job, bool wants_gradient);
template <class Real>
void run(const Job<Real>& job, Real* workspace, Real* shared, CUstream_st* stream);
template <class Real>
void to_engine(const Program& program, int64_t rows, const Real* user, const Real* constants, Real* w,
               CUstream_st* stream);
template <class Real>
void to_user(const Program& program, int64_t rows, const Real* w, Real* user, CUstream_st* stream);
}  // namespace simt

}  // namespace metafast
