#include <algorithm>

#include "launch.h"
#include "prototypes.cuh"
#include "prototypes.h"

namespace metafast::METAFAST_GPU {
namespace {

constexpr int64_t kMostBlocks = 65535;  // where more go round the kernel's loop

int64_t shares(int64_t count, int64_t of) { return (count + of - 1) / of; }

template <class Real>
struct Launcher {
  Launcher(const PrototypeHead<Real>& head, const PrototypeWorkspace<Real>& workspace, CUstream_st* to)
      : a{head, workspace, whole_groups(head.queries)}, stream(to) {}

  void operator()(const char* name, void (*kernel)(HeadLaunch<Real>), int64_t blocks) const {
    const dim3 grid(unsigned(blocks), unsigned(std::min(a.h.tasks, kMostTasks)));
    launch(name, kernel, grid, dim3(kHeadThreads), 0, stream, a);
  }
  void norms() const {
    if (a.h.metric != Metric::cosine) return;
    norms_of(a.h.means, a.h.tasks * a.h.ways, a.w.mean_inverse);
    norms_of(a.h.query, a.h.tasks * a.h.queries, a.w.query_inverse);
  }
  void norms_of(const Real* rows, int64_t count, Real* inverse) const {
    const int64_t blocks = std::min(shares(count, kHeadWarps), kMostBlocks);
    launch("prototype_norms", prototype_norms_kernel<Real>, dim3(unsigned(blocks)), dim3(kHeadThreads), 0,
           stream, rows, count, a.h.features, inverse);
  }

  HeadLaunch<Real> a;
  CUstream_st* stream;
};

}  // namespace

template <class Real>
void prototype_head(const PrototypeHead<Real>& head, const PrototypeWorkspace<Real>& workspace,
                    CUstream_st* stream) {
  const Launcher<Real> start(head, workspace, stream);
  start("prototype_means", prototype_means_kernel<Real>, std::min(head.ways, kMostBlocks));
  start.norms();
  start("prototype_scores", prototype_scores_kernel<Real>, head.parts);
}

template <class Real>
void prototype_head_backward(const PrototypeHead<Real>& head, const PrototypeWorkspace<Real>& workspace,
                             CUstream_st* stream) {
  const Launcher<Real> start(head, workspace, stream);
  start.norms();
  const int64_t weights = std::min(shares(head.queries, kHeadWarps), kMostBlocks);
  start("prototype_weights", prototype_weights_kernel<Real>, weights);
  start("prototype_pull", prototype_pull_kernel<Real>, shares(head.queries, kPullQueries));
  start("prototype_spread", prototype_spread_kernel<Real>, shares(head.ways, kSpreadClasses));
}

template void prototype_head(const PrototypeHead<float>&, const PrototypeWorkspace<float>&, CUstream_st*);
template void prototype_head(const PrototypeHead<double>&, const PrototypeWorkspace<double>&, CUstream_st*);
template void prototype_head_backward(const PrototypeHead<float>&, const PrototypeWorkspace<float>&,
                                      CUstream_st*);
template void prototype_head_backward(const PrototypeHead<double>&, const PrototypeWorkspace<double>&,
                                      CUstream_st*);

}  // namespace metafast::METAFAST_GPU
