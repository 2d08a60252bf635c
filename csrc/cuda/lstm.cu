#include <algorithm>
#include <stdexcept>
#include <string>

#include "launch.h"
#include "layers/elements.h"
#include "lstm.cuh"
#include "lstm.h"

namespace metafast::METAFAST_GPU {
namespace {

template <class Real>
using Kernel = void (*)(LstmLaunch<Real>, int64_t);

// How a step is launched. A task's number of blocks is no GPU's, and no matter of the others: the weights'
// gradients have the same bits on all.
template <class Real>
struct Plan {
  Plan(const Lstm<Real>& lstm, bool backward)
      : tasks(lstm.tasks),
        tiles((lstm.coordinates + kLstmTile - 1) / kLstmTile),
        rows(backward ? lstm_backward_rows(lstm.rule->hidden, lstm.rule->layers)
                      : lstm_forward_rows(lstm.rule->hidden)) {
    const Kernel<Real> in_shared =
        backward ? lstm_backward_kernel<Real, true> : lstm_forward_kernel<Real, true>;
    const size_t bytes = size_t(rows * kLstmRow) * sizeof(Real);
    shared = allow_shared(in_shared, shared_bytes + bytes);
    kernel = shared     ? in_shared
             : backward ? lstm_backward_kernel<Real, false>
                        : lstm_forward_kernel<Real, false>;
    if (shared) shared_bytes += bytes;
    constexpr int64_t kMostBlocks = 1024, kMostWithRows = 256;  // more tiles go round the kernel's loop
    blocks = std::min(tiles, backward || !shared ? kMostWithRows : kMostBlocks);
    of_rows = shared ? 0 : tasks * blocks * rows * kLstmRow;
    if (tasks > kMostTasks) {
      throw std::invalid_argument("lstm_update: expected at most 65535 tasks, got " + std::to_string(tasks));
    }
  }

  int64_t tasks, tiles, rows, blocks, of_rows;  // of_rows: elements of the workspace
  size_t shared_bytes = kLstmWeightTile * sizeof(Real);
  bool shared;
  Kernel<Real> kernel;
};

template <class Real>
LstmLaunch<Real> by_value(const Lstm<Real>& lstm, const Plan<Real>& plan, Real* workspace) {
  const LstmWeights<Real>& rule = *lstm.rule;
  LstmLaunch<Real> a{};
  a.hidden = int(rule.hidden), a.layers = int(rule.layers);
  a.coordinates = lstm.coordinates, a.tiles = plan.tiles;
  a.p = rule.p, a.least = rule.least, a.steep = rule.steep;
  std::copy_n(rule.weights, 3 * rule.layers + 2, a.weights);
  a.grads = lstm.grads, a.state = lstm.state, a.updates = lstm.updates, a.next = lstm.next;
  a.d_updates = lstm.d_updates, a.d_next = lstm.d_next, a.d_grads = lstm.d_grads, a.d_state = lstm.d_state;
  a.rows = workspace, a.count = rule.count(), a.partial = workspace + plan.of_rows;
  return a;
}

template <class Real>
void start(const char* name, const Plan<Real>& plan, const LstmLaunch<Real>& a, CUstream_st* stream) {
  const dim3 grid(unsigned(plan.blocks), unsigned(plan.tasks));
  launch(name, plan.kernel, grid, dim3(kLstmThreads), plan.shared_bytes, stream, a, plan.rows);
}

}  // namespace

template <class Real>
int64_t lstm_workspace(const Lstm<Real>& lstm, bool backward) {
  const Plan<Real> plan(lstm, backward);
  return plan.of_rows + (backward ? plan.tasks * plan.blocks * lstm.rule->count() : 0);
}

template <class Real>
void lstm_update(const Lstm<Real>& lstm, Real* workspace, CUstream_st* stream) {
  if (lstm.coordinates == 0) return;  // CUDA refuses an empty grid
  const Plan<Real> plan(lstm, false);
  start("lstm_update", plan, by_value(lstm, plan, workspace), stream);
}

template <class Real>
void lstm_update_backward(const Lstm<Real>& lstm, Real* d_weights, Real* workspace, CUstream_st* stream) {
  const Plan<Real> plan(lstm, true);
  const LstmLaunch<Real> a = by_value(lstm, plan, workspace);
  if (plan.blocks > 0) start("lstm_update_backward", plan, a, stream);
  launch_elements("lstm_sum", lstm_sum_kernel<Real>, plan.tasks, a.count, stream, plan.tasks, plan.blocks,
                  a.count, a.partial, d_weights);
}

template int64_t lstm_workspace(const Lstm<float>&, bool);
template int64_t lstm_workspace(const Lstm<double>&, bool);
template void lstm_update(const Lstm<float>&, float*, CUstream_st*);
template void lstm_update(const Lstm<double>&, double*, CUstream_st*);
template void lstm_update_backward(const Lstm<float>&, float*, float*, CUstream_st*);
template void lstm_update_backward(const Lstm<double>&, double*, double*, CUstream_st*);

}  // namespace metafast::METAFAST_GPU
