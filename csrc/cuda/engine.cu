#include "engine.h"
#include "mlp_meta_step.h"
#include "unroll.h"

namespace metafast::METAFAST_GPU {
namespace {

template <class Real, template <class> class Rule>
void meta_step_of(AllTasks<Real>& all, Carver<Real>& shared) {
  Rule<Real> rule(all.job, shared, all.job.gradient != nullptr, all.stream);
  meta_step(all, rule);
}

// What mlp_meta_step.cuh does alone, but the accuracy.
template <class Real>
void run_in_one_launch(const Job<Real>& job, Real* tape, CUstream_st* stream) {
  const Program& program = *job.program;
  const int64_t samples = job.layout->query.samples, d = program.values[program.value_count - 1].c;
  const auto set = [](const Data<Real>& data, int64_t count) {
    return MlpSet<Real>{count, data.x, data.values, data.labels};
  };
  mlp_meta_step(
      MlpMetaStep<Real>{*program.mlp, job.tasks, job.steps, job.rate, job.first_order, program.source,
                        program.params, job.theta, set(job.support, job.layout->support.samples),
                        set(job.query, samples), job.losses, job.logits, job.gradient, tape},
      stream);
  if (job.accuracy != nullptr) accuracy_of_logits(job, samples, d, stream);
}

}  // namespace

template <class Real>
int64_t shared_workspace(const Job<Real>& job, bool wants_gradient) {
  if (job.one_launch) return wants_gradient ? job.tasks * job.steps * job.program->mlp->size() : 0;
  Carver<Real> shared(nullptr);
  shared.take(job.tasks);  // AllTasks
  if (job.what == What::prototypes) {
    AllTasksHead<Real>(job, shared, wants_gradient, nullptr);
  } else if (job.learned != nullptr) {
    LearnedRule<Real>(job, shared, wants_gradient, nullptr);
  }
  return shared.size();
}

template <class Real>
void run(const Job<Real>& job, Real* workspace, Real* memory, CUstream_st* stream) {
  if (job.one_launch) return run_in_one_launch(job, memory, stream);
  Carver<Real> shared(memory);
  AllTasks<Real> all(job, workspace, shared, stream);
  if (job.what == What::prototypes) {
    AllTasksHead<Real> head(job, shared, job.gradient != nullptr, stream);
    prototype_step(all, head);
  } else if (job.what == What::meta_step) {
    job.learned == nullptr ? meta_step_of<Real, PlainRule>(all, shared)
                           : meta_step_of<Real, LearnedRule>(all, shared);
  } else {
    single(all);
  }
}

template <class Real>
void to_engine(const Program& program, int64_t rows, const Real* user, const Real* constants, Real* w,
               CUstream_st* stream) {
  const Batch<const Real> from{user, program.adapting};
  const Batch<Real> to{w, program.params};
  for_all("to_engine", rows, program.params, stream,
          ToEngine<Real>{program.source, program.adapting, from, constants, to});
}

template <class Real>
void to_user(const Program& program, int64_t rows, const Real* w, Real* user, CUstream_st* stream) {
  const Batch<const Real> from{w, program.params};
  const Batch<Real> to{user, program.adapting};
  for_all("to_user", rows, program.adapting, stream, Fill<Real>{Real(0), to});
  for_all("to_user", rows, program.params, stream,
          Scatter<Real>{program.source, program.adapting, Real(1), from, to});
}

#define METAFAST_ENGINE(Real)                                                                      \
  template int64_t shared_workspace(const Job<Real>&, bool);                                       \
  template void run(const Job<Real>&, Real*, Real*, CUstream_st*);                                 \
  template void to_engine(const Program&, int64_t, const Real*, const Real*, Real*, CUstream_st*); \
  template void to_user(const Program&, int64_t, const Real*, Real*, CUstream_st*);
METAFAST_ENGINE(float)
METAFAST_ENGINE(double)
#undef METAFAST_ENGINE

}  // namespace metafast::METAFAST_GPU
