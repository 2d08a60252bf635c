// The launchers of the prototype head's CUDA kernels. Real is float or double.
#pragma once

#include "../prototypes.h"

struct CUstream_st;

namespace metafast {

// Queries of a block that scores them: PrototypeHead::parts is the number of such tiles of a task.
constexpr int64_t kPrototypeTile = 32;

// What the kernels hand to each other, of any content before.
template <class Real>
struct PrototypeWorkspace {
  Real *mean_inverse, *query_inverse;  // (T, C), (T, Nq): 1 / |x|, of cosines only
  Real *weights, *self;                // backward: (T, C, Nq) W, and of cosines (T, Nq)
  Real* d_means;                       // backward, of cosines: (T, C, D)
};

// Start kernels on the stream of the current device, which holds all the pointers; throw std::runtime_error
// where a launch is refused. Do not wait. The forward's sums are (parts, T) here.
namespace cuda {
template <class Real>
void prototype_head(const PrototypeHead<Real>& head, const PrototypeWorkspace<Real>& workspace,
                    CUstream_st* stream);
template <class Real>
void prototype_head_backward(const PrototypeHead<Real>& head, const PrototypeWorkspace<Real>& workspace,
                             CUstream_st* stream);
}  // namespace cuda

// The same kernels on the emulator (csrc/simt), on the CPU's memory.
namespace simt {
template <class Real>
void prototype_head(const PrototypeHead<Real>& head, const PrototypeWorkspace<Real>& workspace,
                    CUstream_st* stream);
template <class Real>
void prototype_head_backward(const PrototypeHead<Real>& head, const PrototypeWorkspace<Real>& workspace,
                             CUstream_st* stream);
}  // namespace simt

}  // namespace metafast
