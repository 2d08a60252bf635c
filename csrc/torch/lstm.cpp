// lstm_update and lstm_update_backward, the front door from torch to the kernels of the coordinatewise LSTM.
//
// From the public function to the loop: metafast/ops/lstm.py (checks with the user's names, schemas, fake
// kernels, derivatives) -> here -> cpu/lstm_kernel.h or cuda/lstm.cuh.
#include "../cpu/lstm.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>

#include "../cpu/isa.h"
#include "../cuda/lstm.h"
#include "items.h"
#include "lstm_weights.h"
#include "simt.h"

#ifdef METAFAST_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace metafast {
namespace {

using at::Tensor;

constexpr cpu::IsaTables<cpu::LstmTable> kTables = METAFAST_ISA_TABLES(cpu::kLstm);

template <class Real>
const cpu::LstmFunctions<Real>& functions() {
  return cpu::functions_for<Real>(kTables.current());
}

void check(const Tensor& grads, const Tensor& state, at::TensorList weights) {
  check_real("grads", grads);
  TORCH_CHECK_VALUE(state.dim() == 4, "state: expected (L, 2, N, H), got ", state.sizes());
  const int64_t layers = state.size(0), hidden = state.size(3);
  check_lstm_weights(weights, hidden, layers, grads.scalar_type(), false, grads.device());
  TORCH_CHECK_VALUE(grads.dim() == 1 || (grads.dim() == 2 && grads.size(0) > 0),
                    "grads: expected (N,), or (K, N) of at least one step, got ", grads.sizes());
  check_tensor("state", state, {layers, 2, grads.size(-1), hidden}, grads.scalar_type(), grads.device());
}

// The arguments as memory, held as long as this.
template <class Real>
struct Held {
  HeldLstmWeights<Real> weights;
  std::vector<Tensor> tensors;
  Lstm<Real> lstm{};

