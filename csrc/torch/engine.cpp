// An engine's calls: memory for them, one network, the inner loop. Its other files are engine_checks.cpp,
// engine_order.cpp and meta_step.cpp.
#include "engine.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/dot.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "../cpu/pool.h"
#include "../engine/one_step.h"
#include "engine_data.h"
#include "gpu.h"
#include "lstm_weights.h"
#include "metric.h"
#include "uninitialized.h"

namespace metafast {

using at::Tensor;

namespace {

// A workspace, to be freed by std::free. On huge pages where it is large: transforms of a convolution write
// to dozens of places at once, which are as many pages.
void* zeros(size_t size) {
  constexpr size_t kPage = 4096, kHugePage = size_t(2) << 20;
  const size_t page = size < kHugePage ? kPage : kHugePage;
  const size_t bytes = std::max((size + page - 1) / page * page, page);
  void* const memory = std::aligned_alloc(page, bytes);
  TORCH_CHECK(memory != nullptr, "metafast: no memory for a workspace of ", size, " bytes");
#ifdef __linux__
  if (page == kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);  // advice: refused, it changes nothing
#endif
  std::memset(memory, 0, bytes);
  return memory;
}

template <class Real>
Data<Real> data_of(const Side& side) {
  Data<Real> data{side.x.const_data_ptr<Real>(), nullptr, nullptr};
  if (!side.y.defined()) return data;
  if (side.y.scalar_type() == at::kLong) {
    data.labels = side.y.const_data_ptr<int64_t>();
  } else {
    data.values = side.y.const_data_ptr<Real>();
  }
  return data;
}

Side contiguous(const Side& side) {
  return {side.x.contiguous(), side.y.defined() ? side.y.contiguous() : side.y};
}

// (T, N, ...) as (batches, T, N / batches, ...), as cuda/engine.h wants a support set.
Side by_batches(const Side& side, int64_t batches) {
  const auto cut = [batches](const Tensor& t) {
    std::vector<int64_t> sizes = t.sizes().vec();
    sizes[1] /= batches;
    sizes.insert(sizes.begin() + 1, batches);
    return t.reshape(sizes).transpose(0, 1).contiguous();
  };
  return batches == 1 ? contiguous(side) : Side{cut(side.x), cut(side.y)};
}

}  // namespace

Engine::Engine(const std::vector<int64_t>& ints, const std::vector<double>& numbers, at::ScalarType dtype)
    : plan_(ints, numbers, dtype == at::kFloat ? 4 : 8),
      gpu_plan_(ints, numbers, dtype == at::kFloat ? 4 : 8, false),
      dtype_(dtype) {
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, "dtype: expected float32 or float64, got ",
                   dtype);
}

Tensor Engine::source_on(at::Device device) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return placed(device).source;
}

const Program& Engine::program_on(at::Device device) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return placed(device).program;
}

Engine::Placed& Engine::placed(at::Device device) {
  for (Placed& one : placed_) {
    if (one.source.device() == device) return one;
  }
  const Program& program = gpu_plan_.program();
  const Tensor host = at::from_blob(const_cast<int64_t*>(program.source), {program.params}, at::kLong);
  Placed& one = placed_.emplace_back(Placed{host.to(device), program});
  one.program.source = one.source.const_data_ptr<int64_t>();
  return one;
}

Engine::Workspaces Engine::acquire(const std::shared_ptr<const WorkspaceLayout>& layout, int threads) {
  Workspaces found;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = free_.size(); i-- > 0;) {
      if (free_[i].layout != layout) continue;
      found = std::move(free_[i]);
      free_.erase(free_.begin() + std::ptrdiff_t(i));
      break;
    }
  }
  found.layout = layout;
  while (int(found.threads.size()) < threads) {
    found.threads.emplace_back(zeros(size_t(layout->size * plan_.element())), std::free);
  }
  return found;
}

void Engine::release(Workspaces&& workspaces) {
  constexpr size_t kMostKept = 4;  // training and evaluation, each at its own sizes
  const std::lock_guard<std::mutex> lock(mutex_);
  free_.push_back(std::move(workspaces));
  if (free_.size() > kMostKept) free_.erase(free_.begin());
}

