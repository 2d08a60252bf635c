#include "engine.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "../cpu/isa.h"
#include "../cpu/job.h"
#include "../cpu/pool.h"
#include "lstm_weights.h"
#include "metric.h"

namespace metafast {

using at::Tensor;

namespace {

constexpr cpu::IsaTables<cpu::EngineTable> kTables = METAFAST_ISA_TABLES(cpu::kEngine);

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
const cpu::EngineFunctions<Real>& functions() {
  return cpu::functions_for<Real>(kTables.current());
}

template <class Real>
const Real* data_or_null(const Tensor& t) {
  return t.defined() && t.numel() > 0 ? t.const_data_ptr<Real>() : nullptr;
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

}  // namespace

Engine::Engine(const std::vector<int64_t>& ints, const std::vector<double>& numbers, at::ScalarType dtype)
    : plan_(ints, numbers, dtype == at::kFloat ? 4 : 8), dtype_(dtype) {
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, "dtype: expected float32 or float64, got ",
                   dtype);
}

Engine::Workspaces Engine::acquire(const WorkspaceLayout& layout, int threads) {
  Workspaces found;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = free_.size(); i-- > 0;) {
      if (free_[i].layout != &layout) continue;
      found = std::move(free_[i]);
      free_.erase(free_.begin() + std::ptrdiff_t(i));
      break;
    }
  }
  found.layout = &layout;
  while (int(found.threads.size()) < threads) {
    found.threads.emplace_back(zeros(size_t(layout.size * plan_.element())), std::free);
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
  Call(Engine& engine, What what, bool wants_gradient, int64_t tasks, int64_t support, int64_t query,
       int64_t steps, bool query_losses = false, const LearnedStep<Real>* learned = nullptr,
       const HeadShape* head = nullptr)
      : engine_(engine) {
    job.what = what;
    job.program = &engine.plan_.program();
    job.tasks = tasks;
    job.steps = steps;
    job.batches = 1;
    job.learned = learned;
    job.head = head;
    const int64_t rule = functions<Real>().rule_workspace(job, wants_gradient);
    job.layout = &engine.plan_.layout(what, wants_gradient, support, query, steps, query_losses, rule);
  }

  void run() {
    const int all = at::get_num_threads();
    const int threads = int(std::min<int64_t>(all, job.tasks));
    const auto run_task = functions<Real>().run_task;
    const int64_t samples = std::max(job.layout->support.samples, job.layout->query.samples);
    if (engine_.shares_tasks(job.tasks, samples, all)) {
      const cpu::Team team{all, cpu::run_parts};
      job.team = &team;
      Workspaces workspace = engine_.acquire(*job.layout, 1);
      for (int64_t t = 0; t < job.tasks; ++t)
        run_task(job, t, static_cast<Real*>(workspace.threads[0].get()));
      engine_.release(std::move(workspace));
      return;
    }
    Workspaces workspaces = engine_.acquire(*job.layout, threads);
    auto task = [&](int64_t index, int worker) {
      run_task(job, index, static_cast<Real*>(workspaces.threads[size_t(worker)].get()));
    };
    cpu::run_tasks(job.tasks, threads, task);
    engine_.release(std::move(workspaces));
  }

  Job<Real> job{};

 private:
  Engine& engine_;
};

bool Engine::shares_tasks(int64_t tasks, int64_t samples, int threads) const {
  constexpr double kLargeLayer = 1e6;  // operations
  // A shared task reaches three quarters of its threads' speed, roughly.
  return 4 * tasks <= 3 * threads &&
         plan_.operations() * double(samples) > kLargeLayer * plan_.program().layer_count;
}

void Engine::check(const char* name, const Tensor& t, at::IntArrayRef sizes) const {
  check_tensor(name, t, sizes, dtype_, at::kCPU);
}

