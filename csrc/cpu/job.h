// What the engine does for T tasks, as plain numbers and pointers: the torch side fills a Job, the
// instruction sets' tables run its tasks one by one. Nothing here allocates.
#pragma once

#include "../engine/program.h"
#include "../lstm.h"
#include "../prototypes.h"
#include "team.h"

namespace metafast::cpu {

enum class What : int32_t {
  outputs,    // logits = f(x; phi)                                                  on `query`
  pullback,   // gradient = vjp of f at phi along cotangent                          on `query`
  gradient,   // loss, gradient = grad L(phi)                                        on `support`
  hvp,        // gradient = H(phi) vector                                            on `support`
  meta_step,  // inner loop on `support`, loss and logits on `query`, and the gradient of the loss (or, with a
              // cotangent, of <cotangent, logits>) with respect to theta where gradient is not null
  prototypes,  // the same of Prototypical Networks: theta embeds support and query, `head` compares them
};

// Where a thread's buffers lie, in elements from the start of its workspace.
struct WorkspaceLayout {
  Pass support, query;
  int64_t w, direction, product;  // (params,) each; w holds a task's own parameters, in a meta-step lam
  int64_t tape;                   // (steps, params): phi_1 .. phi_steps
  int64_t query_tape;  // (steps - 1, params) where earlier steps have a query loss: its gradients there
  int64_t rule;        // what the update rule needs
  int64_t kept;        // from one inner step's values, adjoints and saved to the next's; 0: all use the same
  int64_t size;
};

template <class Real>
struct Data {
  const Real* x;          // (T, N, C, H, W)
  const int64_t* labels;  // (T, N) for cross_entropy
  const Real* values;     // (T, N, D) for mse
};

// phi' = phi - rate O(g, s), O a coordinatewise LSTM, for those parameters that move.
template <class Real>
struct LearnedStep {
  const LstmWeights<Real>* weights;
  int64_t coordinates;
  const int64_t* place;  // (params,): which coordinate a parameter is; one that is none, out of their range
};

// Classes are nearest means; logits are (T, Nq, ways).
struct HeadShape {
  int64_t supports, queries, ways;
  Metric metric;
};

template <class Real>
struct Job {
  What what;
  const Program* program;
  const WorkspaceLayout* layout;
  int64_t tasks;
  const Team* team;  // shares each task's work; null: a task is one thread's
  Data<Real> support, query;

  // Parameters: for meta_step theta (params,) as the engine has it; for the others phi (T, P) or, with
  // phi_stride 0, (P,), P = program->adapting, in the user's order.
  const Real* theta;
  const Real* phi;
  int64_t phi_stride;
  const Real* constants;  // what follows the P adapting in the user's order
  const Real* vector;     // hvp: (T, P)
  const Real* cotangent;  // (T, N, D) of the outputs

  // meta_step: phi_{k+1} = phi_k - rate_k g_k with rate_k = rates + k * rates_stride, (params,), or `rate`.
  // Step k sees the samples of batch k % batches, which are `layout->support.samples` long.
  int64_t steps, batches;
  bool first_order;
  Real rate;
  const Real* rates;
  int64_t rates_stride;
  const HeadShape* head;             // prototypes
  const LearnedStep<Real>* learned;  // in place of the rates, unless null
  int64_t truncate;  // steps k = truncate, 2 truncate, ... take phi_k and s_k for constants; 0: none
  // (steps,): the loss is sum_k query_weights[k - 1] L_query(phi_k); null: L_query(phi_K).
  const Real* query_weights;

  // Results; null where not wanted. gradient: (T, P) in the user's order, for meta_step (T, params) in the
  // engine's; so for rate_gradient (T, K or 1, params). rule_gradient: of the learned
  // step's weights and start, (T, count_with_start()), with gradient.
  Real *losses, *logits, *accuracy, *gradient, *rate_gradient, *rule_gradient;
  // Not null: gradient is but one row, sum_t weights[t] gradient_t, to which tasks add in their order. turn:
  // whose turn it is, from 0. A task that comes before its turn leaves its gradient in its one of `rows`
  // (T, params), says so in its one of `ready` (T,), zeros, and who has the turn before adds that too.
  const Real* weights;
  Real* rows;
  int32_t* ready;
  int64_t* turn;
};

template <class Real>
struct EngineFunctions {
  // Parameters of one task in the engine's order (params,) from the user's: (adapting,), and the constants
  // that follow; null constants are zeros.
  void (*to_engine)(const Program&, const Real* adapting, const Real* constants, Real* w);
  // And the adapting ones back; those that no layer uses become zero.
  void (*to_user)(const Program&, const Real* w, Real* adapting);
  // Elements of workspace that the job's update rule takes; the job needs no layout and no data yet.
  int64_t (*rule_workspace)(const Job<Real>&, bool wants_gradient);
  void (*run_task)(const Job<Real>&, int64_t task, Real* workspace);
  // sums[i] = sum_t weights[t] rows[t * size + i] in the order of tasks, for i in [begin, end).
  void (*weighted_sum)(const Real* rows, int64_t tasks, int64_t size, const Real* weights, int64_t begin,
                       int64_t end, Real* sums);
};

// The engine for one instruction set.
struct EngineTable {
  EngineFunctions<float> float32;
  EngineFunctions<double> float64;
};

extern const EngineTable kEngineBaseline, kEngineAvx2, kEngineAvx512;

}  // namespace metafast::cpu