// One job: its tensors are held by the caller.
template <class Real>
class Engine::Call {
 public:
  Call(Engine& engine, at::Device device, What what, bool wants_gradient, int64_t tasks, int64_t support,
       int64_t query, int64_t steps, bool query_losses = false, const LearnedStep<Real>* learned = nullptr,
       const HeadShape* head = nullptr, bool one_launch = false, const Together& together = {})
      : engine_(engine), gpu_(Gpu::of(device)) {
    Plan& plan = gpu_ ? engine.gpu_plan_ : engine.plan_;
    job.what = what;
    job.program = gpu_ ? &engine.program_on(device) : &plan.program();
    job.tasks = tasks;
    job.steps = steps;
    job.batches = 1;
    job.learned = learned;
    job.head = head;
    job.one_launch = one_launch;
    static std::atomic<int64_t> jobs{0};
    job.stamp = ++jobs;
    job.together = together.most;
    job.shares = together.shares;
    const int64_t more =
        gpu_ ? 0 : engine_functions<Real>().more_workspace(job, support, query, wants_gradient);
    if (gpu_) shared_ = gpu_->functions<Real>().shared_workspace(job, wants_gradient);
    layout_ = plan.layout(what, wants_gradient, support, query, steps, query_losses, more, together.most);
    job.layout = layout_.get();
  }

  void run() { gpu_ ? run_at_once() : run_by_tasks(); }

  Job<Real> job{};

 private:
  // Memory is torch's, whose allocator knows when the stream is done with it.
  void run_at_once() {
    const at::TensorOptions options = at::TensorOptions().dtype(engine_.dtype_).device(gpu_->device());
    const Tensor workspaces = at::zeros({job.one_launch ? 0 : job.tasks, job.layout->size}, options),
                 shared = uninitialized({shared_}, options);
    job.products = gpu_->products<Real>();
    gpu_->functions<Real>().run(job, workspaces.mutable_data_ptr<Real>(), shared.mutable_data_ptr<Real>(),
                                gpu_->stream());
  }

  void run_by_tasks() {
    const int all = at::get_num_threads();
    const int64_t group = std::max<int64_t>(job.group, 1);
    const int64_t groups = job.together > 0 ? job.shares : (job.tasks + group - 1) / group;
    const int64_t samples =
        std::max(job.layout->support.samples, job.layout->query.samples) / std::max<int64_t>(job.together, 1);
    const bool by_all = engine_.shares_tasks(job.tasks, samples, all);
    const cpu::Team team{all, cpu::run_parts};
    if (by_all) job.team = &team;
    const int threads = by_all ? 1 : int(std::min<int64_t>(all, groups));
    Workspaces workspaces = engine_.acquire(layout_, threads);
    auto of_group = [&](int64_t index, int worker) {
      const auto first = [&](int64_t g) {
        return job.together > 0 ? g * job.tasks / job.shares : std::min(g * group, job.tasks);
      };
      engine_functions<Real>().run_tasks(job, first(index), first(index + 1),
                                         static_cast<Real*>(workspaces.threads[size_t(worker)].get()));
    };
    cpu::run_tasks(groups, threads, of_group);
    engine_.release(std::move(workspaces));
  }

  Engine& engine_;
  std::optional<Gpu> gpu_;
  int64_t shared_ = 0;
  std::shared_ptr<const WorkspaceLayout> layout_;
};

bool Engine::shares_tasks(int64_t tasks, int64_t samples, int threads) const {
  constexpr double kLargeLayer = 1e6;  // operations
  // A shared task reaches three quarters of its threads' speed, roughly.
  return 4 * tasks <= 3 * threads &&
         plan_.operations() * double(samples) > kLargeLayer * plan_.program().layer_count;
}

