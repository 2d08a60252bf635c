// All tasks at once as engine/unroll.h wants them, and the head of Prototypical Networks. Host code: nothing
// waits.
#pragma once

#include "../engine/unroll.h"
#include "network.h"
#include "prototypes.h"
#include "rules.h"

namespace metafast::METAFAST_GPU {

template <class Real>
struct AllTasks {
  using Number = Real;
  using Vector = Batch<Real>;
  using ConstVector = Batch<const Real>;

  // The workspaces lie one after the other.
  AllTasks(const Job<Real>& j, Real* memory, Carver<Real>& shared, CUstream_st* s)
      : job(j),
        workspace{memory, j.layout == nullptr ? 0 : j.layout->size},
        stream(s),
        losses(shared.take(j.tasks)),
        support(network(&WorkspaceLayout::support)),
        query(network(&WorkspaceLayout::query)) {}

  Vector at(int64_t offset) const { return workspace + offset; }
  ConstVector theta() const { return {job.theta, 0}; }
  Real* logits() const { return job.logits; }
  const Real* cotangent() const { return job.cotangent; }

  void see_support(int64_t batch) {
    see(job.support, batch * job.tasks * job.layout->support.samples, support, support_y);
  }
  void see_query() { see(job.query, 0, query, query_y); }

  void add_loss(Real factor, const Real* ones) {
    const Batch<const Real> one{ones, 1}, before{begun_ ? job.losses : nullptr, 1};
    const Batch<Real> to{job.losses, 1};
    for_all("add_loss", job.tasks, 1, stream, AddScaled<Real>{before, one, factor, to});
    begun_ = true;
  }
  void report() const {
    if (job.accuracy != nullptr) query.accuracy(query_y.labels, job.accuracy);
  }

  void zero(Vector to) const { all("zero", Fill<Real>{Real(0), to}); }
  void scale(Real factor, Vector to) const { all("scale", Scale<Real>{factor, to}); }
  // to += factor * H along; `buffer` is one.
  void add_hessian_vector(ConstVector along, Real factor, Vector buffer, Vector to) const {
    support.hessian_vector(along, buffer);
    add_scaled(factor, buffer, to);
  }
  void deliver_with_hessian_vector(ConstVector along, Real factor, Vector buffer, Vector lam) const {
    support.hessian_vector(along, buffer);
    deliver(lam, buffer, factor);
  }
  // to += factor * from.
  void add_scaled(Real factor, ConstVector from, Vector to) const {
    all("add_scaled", AddScaled<Real>{to, from, factor, to});
  }

  void to_engine(const Real* user, int64_t stride, const Real* constants, Vector w) const {
    const Program& p = *job.program;
    all("to_engine", ToEngine<Real>{p.source, p.adapting, {user, stride}, constants, w});
  }
  void to_user(ConstVector w) const {
    const Program& p = *job.program;
    const Vector user{job.gradient, p.adapting};
    for_all("to_user", job.tasks, p.adapting, stream, Fill<Real>{Real(0), user});
    all("to_user", Scatter<Real>{p.source, p.adapting, Real(1), w, user});
  }
  // The tasks' gradients, from + factor * more.
  void deliver(ConstVector from, ConstVector more = {}, Real factor = 0) const {
    all("deliver", AddScaled<Real>{from, more, factor, Vector{job.gradient, job.program->params}});
  }

  const Job<Real>& job;
  const Vector workspace;
  CUstream_st* const stream;
  Real* const losses;  // (T,) of one pass
  Network<Real> support, query;
  Targets<Real> support_y{}, query_y{};

 private:
  Network<Real> network(Pass WorkspaceLayout::* pass) const {
    return {*job.program, job.layout->*pass, job.tasks, stream, workspace, workspace, losses, job.products};
  }
  void see(const Data<Real>& data, int64_t first, Network<Real>& network, Targets<Real>& y) const {
    const Value& in = job.program->values[0];
    network.set_input(data.x + first * in.c * in.h * in.w);
    y.labels = data.labels == nullptr ? nullptr : data.labels + first;
    y.values = data.values == nullptr ? nullptr : data.values + first * network.output().c;
  }
  template <class F>
  void all(const char* name, const F& f) const {
    for_all(name, job.tasks, job.program->params, stream, f);
  }