int64_t Engine::check_x(const char* name, const Tensor& x, int64_t tasks) const {
  const Value& in = plan_.program().values[0];
  check_like(name, x, dtype_, at::kCPU);
  TORCH_CHECK_VALUE(x.dim() >= 2 && x.size(0) == tasks && x.size(1) >= 1 &&
                        x.numel() == tasks * x.size(1) * in.c * in.h * in.w,
                    name, ": expected (T, N, ...) with T = ", tasks, " and ", in.c * in.h * in.w,
                    " numbers a sample, got ", x.sizes());
  return x.size(1);
}

void Engine::check_side(const char* name, const Side& side, int64_t tasks, int64_t classes) const {
  const int64_t samples = check_x(name, side.x, tasks);
  const Program& program = plan_.program();
  const int64_t outputs = classes > 0 ? classes : program.values[program.value_count - 1].c;
  TORCH_CHECK_VALUE(side.y.device().is_cpu(), name, ": expected targets on the CPU, got ", side.y.device());
  if (program.loss == LossKind::cross_entropy) {
    TORCH_CHECK_TYPE(side.y.scalar_type() == at::kLong, name, ": expected int64 labels, got ",
                     side.y.scalar_type());
    TORCH_CHECK_VALUE(side.y.sizes() == at::IntArrayRef({tasks, samples}), name,
                      ": expected labels of shape (", tasks, ", ", samples, "), got ", side.y.sizes());
    const Tensor labels = side.y.contiguous();
    const int64_t* label = labels.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < tasks * samples; ++i) {
      TORCH_CHECK_VALUE(label[i] >= 0 && label[i] < outputs, name, ": expected labels in 0..", outputs - 1,
                        ", got ", label[i]);
    }
  } else {
    TORCH_CHECK_TYPE(side.y.scalar_type() == dtype_, name, ": expected targets of dtype ", dtype_, ", got ",
                     side.y.scalar_type());
    TORCH_CHECK_VALUE(
        side.y.dim() >= 2 && side.y.size(0) == tasks && side.y.numel() == tasks * samples * outputs, name,
        ": expected targets (", tasks, ", ", samples, ", ...) of ", outputs, " numbers a sample, got ",
        side.y.sizes());
  }
}

