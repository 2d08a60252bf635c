// The native engine as torch sees it: tensors in, tensors out. One Engine is one lowered network in one
// dtype.
//
// From the public function to the loop: metafast/learners -> metafast/engine/native.py -> here ->
// cpu/unroll.h, or for tensors on a GPU cuda/engine.cu -> engine/unroll.h over all tasks at once.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../engine/build.h"
#include "checks.h"

namespace metafast {

// Episodes of one side: x (T, N, ...), and y (T, N) labels or (T, N, D) targets.
struct Side {
  at::Tensor x, y;
};

// How the inner loop steps: phi - rate g, or phi - rates[k] g with rates (K or 1, P) in the user's order;
// step k on the k-th batch of `batch` support samples, round and round, or on all of them where it is 0. With
// query_weights (K,) the loss is sum_k query_weights[k - 1] L_query(phi_k), without it is that of the last.
struct Inner {
  int64_t steps;
  double rate;
  std::optional<at::Tensor> rates;
  bool first_order;
  int64_t batch;
  std::vector<double> query_weights;
  int64_t truncate;  // the adjoint stops every so many steps; 0: nowhere
  // Not empty: phi - rate O(g, s), O the coordinatewise LSTM of these weights, after which s_0 (L, 2, H) may
  // follow, and of preprocessing range p. O moves the parameters of these indices, (M,) ascending, or all.
  std::vector<at::Tensor> lstm;
  double p;
  std::optional<at::Tensor> moves;
  // Above 0: no inner loop, but Prototypical Networks of so many classes, by this metric's name.
  int64_t ways;
  std::string metric;

  int64_t lstm_layers() const { return int64_t(lstm.size() - 2) / 3; }
  int64_t lstm_hidden() const { return lstm[size_t(3 * lstm_layers())].numel(); }
};

// Whether a GPU does plain meta-steps of networks that are small MLPs in one launch; tests and benchmarks
// want the other way, too.
inline std::atomic<bool> one_launch_where_fit{true};

struct MetaOutcome {
  at::Tensor loss, losses, logits;
  std::optional<at::Tensor> accuracy;  // for labels
};

class Engine : public std::enable_shared_from_this<Engine> {
 public:
  Engine(const std::vector<int64_t>& ints, const std::vector<double>& numbers, at::ScalarType dtype);

  // phi (T, P), or (P,) for all tasks; constants (F,) or empty; x (T, N, ...).
  at::Tensor outputs(const at::Tensor& phi, const at::Tensor& constants, const at::Tensor& x);  // (T, N, D)
  at::Tensor pullback(const at::Tensor& phi, const at::Tensor& constants, const at::Tensor& x,
                      const at::Tensor& cotangent);                                              // (T, P)
  at::Tensor gradient(const at::Tensor& phi, const at::Tensor& constants, const Side& support);  // (T, P)
  at::Tensor hvp(const at::Tensor& phi, const at::Tensor& constants, const Side& support,
                 const at::Tensor& vector);

  // The meta-objective sum_t w_t L_query(phi_K), w_t = 1 / T without weights, as a function of the
  // parameters, which are in the user's order, of the rates and of the LSTM's weights; differentiable once
  // where grad mode is on and one of them requires gradients.
  MetaOutcome meta_step(const std::vector<at::Tensor>& params, const at::Tensor& constants,
                        const Side& support, const Side& query, const Inner& inner,
                        const std::optional<at::Tensor>& weights);

  // The same without autograd: adds the meta-gradient to .grad of those parameters and weights that require
  // one; the rates are constants.
  MetaOutcome accumulate(const std::vector<at::Tensor>& params, const at::Tensor& constants,
                         const Side& support, const Side& query, const Inner& inner,
                         const std::optional<at::Tensor>& weights);

  // Bytes of one thread's workspace for a meta-step by plain steps, of any number of tasks, and of them the
  // tape of inner steps' parameters.
  std::tuple<int64_t, int64_t> workspace(int64_t support, int64_t query, int64_t steps);

  // Job::together and Job::shares of a meta-step of one plain inner step on the CPU, where the gradient
  // wanted is that `summed` over tasks or each task's; 0: tasks share nothing. Not a matter of threads, for
  // the same bits with any.
  struct Together {
    int64_t most = 0, shares = 0;
  };
  Together together(int64_t tasks, int64_t support, int64_t query, bool wants_gradient, bool summed) const;

  // Layouts of workspaces that are kept, of the latest sizes of episodes.
  int64_t layouts() { return plan_.layouts(); }