Tensor Engine::single(What what, const Tensor& phi, const Tensor& constants, const Side& side,
                      const Tensor* vector) {
  const bool on_support = what == What::gradient || what == What::hvp;
  const Program& program = plan_.program();
  const int64_t adapting = program.adapting, outputs = program.values[program.value_count - 1].c;
  TORCH_CHECK_VALUE(side.x.dim() >= 2, "x: expected (T, N, ...), got ", side.x.sizes());
  const at::Device device = side.x.device();
  const c10::DeviceGuard guard(device);
  const int64_t tasks = side.x.size(0), samples = check_x("x", side.x, tasks, device);
  if (on_support) check_side("support", side, tasks, device);
  const bool own = phi.dim() == 2;
  own ? check("phi", phi, {tasks, adapting}, device) : check("phi", phi, {adapting}, device);
  if (plan_.constants() > 0) check("constants", constants, {plan_.constants()}, device);
  if (what == What::hvp) check("vector", *vector, {tasks, adapting}, device);
  if (what == What::pullback) {
    TORCH_CHECK_VALUE(
        vector->dim() >= 2 && vector->numel() == tasks * samples * outputs && vector->size(0) == tasks,
        "cotangent: expected (", tasks, ", ", samples, ", ", outputs, "), got ", vector->sizes());
    check("cotangent", *vector, vector->sizes(), device);
  }

  const Tensor parameters = phi.contiguous(),
               fixed = constants.defined() ? constants.contiguous() : constants;
  const Side held = contiguous(side);
  const Tensor along = vector == nullptr ? Tensor() : vector->contiguous();
  const Tensor result = what == What::outputs ? uninitialized({tasks, samples, outputs}, phi.options())
                                              : uninitialized({tasks, adapting}, phi.options());
  with_real(dtype_, [&](auto real) {
    using Real = decltype(real);
    Call<Real> call(*this, device, what, what != What::outputs, tasks, on_support ? samples : 0,
                    on_support ? 0 : samples, 0);
    (on_support ? call.job.support : call.job.query) = data_of<Real>(held);
    call.job.phi = parameters.const_data_ptr<Real>();
    call.job.phi_stride = own ? adapting : 0;
    call.job.constants = data_or_null<Real>(fixed);
    (what == What::hvp ? call.job.vector : call.job.cotangent) = data_or_null<Real>(along);
    (what == What::outputs ? call.job.logits : call.job.gradient) = result.mutable_data_ptr<Real>();
    call.run();
  });
  return result;
}

Tensor Engine::outputs(const Tensor& phi, const Tensor& constants, const Tensor& x) {
  return single(What::outputs, phi, constants, {x, {}}, nullptr);
}
Tensor Engine::pullback(const Tensor& phi, const Tensor& constants, const Tensor& x,
                        const Tensor& cotangent) {
  return single(What::pullback, phi, constants, {x, {}}, &cotangent);
}
Tensor Engine::gradient(const Tensor& phi, const Tensor& constants, const Side& support) {
  return single(What::gradient, phi, constants, support, nullptr);
}
Tensor Engine::hvp(const Tensor& phi, const Tensor& constants, const Side& support, const Tensor& vector) {
  return single(What::hvp, phi, constants, support, &vector);
}