Tensor Engine::single(What what, const Tensor& phi, const Tensor& constants, const Side& side,
                      const Tensor* vector) {
  const bool on_support = what == What::gradient || what == What::hvp;
  const Program& program = plan_.program();
  const int64_t adapting = program.adapting, outputs = program.values[program.value_count - 1].c;
  TORCH_CHECK_VALUE(side.x.dim() >= 2, "x: expected (T, N, ...), got ", side.x.sizes());
  const int64_t tasks = side.x.size(0), samples = check_x("x", side.x, tasks);
  if (on_support) check_side("support", side, tasks);
  const bool own = phi.dim() == 2;
  own ? check("phi", phi, {tasks, adapting}) : check("phi", phi, {adapting});
  if (plan_.constants() > 0) check("constants", constants, {plan_.constants()});
  if (what == What::hvp) check("vector", *vector, {tasks, adapting});
  if (what == What::pullback) {
    TORCH_CHECK_VALUE(
        vector->dim() >= 2 && vector->numel() == tasks * samples * outputs && vector->size(0) == tasks,
        "cotangent: expected (", tasks, ", ", samples, ", ", outputs, "), got ", vector->sizes());
    check("cotangent", *vector, vector->sizes());
  }

  const Tensor parameters = phi.contiguous(),
               fixed = constants.defined() ? constants.contiguous() : constants;
  const Side held = contiguous(side);
  const Tensor along = vector == nullptr ? Tensor() : vector->contiguous();
  const Tensor result = what == What::outputs ? at::empty({tasks, samples, outputs}, phi.options())
                                              : at::empty({tasks, adapting}, phi.options());
  with_real(dtype_, [&](auto real) {
    using Real = decltype(real);
    Call<Real> call(*this, what, what != What::outputs, tasks, on_support ? samples : 0,
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

Tensor Engine::flatten(const std::vector<Tensor>& params) const {
  const Tensor flat = at::empty({plan_.program().adapting}, at::TensorOptions().dtype(dtype_));
  int64_t at = 0;
  for (const Tensor& p : params) {
    TORCH_CHECK_TYPE(p.scalar_type() == dtype_ && p.device().is_cpu(), "params: expected ", dtype_,
                     " on the CPU, got ", p.scalar_type(), " on ", p.device());
    TORCH_CHECK_VALUE(at + p.numel() <= plan_.program().adapting, "params: more than ",
                      plan_.program().adapting);
    const Tensor held = p.contiguous();
    std::memcpy(static_cast<char*>(flat.mutable_data_ptr()) + at * plan_.element(), held.const_data_ptr(),
                size_t(p.numel() * plan_.element()));
    at += p.numel();
  }
  TORCH_CHECK_VALUE(at == plan_.program().adapting, "params: expected ", plan_.program().adapting,
                    " numbers, got ", at);
  return flat;
}

void Engine::check_moves(const Tensor& moves) const {
  TORCH_CHECK_TYPE(moves.scalar_type() == at::kLong && moves.device().is_cpu(),
                   "moves: expected int64 indices on the CPU, got ", moves.scalar_type(), " on ",
                   moves.device());
  TORCH_CHECK_VALUE(moves.dim() == 1 && moves.numel() > 0 && moves.is_contiguous(),
                    "moves: expected (M,) indices in a row, got ", moves.sizes());
  const int64_t* const index = moves.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < moves.numel(); ++i) {
    TORCH_CHECK_VALUE(index[i] >= (i == 0 ? 0 : index[i - 1] + 1) && index[i] < plan_.program().adapting,
                      "moves: expected ascending indices below ", plan_.program().adapting, ", got ",
                      index[i]);
  }
}

void Engine::check_inner(const Inner& inner, int64_t shots) const {
  TORCH_CHECK_VALUE(inner.steps >= 0, "steps: expected at least 0, got ", inner.steps);
  TORCH_CHECK_VALUE(inner.batch >= 0 && (inner.batch == 0 || shots % inner.batch == 0),
                    "batch: expected a divisor of the ", shots, " support samples, got ", inner.batch);
  TORCH_CHECK_VALUE(inner.ways == 0 || plan_.program().loss == LossKind::cross_entropy,
                    "ways: expected 0 with a loss that is not cross_entropy, got ", inner.ways);
  TORCH_CHECK_VALUE(inner.truncate >= 0, "truncate: expected at least 0, got ", inner.truncate);
  TORCH_CHECK_VALUE(inner.query_weights.empty() || int64_t(inner.query_weights.size()) == inner.steps,
                    "query_weights: expected ", inner.steps, " numbers, one a step, got ",
                    inner.query_weights.size());
  if (!inner.lstm.empty()) {
    TORCH_CHECK_VALUE(!inner.rates, "rates: expected none beside an LSTM's weights");
    TORCH_CHECK_VALUE(inner.lstm.size() >= 5, "weights: expected at least 5 tensors, got ",
                      inner.lstm.size());
    check_lstm_weights(inner.lstm, inner.lstm_hidden(), inner.lstm_layers(), dtype_, true);
    if (inner.moves) check_moves(*inner.moves);
  }
  if (!inner.rates) return;
  const Tensor& rates = *inner.rates;
  TORCH_CHECK_VALUE(rates.dim() == 2 && (rates.size(0) == 1 || rates.size(0) == inner.steps),
                    "rates: expected (1 or ", inner.steps, ", P), got ", rates.sizes());
  check("rates", rates, {rates.size(0), plan_.program().adapting});
}

std::vector<int64_t> Engine::places(const Tensor& moves) const {
  const Program& program = plan_.program();
  std::vector<int64_t> of_user(size_t(program.adapting), -1), found(size_t(program.params), -1);
  const int64_t* const index = moves.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < moves.numel(); ++i) of_user[size_t(index[i])] = i;
  for (int64_t i = 0; i < program.params; ++i) {
    const int64_t p = program.source[i];
    if (p >= 0 && p < program.adapting) found[size_t(i)] = of_user[size_t(p)];
  }
  return found;
}

Engine::Unrolled Engine::unroll(const Tensor& theta, const Tensor& constants, const Side& support,
                                const Side& query, const Inner& inner, const std::optional<Tensor>& cotangent,
                                bool wants_gradient, bool wants_rate_gradient, const Tensor& weights) {
  const Program& program = plan_.program();
  const int64_t outputs = program.values[program.value_count - 1].c;
  const int64_t tasks = support.x.size(0), shots = support.x.size(1), queries = query.x.size(1);
  check_inner(inner, shots);
  const Side s = contiguous(support), q = contiguous(query);
  const Tensor fixed = constants.defined() ? constants.contiguous() : constants;
  const Tensor rates = inner.rates ? inner.rates->contiguous() : Tensor();
  const at::TensorOptions options = theta.options();
  Unrolled result;
  result.outcome.losses = at::empty({tasks}, options);
  const bool compares = inner.ways > 0;
  result.outcome.logits = at::empty({tasks, queries, compares ? inner.ways : outputs}, options);
  if (program.loss == LossKind::cross_entropy) result.outcome.accuracy = at::empty({tasks}, options);
  // Rows of few bytes stay in the cache; those of many threads are sooner summed by all of them at the end.
  // The order of tasks is the same, and so are the bits.
  constexpr int64_t kFewBytes = 1 << 20, kFewThreads = 4;
  const bool sums = weights.defined() && sums_ && at::get_num_threads() <= kFewThreads &&
                    tasks * program.params * plan_.element() > kFewBytes;
  if (wants_gradient) {
    result.gradient =
        sums ? at::empty({program.params}, options) : at::empty({tasks, program.params}, options);
  }
  if (wants_rate_gradient) {
    const std::vector<int64_t> sizes{tasks, rates.size(0), program.params};
    result.rate_gradient = inner.steps > 0 ? at::empty(sizes, options) : at::zeros(sizes, options);
  }
  with_real(dtype_, [&](auto real) {
    using Real = decltype(real);
    const int64_t batch = inner.batch > 0 ? inner.batch : shots;
    std::optional<HeldLstmWeights<Real>> lstm;
    LearnedStep<Real> learned{nullptr, program.adapting, program.source};
    std::vector<int64_t> place;
    if (!inner.lstm.empty()) {
      lstm.emplace(inner.lstm, inner.lstm_hidden(), inner.lstm_layers(), inner.p);
      learned.weights = &**lstm;
      if (inner.moves) {
        place = places(*inner.moves);
        learned.coordinates = inner.moves->numel();
        learned.place = place.data();
      }
    }
    const HeadShape head{shots, queries, inner.ways, compares ? metric_of(inner.metric) : Metric{}};
    Call<Real> call(*this, compares ? What::prototypes : What::meta_step, wants_gradient, tasks,
                    inner.steps > 0 ? batch : 0, compares ? shots + queries : queries, inner.steps,
                    !inner.query_weights.empty(), lstm ? &learned : nullptr, compares ? &head : nullptr);
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
    const Tensor ordered = at::empty({1 + rows, program.params}, options);
    Real* const to = ordered.mutable_data_ptr<Real>();
    const Real *const from = theta.const_data_ptr<Real>(), *const other = data_or_null<Real>(fixed);
    functions<Real>().to_engine(program, from, other, to);
    for (int64_t k = 0; k < rows; ++k) {
      const Real* row = rates.defined() ? rates.const_data_ptr<Real>() + k * program.adapting : nullptr;
      for (int64_t i = 0; i < program.params; ++i) {
        const int64_t p = program.source[i];
        const bool adapts = p >= 0 && p < program.adapting;
        to[(1 + k) * program.params + i] = !adapts ? Real(0) : row == nullptr ? job.rate : row[p];
      }
    }
    job.theta = to;
    job.rates = uneven ? to + program.params : nullptr;
    job.rates_stride = rows > 1 ? program.params : 0;

    const Tensor along = cotangent ? cotangent->contiguous() : Tensor();
    job.cotangent = data_or_null<Real>(along);
    job.losses = result.outcome.losses.mutable_data_ptr<Real>();
    job.logits = result.outcome.logits.mutable_data_ptr<Real>();
    job.accuracy = result.outcome.accuracy ? result.outcome.accuracy->mutable_data_ptr<Real>() : nullptr;
    job.gradient = wants_gradient ? result.gradient.mutable_data_ptr<Real>() : nullptr;
    if (wants_gradient && lstm) {
      result.rule_gradient = at::empty({tasks, (**lstm).count_with_start()}, options);
      job.rule_gradient = result.rule_gradient.mutable_data_ptr<Real>();
    }
    std::vector<int32_t> ready(size_t(sums ? tasks : 0), 0);
    int64_t turn = 0;
    const Tensor spare = sums ? at::empty({tasks, program.params}, options) : Tensor();  // hardly touched
    if (sums) {
      job.weights = weights.const_data_ptr<Real>();
      job.rows = spare.mutable_data_ptr<Real>();
      job.ready = ready.data();
      job.turn = &turn;
    }
    job.rate_gradient = wants_rate_gradient ? result.rate_gradient.mutable_data_ptr<Real>() : nullptr;
    call.run();
  });
  return result;
}

Tensor Engine::sum_tasks(const Tensor& rows, const Tensor& weights) const {
  const int64_t tasks = rows.size(0), size = rows.numel() / tasks;
  const Tensor sums = at::empty({size}, rows.options());
  with_real(dtype_, [&](auto real) {
    using Real = decltype(real);
    constexpr int64_t kChunk = 1024;
    const int64_t chunks = (size + kChunk - 1) / kChunk;
    const Real *const each = rows.const_data_ptr<Real>(), *const w = weights.const_data_ptr<Real>();
    Real* const to = sums.mutable_data_ptr<Real>();
    const auto weighted_sum = functions<Real>().weighted_sum;
    auto chunk = [&](int64_t index, int) {
      const int64_t begin = index * kChunk, end = std::min(begin + kChunk, size);
      weighted_sum(each, tasks, size, w, begin, end, to);
    };
    cpu::run_tasks(chunks, at::get_num_threads(), chunk);
  });
  return sums;
}

Tensor Engine::reduce(const Tensor& gradient, const Tensor& weights) const {
  const Program& program = plan_.program();
  const int64_t rows = gradient.dim() == 3 ? gradient.size(1) : 1;
  const Tensor sums = gradient.dim() == 1 ? gradient : sum_tasks(gradient, weights);
  const Tensor flat = gradient.dim() == 3 ? at::empty({rows, program.adapting}, gradient.options())
                                          : at::empty({program.adapting}, gradient.options());
  with_real(dtype_, [&](auto real) {
    using Real = decltype(real);
    const Real* from = sums.const_data_ptr<Real>();
    Real* user = flat.mutable_data_ptr<Real>();
    for (int64_t row = 0; row < rows; ++row, user += program.adapting, from += program.params)
      functions<Real>().to_user(program, from, user);
  });
  return flat;
}

void Engine::set_loss(MetaOutcome& outcome, const Tensor& weights) const {
  outcome.loss = at::empty({}, outcome.losses.options());
  with_real(dtype_, [&](auto real) {
    using Real = decltype(real);
    const Real *const w = weights.const_data_ptr<Real>(), *const losses =
                                                              outcome.losses.const_data_ptr<Real>();
    Real sum = 0;
    for (int64_t t = 0; t < outcome.losses.numel(); ++t) sum += w[t] * losses[t];
    *outcome.loss.mutable_data_ptr<Real>() = sum;
  });
}

std::tuple<int64_t, int64_t> Engine::workspace(int64_t support, int64_t query, int64_t steps) {
  const WorkspaceLayout& layout = plan_.layout(What::meta_step, true, support, query, steps);
  return {layout.size * plan_.element(), steps * plan_.program().params * plan_.element()};
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
