// The engine's functions on the CPU, for each instruction set; what they do stands in engine/job.h.
#pragma once

#include "../engine/job.h"
#include "team.h"

namespace metafast::cpu {

template <class Real>
struct EngineFunctions {
  // Parameters of one task in the engine's order (params,) from the user's: (adapting,), and the constants
  // that follow; null constants are zeros.
  void (*to_engine)(const Program&, const Real* adapting, const Real* constants, Real* w);
  // And the adapting ones back; those that no layer uses become zero.
  void (*to_user)(const Program&, const Real* w, Real* adapting);
  // Elements of workspace that the job takes besides its network's; it needs no layout and no data yet.
  int64_t (*more_workspace)(const Job<Real>&, int64_t supports, int64_t queries, bool wants_gradient);
  // Tasks first..last-1, one after the other or together.
  void (*run_tasks)(const Job<Real>&, int64_t first, int64_t last, Real* workspace);
  // sums[i] = sum_t weights[t] rows[t * size + i] for i in [begin, end), by groups of so many tasks in their
  // order, and then over groups.
  void (*weighted_sum)(const Real* rows, int64_t tasks, int64_t group, int64_t size, const Real* weights,
                       int64_t begin, int64_t end, Real* sums);
};

// The engine for one instruction set.
struct EngineTable {
  EngineFunctions<float> float32;
  EngineFunctions<double> float64;
};

extern const EngineTable kEngineBaseline, kEngineAvx2, kEngineAvx512;

}  // namespace metafast::cpu
