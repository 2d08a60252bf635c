// A task's head of Prototypical Networks between the two halves of the encoder's work, as engine/unroll.h
// wants it.
#pragma once

#include "../engine/carver.h"
#include "network.h"
#include "prototypes_kernel.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

template <class Real>
class OneTaskHead {
 public:
  // With no workspace it only tells the size.
  OneTaskHead(const Job<Real>& job, int64_t task, Real* workspace, bool wants_gradient)
      : job_(job), task_(task) {
    const Program& program = *job.program;
    const Value &in = program.values[0], &out = program.values[program.value_count - 1];
    const HeadShape& shape = *job.head;
    const int64_t samples = shape.supports + shape.queries;
    Carver<Real> carver(workspace);
    pixels_ = in.c * in.h * in.w;
    inputs = carver.take(samples * pixels_);
    rows = carver.take(samples * out.c);
    d_rows = carver.take(wants_gradient ? samples * out.c : 0);
    head_.tasks = head_.parts = 1;
    head_.supports = shape.supports, head_.queries = shape.queries, head_.ways = shape.ways;
    head_.features = out.c, head_.metric = shape.metric;
    head_.support = rows, head_.query = rows + shape.supports * out.c;
    head_.d_support = d_rows, head_.d_query = d_rows + shape.supports * out.c;
    head_.means = carver.take(shape.ways * out.c);
    head_.residual = carver.take(shape.ways * whole_groups(shape.queries));
    rest_ = carver.take(PrototypeTask<Real>(head_, nullptr).size());
    size_ = carver.size();
  }
  int64_t size() const { return size_; }

  void join_inputs() const {
    const int64_t support = head_.supports * pixels_, query = head_.queries * pixels_;
    std::copy_n(job_.support.x + task_ * support, support, inputs);
    std::copy_n(job_.query.x + task_ * query, query, inputs + support);
  }

  // From the embeddings to logits, loss and accuracy.
  void forward() {
    const int64_t queries = head_.queries;
    Real* const logits = job_.logits + task_ * queries * head_.ways;
    const int64_t* const labels = job_.query.labels + task_ * queries;
    double sum = 0;
    head_.support_labels = job_.support.labels + task_ * head_.supports;
    head_.query_labels = labels;
    head_.logits = logits;
    head_.sums = &sum;
    PrototypeTask<Real>(head_, rest_).forward(0, 0);
    job_.losses[task_] = Real(sum / double(queries));
    job_.accuracy[task_] = accuracy_of(logits, queries, head_.ways, head_.ways, labels);
  }

  // To the embeddings' cotangents, after forward.
  void backward() {
    const Real each = Real(1) / Real(head_.queries);
    if (job_.cotangent == nullptr) {
      head_.d_sums = &each;
    } else {
      head_.d_logits = job_.cotangent + task_ * head_.queries * head_.ways;
    }
    PrototypeTask<Real>(head_, rest_).backward(0, 0);
  }

  Real *inputs, *rows, *d_rows;  // of all samples, the support's first

 private:
  const Job<Real>& job_;
  int64_t task_, pixels_, size_;
  Real* rest_;
  PrototypeHead<Real> head_{};
};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
