// A task of Prototypical Networks: support and queries together through the encoder, with the same parameters
// for all tasks, the head on the embeddings, and the way back.
#pragma once

#include "carver.h"
#include "network.h"
#include "prototypes_kernel.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// What it needs besides the network's buffers.
template <class Real>
class PrototypeBuffers {
 public:
  // With no workspace it only tells the size.
  PrototypeBuffers(const Job<Real>& job, bool wants_gradient, Real* workspace) {
    const Program& program = *job.program;
    const Value &in = program.values[0], &out = program.values[program.value_count - 1];
    const HeadShape& shape = *job.head;
    const int64_t samples = shape.supports + shape.queries;
    Carver<Real> carver(workspace);
    inputs = carver.take(samples * in.c * in.h * in.w);
    rows = carver.take(samples * out.c);
    d_rows = carver.take(wants_gradient ? samples * out.c : 0);
    head.tasks = head.parts = 1;
    head.supports = shape.supports, head.queries = shape.queries, head.ways = shape.ways;
    head.features = out.c, head.metric = shape.metric;
    head.support = rows, head.query = rows + shape.supports * out.c;
    head.d_support = d_rows, head.d_query = d_rows + shape.supports * out.c;
    head.means = carver.take(shape.ways * out.c);
    head.residual = carver.take(shape.ways * whole_groups(shape.queries));
    rest = carver.take(PrototypeTask<Real>(head, nullptr).size());
    size = carver.size();
  }

  Real *inputs, *rows, *d_rows, *rest;
  PrototypeHead<Real> head{};
  int64_t size;
};

template <class Real>
void prototype_step(const Job<Real>& job, int64_t task, Real* workspace) {
  const Program& program = *job.program;
  const WorkspaceLayout& layout = *job.layout;
  const HeadShape& shape = *job.head;
  const Value& in = program.values[0];
  const bool wants_gradient = job.gradient != nullptr;
  PrototypeBuffers<Real> buffers(job, wants_gradient, workspace + layout.rule);

  const int64_t pixels = in.c * in.h * in.w, support = shape.supports * pixels,
                query = shape.queries * pixels;
  std::copy_n(job.support.x + task * support, support, buffers.inputs);
  std::copy_n(job.query.x + task * query, query, buffers.inputs + support);
  Network<Real> network{program, layout.query, job.team, workspace, workspace, nullptr, job.theta};
  network.set_input(buffers.inputs);
  network.forward();
  network.copy_outputs(buffers.rows);

  PrototypeHead<Real>& head = buffers.head;
  Real* const logits = job.logits + task * shape.queries * shape.ways;
  const int64_t* const labels = job.query.labels + task * shape.queries;
  double sum = 0;
  head.support_labels = job.support.labels + task * shape.supports;
  head.query_labels = labels;
  head.logits = logits;
  head.sums = &sum;
  PrototypeTask<Real> run(head, buffers.rest);
  run.forward(0, 0);
  job.losses[task] = Real(sum / double(shape.queries));
  job.accuracy[task] = accuracy_of(logits, shape.queries, shape.ways, shape.ways, labels);
  if (!wants_gradient) return;

  const Real each = Real(1) / Real(shape.queries);
  if (job.cotangent == nullptr) {
    head.d_sums = &each;
  } else {
    head.d_logits = job.cotangent + task * shape.queries * shape.ways;
  }
  run.backward(0, 0);
  network.set_adjoint(buffers.d_rows);
  network.backward(workspace + layout.w);
  deliver(job, task, TaskGradient<Real>{workspace + layout.w});
}

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