Engine::Unrolled Engine::unroll(const Tensor& theta, const Tensor& constants, const Side& support,
                                const Side& query, const Inner& inner, const std::optional<Tensor>& cotangent,
                                bool wants_gradient, bool wants_rate_gradient, const Tensor& weights) {
  const Program& program = plan_.program();
  const int64_t outputs = program.values[program.value_count - 1].c;
  const int64_t tasks = support.x.size(0), shots = support.x.size(1), queries = query.x.size(1);
  const at::Device device = theta.device();
  const c10::DeviceGuard guard(device);
  check_inner(inner, shots, device);
  const int64_t batch = inner.batch > 0 ? inner.batch : shots;
  const std::optional<Gpu> gpu = Gpu::of(device);
  const bool on_gpu = gpu.has_value();
  const Side s = on_gpu ? by_batches(support, shots / batch) : contiguous(support), q = contiguous(query);
  const Tensor fixed = constants.defined() ? constants.contiguous() : constants;
  const Tensor rates = inner.rates ? inner.rates->contiguous() : Tensor();
  const at::TensorOptions options = theta.options();
  Unrolled result;
  result.outcome.losses = uninitialized({tasks}, options);
  const bool compares = inner.ways > 0;
  result.outcome.logits = uninitialized({tasks, queries, compares ? inner.ways : outputs}, options);
  if (program.loss == LossKind::cross_entropy) result.outcome.accuracy = uninitialized({tasks}, options);
  const bool plain = !inner.rates && inner.lstm.empty() && inner.truncate == 0 && batch == shots &&
                     inner.query_weights.empty() && !compares;
  const bool one_sum = wants_gradient && weights.defined() && sums_ && !on_gpu;
  const Together together = !on_gpu && plain && inner.steps == 1
                                ? this->together(tasks, shots, queries, wants_gradient, one_sum)
                                : Together{};
  // Sums over tasks are made as gradients come: of tasks together, of short ones by groups, of others in
  // their turn. Rows of few bytes stay in the cache; those of many threads are sooner summed by all of them
  // at the end. The order is the same, and so are the bits; tasks together have no rows of their own.
  constexpr int64_t kFewBytes = 1 << 20, kFewThreads = 4;
  const bool may_sum = one_sum && at::get_num_threads() <= kFewThreads;
  const int64_t group = group_of(tasks),
                groups = together.most > 0 ? together.shares : (tasks + group - 1) / group;
  const bool by_groups = together.most > 0 ? one_sum : may_sum && groups > 1;
  const bool sums = may_sum && !by_groups && tasks * program.params * plan_.element() > kFewBytes;
  if (wants_gradient) {
    result.gradient = sums ? uninitialized({program.params}, options)
                           : uninitialized({by_groups ? groups : tasks, program.params}, options);
  }
  if (wants_rate_gradient) {
    const std::vector<int64_t> sizes{tasks, rates.size(0), program.params};
    result.rate_gradient = inner.steps > 0 ? uninitialized(sizes, options) : at::zeros(sizes, options);
  }
  with_real(dtype_, [&](auto real) {
    using Real = decltype(real);
    std::optional<HeldLstmWeights<Real>> lstm;
    Tensor place;
    LearnedStep<Real> learned{nullptr, program.adapting, nullptr};
    if (!inner.lstm.empty()) {
      lstm.emplace(inner.lstm, inner.lstm_hidden(), inner.lstm_layers(), inner.p);
      learned.weights = &**lstm;
      if (inner.moves) learned.coordinates = inner.moves->numel();
      place = inner.moves ? places(*inner.moves) : source_on(device);
      learned.place = place.const_data_ptr<int64_t>();
    }
    const HeadShape head{shots, queries, inner.ways, compares ? metric_of(inner.metric) : Metric{}};
    const bool one_launch = on_gpu && plain && !cotangent && one_launch_where_fit && program.mlp != nullptr &&
                            gpu->functions<Real>().fits_mlp_meta_step(*program.mlp, std::max(shots, queries));
    Call<Real> call(*this, device, compares ? What::prototypes : What::meta_step, wants_gradient, tasks,
                    inner.steps > 0 ? batch : 0, compares ? shots + queries : queries, inner.steps,
                    !inner.query_weights.empty(), lstm ? &learned : nullptr, compares ? &head : nullptr,
                    one_launch, together);
    Job<Real>& job = call.job;
    job.support = data_of<Real>(s);
    job.query = data_of<Real>(q);
    job.batches = shots / batch;
    job.first_order = inner.first_order;
    job.truncate = inner.truncate;
    job.rate = Real(inner.rate);
    const std::vector<Real> query_weights(inner.query_weights.begin(), inner.query_weights.end());
    job.query_weights = query_weights.empty() ? nullptr : query_weights.data();

    // theta in the engine's order, and where they differ from element to element the rates; whole vectors
    // long.
    const bool uneven = rates.defined() || (plan_.constants() > 0 && !lstm);
    const int64_t rows = !uneven ? 0 : rates.defined() ? rates.size(0) : 1;
    const Tensor both = ordered(theta, fixed, rates, inner.rate, rows);
    job.theta = both.const_data_ptr<Real>();
    job.rates = uneven ? job.theta + program.params : nullptr;
    job.rates_stride = rows > 1 ? program.params : 0;

    const Tensor along = cotangent ? cotangent->contiguous() : Tensor();
    job.cotangent = data_or_null<Real>(along);
    job.losses = result.outcome.losses.mutable_data_ptr<Real>();
    job.logits = result.outcome.logits.mutable_data_ptr<Real>();
    job.accuracy = result.outcome.accuracy ? result.outcome.accuracy->mutable_data_ptr<Real>() : nullptr;
    job.gradient = wants_gradient ? result.gradient.mutable_data_ptr<Real>() : nullptr;
    if (wants_gradient && lstm) {
      result.rule_gradient = uninitialized({tasks, (**lstm).count_with_start()}, options);
      job.rule_gradient = result.rule_gradient.mutable_data_ptr<Real>();
    }
    std::vector<int32_t> ready(size_t(sums ? tasks : 0), 0);
    int64_t turn = 0;
    const Tensor spare = sums ? uninitialized({tasks, program.params}, options) : Tensor();  // hardly touched
    if (sums || by_groups) job.weights = weights.const_data_ptr<Real>();
    if (by_groups && together.most == 0) job.group = group;
    if (sums) {
      job.rows = spare.mutable_data_ptr<Real>();
      job.ready = ready.data();
      job.turn = &turn;
    }
    job.rate_gradient = wants_rate_gradient ? result.rate_gradient.mutable_data_ptr<Real>() : nullptr;
    call.run();
  });
  if (by_groups) result.gradient = sum_tasks(result.gradient, {}, groups);
  return result;
}

