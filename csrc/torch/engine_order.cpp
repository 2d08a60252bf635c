// Vectors of parameters between the user's order and the engine's, and their sums over tasks.
#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <cstring>

#include "../cpu/pool.h"
#include "engine.h"
#include "engine_data.h"
#include "gpu.h"
#include "uninitialized.h"

namespace metafast {

using at::Tensor;

Tensor Engine::flatten(const std::vector<Tensor>& params, at::Device device) const {
  const int64_t adapting = plan_.program().adapting;
  int64_t count = 0;
  for (const Tensor& p : params) {
    TORCH_CHECK_TYPE(p.scalar_type() == dtype_ && p.device() == device, "params: expected ", dtype_, " on ",
                     device, ", got ", p.scalar_type(), " on ", p.device());
    count += p.numel();
  }
  TORCH_CHECK_VALUE(count == adapting, "params: expected ", adapting, " numbers, got ", count);
  const Tensor flat = uninitialized({adapting}, at::TensorOptions().dtype(dtype_).device(device));
  for_parts(params, [&](const Tensor& p, int64_t at) {
    const Tensor held = p.contiguous();
    if (device.is_cpu()) {
      std::memcpy(static_cast<char*>(flat.mutable_data_ptr()) + at * plan_.element(), held.const_data_ptr(),
                  size_t(p.numel() * plan_.element()));
    } else {
      flat.narrow(0, at, p.numel()).copy_(held.view({-1}));
    }
  });
  return flat;
}

Tensor Engine::places(const Tensor& moves) {
  const Program& program = plan_.program();
  const Tensor of_user = at::full({program.adapting}, -1, moves.options()),
               source = source_on(moves.device());
  of_user.index_copy_(0, moves, at::arange(moves.numel(), moves.options()));
  const Tensor found = of_user.index_select(0, source.clamp(0, program.adapting - 1));
  return found.masked_fill_(source.lt(0).logical_or_(source.ge(program.adapting)), -1);
}

Tensor Engine::ordered(const Tensor& theta, const Tensor& constants, const Tensor& rates, double rate,
                       int64_t rows) {
  const at::Device device = theta.device();
  const std::optional<Gpu> gpu = Gpu::of(device);
  const Program& program = gpu ? program_on(device) : plan_.program();
  // The rates of all parameters, zeros for the constants.
  const Tensor each =
      rates.defined() || rows == 0 ? rates : at::full({program.adapting}, rate, theta.options());
  const Tensor all = uninitialized({1 + rows, program.params}, theta.options());
  with_real(dtype_, [&](auto real) {
    using Real = decltype(real);
    const auto to_engine = [&](const Tensor& user, const Real* fixed, int64_t count, Real* to) {
      const Real* const from = user.const_data_ptr<Real>();
      if (gpu) return gpu->functions<Real>().to_engine(program, count, from, fixed, to, gpu->stream());
      for (int64_t row = 0; row < count; ++row)
        engine_functions<Real>().to_engine(program, from + row * program.adapting, fixed,
                                           to + row * program.params);
    };
    Real* const to = all.mutable_data_ptr<Real>();
    to_engine(theta, data_or_null<Real>(constants), 1, to);
    if (rows > 0) to_engine(each, nullptr, rows, to + program.params);
  });
  return all;
}

int64_t Engine::group_of(int64_t tasks) const {
  constexpr int64_t kGroups = 8, kLeastTasks = 16;
  return tasks < kLeastTasks || !plan_.params_are_short() ? tasks : tasks / kGroups;
}

Tensor Engine::sum_tasks(const Tensor& rows, const Tensor& weights, int64_t group) const {
  const c10::DeviceGuard guard(rows.device());
  const int64_t tasks = rows.size(0), size = rows.numel() / tasks;
  const Tensor sums = uninitialized({size}, rows.options());
  with_real(dtype_, [&](auto real) {
    using Real = decltype(real);
    if (const auto gpu = Gpu::of(rows.device())) {
      return gpu->functions<Real>().weighted_sum({rows.const_data_ptr<Real>(), weights.const_data_ptr<Real>(),
                                                  tasks, size, sums.mutable_data_ptr<Real>()},
                                                 gpu->stream());
    }
    constexpr int64_t kChunk = 1024, kFew = 1 << 15;  // for one thread
    const int64_t chunks = (size + kChunk - 1) / kChunk;
    const std::vector<Real> ones(weights.defined() ? 0 : size_t(tasks), Real(1));
    const Real *const each = rows.const_data_ptr<Real>(), *const w = weights.defined()
                                                                         ? weights.const_data_ptr<Real>()
                                                                         : ones.data();
    Real* const to = sums.mutable_data_ptr<Real>();
    const auto weighted_sum = engine_functions<Real>().weighted_sum;
    auto chunk = [&](int64_t index, int) {
      const int64_t begin = index * kChunk, end = std::min(begin + kChunk, size);
      weighted_sum(each, tasks, group, size, w, begin, end, to);
    };
    cpu::run_tasks(chunks, rows.numel() <= kFew ? 1 : at::get_num_threads(), chunk);
  });
  return sums;
}

Tensor Engine::reduce(const Tensor& gradient, const Tensor& weights) {
  const c10::DeviceGuard guard(gradient.device());
  const Program& program = plan_.program();
  const int64_t rows = gradient.dim() == 3 ? gradient.size(1) : 1;
  const int64_t tasks = gradient.size(0);
  const Tensor sums =
      gradient.dim() == 1 ? gradient : sum_tasks(gradient, weights, rows == 1 ? group_of(tasks) : tasks);
  const Tensor flat = gradient.dim() == 3 ? uninitialized({rows, program.adapting}, gradient.options())
                                          : uninitialized({program.adapting}, gradient.options());
  with_real(dtype_, [&](auto real) {
    using Real = decltype(real);
    const Real* from = sums.const_data_ptr<Real>();
    Real* user = flat.mutable_data_ptr<Real>();
    if (const auto gpu = Gpu::of(flat.device())) {
      const Program& there = program_on(flat.device());
      return gpu->functions<Real>().to_user(there, rows, from, user, gpu->stream());
    }
    for (int64_t row = 0; row < rows; ++row, user += program.adapting, from += program.params)
      engine_functions<Real>().to_user(program, from, user);
  });
  return flat;
}

}  // namespace metafast
