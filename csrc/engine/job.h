// What the engine does for T tasks, as plain numbers and pointers: the torch side fills a Job, the CPU's
// tables of cpu/job.h run its tasks one by one, the launchers of cuda/engine.h all at once. Nothing here
// allocates.
#pragma once

#include "../batched_product.h"
#include "../lstm.h"
#include "../prototypes.h"
#include "program.h"

namespace metafast {

namespace cpu {
struct Team;
}

enum class What : int32_t {
  outputs,    // logits = f(x; phi)                                                  on `query`
  pullback,   // gradient = vjp of f at phi along cotangent                          on `query`
  gradient,   // gradient = grad L(phi)                                              on `support`
  hvp,        // gradient = H(phi) vector                                            on `support`
  meta_step,  // inner loop on `support`, loss and logits on `query`, and the gradient of the loss (or, with a
              // cotangent, of <cotangent, logits>) with respect to theta where gradient is not null
  prototypes,  // the same of Prototypical Networks: theta embeds support and query, `head` compares them
};

// Where a task's buffers lie, in elements from the start of its workspace: a thread's, for one task after the
// other, or on a device the task's own.
struct WorkspaceLayout {
  Pass support, query;
  // Unless Job::together, which needs none of them and no tape or sum:
  int64_t w, direction, product;  // (params,) each; w holds a task's own parameters, in a meta-step lam
  int64_t tape;                   // (steps, params): phi_1 .. phi_steps
  int64_t query_tape;  // (steps - 1, params) where earlier steps have a query loss: its gradients there
  int64_t sum;         // (params,) of a group of tasks, see Job::group; where params are short
  int64_t stamp;       // of the job that used the workspace last
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
  const cpu::Team* team;           // shares each task's work; null: a task is one thread's
  bool one_launch;                 // on a device: program->mlp, plain steps, and a task fits into a block
  BatchedProducts<Real> products;  // on a device: who does large products of matrices
  // Not 0: a meta-step of one inner step, in which so many tasks, or fewer, share what they do with theta
  // (engine/one_step.h); the layout's samples are those of all of them.
  int64_t together;
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
  // Not 0: instead gradient has a row for each so many tasks, sum_t weights[t] gradient_t of theirs, which
  // one thread runs in their order.
  int64_t group;
  // Never 0 with `together`: so many rows has gradient instead, likewise, of as many tasks each as the others
  // or one more: row r those from r * tasks / shares on. weights may be null, for ones.
  int64_t shares;
  int64_t stamp;  // no other job's, not 0
};

}  // namespace metafast