  // Whether so many tasks, of so many samples at a time, run one after the other, each on all threads: that
  // pays where tasks are fewer than threads and layers are large. It does not change the results.
  bool shares_tasks(int64_t tasks, int64_t samples, int threads) const;

  // The fewest samples with which each convolution goes by Winograd's algorithm; 0 for those that never do.
  std::vector<int64_t> winograd_from() const;

 private:
  friend struct MetaStepBackward;

  template <class Real>
  class Call;

  // Workspaces of one layout, a thread each; they start as zeros and are used again.
  struct Workspaces {
    std::shared_ptr<const WorkspaceLayout> layout;
    std::vector<std::unique_ptr<void, void (*)(void*)>> threads;
  };
  Workspaces acquire(const std::shared_ptr<const WorkspaceLayout>& layout, int threads);
  void release(Workspaces&& workspaces);

  // The program as kernels of a device want it, whose `source` is there; on the CPU for the emulator's.
  struct Placed {
    at::Tensor source;  // (params,)
    Program program;
  };
  Placed& placed(at::Device device);  // under the mutex
  at::Tensor source_on(at::Device device);
  const Program& program_on(at::Device device);

  // In engine_checks.cpp: all raise, unless the tensors are right and on the device.
  void check(const char* name, const at::Tensor& t, at::IntArrayRef sizes, at::Device device) const;
  int64_t check_x(const char* name, const at::Tensor& x, int64_t tasks, at::Device device) const;  // N
  // Labels are below `classes`, or below the network's outputs where that is 0.
  void check_side(const char* name, const Side& side, int64_t tasks, at::Device device,
                  int64_t classes = 0) const;
  void check_inner(const Inner& inner, int64_t shots, at::Device device) const;
  void check_moves(const at::Tensor& moves, at::Device device) const;
  // (params,): which of `moves` each parameter is, -1: none.
  at::Tensor places(const at::Tensor& moves);
  // (1 + rows, params) in the engine's order: theta, then so many rows of rates, `rate` where those are none.
  at::Tensor ordered(const at::Tensor& theta, const at::Tensor& constants, const at::Tensor& rates,
                     double rate, int64_t rows);

  // (T, params) gradients of the tasks' losses, or of <cotangent, logits>, and (T, rows of rates, params)
  // those with respect to the rates, in the engine's order. With a gradient come those of the LSTM's weights.
  // Where `weights` are given, gradient may be their sum alone, (params,): there is less to write and read.
  struct Unrolled {
    MetaOutcome outcome;
    at::Tensor gradient, rate_gradient;
    at::Tensor rule_gradient;  // (T, numbers of the LSTM's weights)
  };
  Unrolled unroll(const at::Tensor& theta, const at::Tensor& constants, const Side& support,
                  const Side& query, const Inner& inner, const std::optional<at::Tensor>& cotangent,
                  bool wants_gradient, bool wants_rate_gradient, const at::Tensor& weights = {});
  // That, by tasks' weights or their mean, at what was checked; and those weights (T,). In meta_step.cpp.
  std::pair<Unrolled, at::Tensor> judge(const std::vector<at::Tensor>& params, const at::Tensor& constants,
                                        const Side& support, const Side& query, const Inner& inner,
                                        const std::optional<at::Tensor>& weights, bool wants_gradient,
                                        bool wants_rate_gradient);
  // Nobody has asked for the gradient of tasks' losses one by one, yet.
  std::atomic<bool> sums_{true};
  // sum_t weights_t rows_t of (T, size), (size,), by groups of so many tasks; on the CPU, weights may be
  // undefined, and are ones then.
  at::Tensor sum_tasks(const at::Tensor& rows, const at::Tensor& weights, int64_t group) const;
  // Tasks whose gradients are summed by themselves on the CPU, so that a thread keeps one row for them all
  // and few go from core to core; T where that does not pay. Not a matter of threads, for the same bits with
  // any.
  int64_t group_of(int64_t tasks) const;
  // sum_t weights_t gradient_t of (T, params) or (T, rows, params), or what was summed before, (params,), in
  // the user's order: (P,) or (rows, P).
  at::Tensor reduce(const at::Tensor& gradient, const at::Tensor& weights);
  at::Tensor single(What what, const at::Tensor& phi, const at::Tensor& constants, const Side& side,
                    const at::Tensor* vector);
  at::Tensor flatten(const std::vector<at::Tensor>& params, at::Device device) const;
  void set_loss(MetaOutcome& outcome, const at::Tensor& weights) const;

  Plan plan_, gpu_plan_;
  at::ScalarType dtype_;
  std::mutex mutex_;
  std::list<Placed> placed_;
  std::vector<Workspaces> free_;  // the latest last
};

}  // namespace metafast