void Engine::set_loss(MetaOutcome& outcome, const Tensor& weights) const {
  if (!weights.is_cpu()) {
    outcome.loss = at::dot(weights, outcome.losses);
    return;
  }
  outcome.loss = uninitialized({}, outcome.losses.options());
  with_real(dtype_, [&](auto real) {
    using Real = decltype(real);
    const Real *const w = weights.const_data_ptr<Real>(), *const losses =
                                                              outcome.losses.const_data_ptr<Real>();
    Real sum = 0;
    for (int64_t t = 0; t < outcome.losses.numel(); ++t) sum += w[t] * losses[t];
    *outcome.loss.mutable_data_ptr<Real>() = sum;
  });
}

Engine::Together Engine::together(int64_t tasks, int64_t support, int64_t query, bool wants_gradient,
                                  bool summed) const {
  constexpr int64_t kMost = 4, kParts = 8, kMostShares = 32;  // parts: for threads to share
  const Program& program = plan_.program();
  if (plan_.constants() > 0) return {};
  bool any = false;
  for (int32_t i = 0; i < program.layer_count; ++i) {
    const Layer& l = program.layers[i];
    if (l.kind == Kind::conv2d) return {};
    any |= is_wide(program, l, support, query);
  }
  if (!any) return {};
  const int64_t groups = std::max((tasks + kMost - 1) / kMost, std::min(tasks, kParts));
  const int64_t shares = !wants_gradient ? groups : summed ? std::min(groups, kMostShares) : tasks;
  return {std::min((tasks + shares - 1) / shares, kMost), shares};
}

std::tuple<int64_t, int64_t> Engine::workspace(int64_t support, int64_t query, int64_t steps) {
  constexpr int64_t kMany = 1 << 20;
  const int64_t at_once = steps == 1 ? together(kMany, support, query, true, true).most : 0;
  int64_t more = 0;
  with_real(dtype_, [&](auto real) {
    Job<decltype(real)> job{};
    job.what = What::meta_step;
    job.program = &plan_.program();
    job.together = at_once;
    more = engine_functions<decltype(real)>().more_workspace(job, support, query, true);
  });
  const auto layout = plan_.layout(What::meta_step, true, support, query, steps, false, more, at_once);
  const int64_t tape = at_once > 0 ? 0 : steps * plan_.program().params;
  return {layout->size * plan_.element(), tape * plan_.element()};
}

std::vector<int64_t> Engine::winograd_from() const {
  std::vector<int64_t> samples;
  const Program& program = plan_.program();
  for (int32_t i = 0; i < program.layer_count; ++i) {
    const Layer& l = program.layers[i];
    if (l.kind == Kind::conv2d) samples.push_back(l.block == 0 ? 0 : l.winograd_from);
  }
  return samples;
}

}  // namespace metafast
