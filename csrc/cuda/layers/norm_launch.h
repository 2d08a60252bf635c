// How the kernels of batch_norm.cuh are started, and those of batch_norm_relu_pool.cuh.
#pragma once

#include <algorithm>

#include "../launch.h"
#include "batch_norm.cuh"

namespace metafast::METAFAST_GPU {

// Reduces over one domain, unless nothing is to be reduced, then goes through the other where `applies`.
template <class Function, class Real>
void start_norm(const char* name, const Call<Real>& c, bool reduces, const Domain& reduced, bool applies,
                const Domain& applied, CUstream_st* stream) {
  constexpr unsigned kMostParts = 32;     // engine/build.cpp sees to their place
  constexpr unsigned kLeastOfPart = 512;  // so many keep a block busy
  constexpr unsigned kAppliedOfRow = 8;
  if (c.tasks == 0) return;  // CUDA refuses an empty grid
  const unsigned vectors = unsigned(c.in.pixel / kNormLanes<Real>);
  NormLaunch l{reduced, applied, 1, reduced.count, applied.count, 0};
  const auto shares = [](unsigned count, unsigned of) { return std::max(1u, (count + of - 1) / of); };
  const auto start = [&](int phases, unsigned blocks) {
    l.phases = phases;
    const dim3 grid(blocks * vectors, unsigned(std::min(c.tasks, kMostTasks)));
    launch(name, norm_kernel<Function, Real>, grid, dim3(kNormThreads), 0, stream, c, l);
  };
  if (reduces && reduced.count < 2 * kLeastOfPart) {
    return start(kReduces | kFinishes | (applies ? kApplies : 0), 1);
  }
  if (reduces) {
    l.reduced_of_part = shares(reduced.count, std::min(kMostParts, reduced.count / kLeastOfPart));
    l.parts = shares(reduced.count, l.reduced_of_part);
    start(kReduces, l.parts);
    start(kFinishes, 1);
  }
  if (!applies) return;
  l.applied_of_block = kAppliedOfRow * unsigned(kNormRows<Real>);
  start(kApplies, shares(applied.count, l.applied_of_block));
}

}  // namespace metafast::METAFAST_GPU