  Held(const Tensor& grads, const Tensor& state, at::TensorList w, double p)
      : weights(w, state.size(3), state.size(0), p) {
    lstm.rule = &*weights;
    lstm.steps = grads.dim() == 2 ? grads.size(0) : 1;
    lstm.coordinates = grads.size(-1);
    lstm.grads = hold(grads);
    lstm.state = hold(state);
  }
  const Real* hold(const Tensor& t) {
    tensors.push_back(t.contiguous());
    return tensors.back().template const_data_ptr<Real>();
  }
};

constexpr int64_t kMostParts = 64;
constexpr int64_t kBlocksAThread = 16;  // below them a second thread costs more than it brings

// run(part, begin, end, workspace, used) for parts of the blocks, the same ones for any number of threads.
template <class Real, class Run>
int64_t for_each_part(const Lstm<Real>& a, bool backward, const at::TensorOptions& options, const Run& run) {
  const int64_t blocks = lstm_blocks<Real>(a.coordinates);
  const int64_t parts = std::min(blocks, kMostParts);
  const int64_t threads = std::clamp<int64_t>(blocks / kBlocksAThread, 1, at::get_num_threads());
  const int64_t size = functions<Real>().workspace(a, backward);
  const Tensor workspaces = at::empty({threads, size}, options);
  Real* const memory = workspaces.mutable_data_ptr<Real>();
  std::vector<char> used(size_t(threads), 0);
  for_each_item(parts, threads, [&](int64_t part, int64_t worker) {
    run(part, part * blocks / parts, (part + 1) * blocks / parts, memory + worker * size,
        std::exchange(used[size_t(worker)], 1) != 0);
  });
  return parts;
}

using Forward = std::tuple<Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor>;

// Checks, allocates, and hands the arguments to run(const Lstm<Real>&).
template <class Run>
Forward forward_by(const Tensor& grads, const Tensor& state, at::TensorList weights, double p,
                   const Run& run) {
  check(grads, state, weights);
  const Tensor updates = at::empty(grads.sizes(), grads.options()),
               next = at::empty(state.sizes(), state.options());
  if (grads.numel() == 0) return {updates, next};
  with_real(grads.scalar_type(), [&](auto real) {
    using Real = decltype(real);
    Held<Real> held(grads, state, weights, p);
    held.lstm.updates = updates.mutable_data_ptr<Real>();
    held.lstm.next = next.mutable_data_ptr<Real>();
    run(std::as_const(held.lstm));
  });
  return {updates, next};
}

// The same of the backward: run(const Lstm<Real>&, Real* d_weights), which finds zeros there, and where
// `may_leave` a null d_state if that is not wanted.
template <class Run>
Backward backward_by(const std::optional<Tensor>& d_updates, const std::optional<Tensor>& d_next,
                     const Tensor& grads, const Tensor& state, at::TensorList weights, double p,
                     bool wants_state, bool may_leave, const Run& run) {
  check(grads, state, weights);
  if (d_updates) check_tensor("d_updates", *d_updates, grads.sizes(), grads.scalar_type(), grads.device());
  if (d_next) check_tensor("d_next", *d_next, state.sizes(), grads.scalar_type(), grads.device());
  int64_t count = 0;
  for (const Tensor& w : weights) count += w.numel();
  const bool makes_state = wants_state || !may_leave;
  const Tensor nothing = at::empty({0}, state.options());
  const Tensor d_grads = at::empty(grads.sizes(), grads.options()),
               d_state = makes_state ? at::empty(state.sizes(), state.options()) : nothing;
  const Tensor d_weights = at::zeros({count}, grads.options());
  const Backward result{d_grads, wants_state ? d_state : nothing, d_weights};
  if (grads.numel() == 0) return result;
  with_real(grads.scalar_type(), [&](auto real) {
    using Real = decltype(real);
    Held<Real> held(grads, state, weights, p);
    Lstm<Real>& a = held.lstm;
    a.d_updates = d_updates ? held.hold(*d_updates) : nullptr;
    a.d_next = d_next ? held.hold(*d_next) : nullptr;
    a.d_grads = d_grads.mutable_data_ptr<Real>();
    a.d_state = makes_state ? d_state.mutable_data_ptr<Real>() : nullptr;
    run(std::as_const(a), d_weights.mutable_data_ptr<Real>());
  });
  return result;
}

// Several steps at once are the CPU's alone.
[[maybe_unused]] void check_one_step(int64_t steps) {
  TORCH_CHECK_VALUE(steps == 1, "grads: expected (N,), the gradients of one step, got those of ", steps);
}

Forward lstm_update_cpu(const Tensor& grads, const Tensor& state, at::TensorList weights, double p) {
  return forward_by(grads, state, weights, p, [&]<class Real>(const Lstm<Real>& a) {
#ifdef METAFAST_WITH_SIMT
    if (simt_forced) {
      check_one_step(a.steps);
      const Tensor workspace = at::empty({simt::lstm_workspace(a, false)}, grads.options());
      return simt::lstm_update(a, workspace.mutable_data_ptr<Real>(), nullptr);
    }
#endif
    for_each_part(a, false, grads.options(),
                  [&](int64_t, int64_t begin, int64_t end, Real* workspace, bool used) {
                    functions<Real>().forward(a, begin, end, workspace, used);
                  });
  });
}

// The cotangents of grads and state, and those of the weights one after the other.
Backward lstm_update_backward_cpu(const std::optional<Tensor>& d_updates, const std::optional<Tensor>& d_next,
                                  const Tensor& grads, const Tensor& state, at::TensorList weights, double p,
                                  bool wants_state) {
#ifdef METAFAST_WITH_SIMT
  const bool may_leave = !simt_forced;
#else
  constexpr bool may_leave = true;
#endif
  return backward_by(
      d_updates, d_next, grads, state, weights, p, wants_state, may_leave,
      [&]<class Real>(const Lstm<Real>& a, Real* d_weights) {
#ifdef METAFAST_WITH_SIMT
        if (simt_forced) {
          check_one_step(a.steps);
          const Tensor workspace = at::empty({simt::lstm_workspace(a, true)}, grads.options());
          return simt::lstm_update_backward(a, d_weights, workspace.mutable_data_ptr<Real>(), nullptr);
        }
#endif
        const int64_t count = a.rule->count();
        const Tensor of_parts = at::empty({kMostParts, count}, grads.options());
        Real* const rows = of_parts.mutable_data_ptr<Real>();
        const int64_t parts =
            for_each_part(a, true, grads.options(),
                          [&](int64_t part, int64_t begin, int64_t end, Real* workspace, bool used) {
                            functions<Real>().backward(a, begin, end, rows + part * count, workspace, used);
                          });
        for (int64_t part = 0; part < parts; ++part) {
          for (int64_t i = 0; i < count; ++i) d_weights[i] += rows[part * count + i];
        }
      });
}

#ifdef METAFAST_WITH_CUDA
Forward lstm_update_cuda(const Tensor& grads, const Tensor& state, at::TensorList weights, double p) {
  const c10::cuda::CUDAGuard guard(grads.device());
  return forward_by(grads, state, weights, p, [&]<class Real>(const Lstm<Real>& a) {
    check_one_step(a.steps);
    const Tensor workspace = at::empty({cuda::lstm_workspace(a, false)}, grads.options());
    cuda::lstm_update(a, workspace.mutable_data_ptr<Real>(), c10::cuda::getCurrentCUDAStream());
  });
}

Backward lstm_update_backward_cuda(const std::optional<Tensor>& d_updates,
                                   const std::optional<Tensor>& d_next, const Tensor& grads,
                                   const Tensor& state, at::TensorList weights, double p, bool wants_state) {
  const c10::cuda::CUDAGuard guard(grads.device());
  return backward_by(d_updates, d_next, grads, state, weights, p, wants_state, false,
                     [&]<class Real>(const Lstm<Real>& a, Real* d_weights) {
                       check_one_step(a.steps);
                       const Tensor workspace = at::empty({cuda::lstm_workspace(a, true)}, grads.options());
                       cuda::lstm_update_backward(a, d_weights, workspace.mutable_data_ptr<Real>(),
                                                  c10::cuda::getCurrentCUDAStream());
                     });
}
#endif

}  // namespace

TORCH_LIBRARY_IMPL(metafast, CPU, m) {
  m.impl("lstm_update", lstm_update_cpu);
  m.impl("lstm_update_backward", lstm_update_backward_cpu);
}

#ifdef METAFAST_WITH_CUDA
TORCH_LIBRARY_IMPL(metafast, CUDA, m) {
  m.impl("lstm_update", lstm_update_cuda);
  m.impl("lstm_update_backward", lstm_update_backward_cuda);
}
#endif

}  // namespace metafast