  bool begun_ = false;
};

// Of logits as they are handed out, (T, samples, classes).
template <class Real>
void accuracy_of_logits(const Job<Real>& job, int64_t samples, int64_t classes, CUstream_st* stream) {
  const Value plain{classes, 1, 1, 0, classes, classes, classes, 0};
  accuracy<Real>(plain, job.tasks, samples, {job.logits, samples * classes}, job.query.labels, job.accuracy,
                 stream);
}

template <class Real>
class AllTasksHead {
 public:
  // Without memory it only takes it.
  AllTasksHead(const Job<Real>& job, Carver<Real>& shared, bool wants_gradient, CUstream_st* stream)
      : job_(job), stream_(stream) {
    const Program& program = *job.program;
    const Value &in = program.values[0], &out = program.values[program.value_count - 1];
    const HeadShape& shape = *job.head;
    const int64_t tasks = job.tasks, supports = shape.supports, queries = shape.queries, ways = shape.ways,
                  d = out.c, samples = supports + queries,
                  parts = (queries + kPrototypeTile - 1) / kPrototypeTile;
    const auto back = [=](int64_t count) { return wants_gradient ? count : 0; };
    pixels_ = in.c * in.h * in.w;
    inputs = shared.take(tasks * samples * pixels_);
    rows = shared.take(tasks * samples * d);
    d_rows = shared.take(back(tasks * samples * d));
    support_ = take_each(shared, tasks, supports * d);
    query_ = take_each(shared, tasks, queries * d);
    d_support_ = take_each(shared, tasks, back(supports * d));
    d_query_ = take_each(shared, tasks, back(queries * d));
    d_sums_ = shared.take(back(tasks));
    head_.tasks = tasks, head_.supports = supports, head_.queries = queries, head_.ways = ways;
    head_.features = d, head_.parts = parts, head_.metric = shape.metric;
    head_.support = support_.first, head_.query = query_.first;
    head_.d_support = d_support_.first, head_.d_query = d_query_.first;
    head_.means = shared.take(tasks * ways * d);
    head_.residual = shared.take(tasks * ways * whole_groups(queries));
    // Rows of whole vectors, so that the doubles are aligned.
    sums_ = shared.take(parts * tasks * int64_t(sizeof(double) / sizeof(Real)));
    between_.mean_inverse = shared.take(tasks * ways);
    between_.query_inverse = shared.take(tasks * queries);
    between_.weights = shared.take(back(tasks * ways * queries));
    between_.self = shared.take(back(tasks * queries));
    between_.d_means = shared.take(back(tasks * ways * d));
  }

  void join_inputs() const {
    const int64_t support = head_.supports * pixels_, query = head_.queries * pixels_;
    for_all("join_inputs", job_.tasks, support + query, stream_,
            Join<Real>{support, {job_.support.x, support}, {job_.query.x, query}, {inputs, support + query}});
  }

  // From the embeddings to logits, losses and accuracy.
  void forward() {
    for_all("split_rows", job_.tasks, support_.task + query_.task, stream_,
            Split<Real>{support_.task, {rows, support_.task + query_.task}, support_, query_});
    head_.support_labels = job_.support.labels, head_.query_labels = job_.query.labels;
    head_.logits = job_.logits;
    head_.sums = reinterpret_cast<double*>(sums_);
    prototype_head(head_, between_, stream_);
    for_all("mean_of_parts", job_.tasks, 1, stream_,
            MeanOfParts<Real>{head_.sums, head_.parts, job_.tasks, head_.queries, job_.losses});
    accuracy_of_logits(job_, head_.queries, head_.ways, stream_);
  }

  // To the embeddings' cotangents, after forward.
  void backward() {
    if (job_.cotangent == nullptr) {
      const Batch<Real> each{d_sums_, 1};
      for_all("d_sums", job_.tasks, 1, stream_, Fill<Real>{Real(1) / Real(head_.queries), each});
      head_.d_sums = d_sums_;
    } else {
      head_.d_logits = job_.cotangent;
    }
    prototype_head_backward(head_, between_, stream_);
    const int64_t all = support_.task + query_.task;
    for_all("join_rows", job_.tasks, all, stream_,
            Join<Real>{support_.task, d_support_, d_query_, {d_rows, all}});
  }

  Real *inputs, *rows, *d_rows;  // (T, Ns + Nq, ...), the support's first

 private:
  const Job<Real>& job_;
  CUstream_st* stream_;
  int64_t pixels_;
  Batch<Real> support_, query_, d_support_, d_query_;
  Real *d_sums_, *sums_;
  PrototypeHead<Real> head_{};
  PrototypeWorkspace<Real> between_{};
};

}  // namespace metafast::METAFAST_GPU
