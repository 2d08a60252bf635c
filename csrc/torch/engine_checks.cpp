// What the engine asks of its tensors, before any work.
#include "engine.h"
#include "lstm_weights.h"

namespace metafast {

using at::Tensor;

void Engine::check(const char* name, const Tensor& t, at::IntArrayRef sizes, at::Device device) const {
  check_tensor(name, t, sizes, dtype_, device);
}

int64_t Engine::check_x(const char* name, const Tensor& x, int64_t tasks, at::Device device) const {
  const Value& in = plan_.program().values[0];
  check_like(name, x, dtype_, device);
  TORCH_CHECK_VALUE(tasks >= 1, name, ": expected at least one task, got ", x.sizes());
  TORCH_CHECK_VALUE(x.dim() >= 2 && x.size(0) == tasks && x.size(1) >= 1 &&
                        x.numel() == tasks * x.size(1) * in.c * in.h * in.w,
                    name, ": expected (T, N, ...) with T = ", tasks, " and ", in.c * in.h * in.w,
                    " numbers a sample, got ", x.sizes());
  return x.size(1);
}

void Engine::check_side(const char* name, const Side& side, int64_t tasks, at::Device device,
                        int64_t classes) const {
  const int64_t samples = check_x(name, side.x, tasks, device);
  const Program& program = plan_.program();
  const int64_t outputs = classes > 0 ? classes : program.values[program.value_count - 1].c;
  TORCH_CHECK_VALUE(side.y.device() == device, name, ": expected targets on ", device, ", got ",
                    side.y.device());
  if (program.loss == LossKind::cross_entropy) {
    TORCH_CHECK_TYPE(side.y.scalar_type() == at::kLong, name, ": expected int64 labels, got ",
                     side.y.scalar_type());
    TORCH_CHECK_VALUE(side.y.sizes() == at::IntArrayRef({tasks, samples}), name,
                      ": expected labels of shape (", tasks, ", ", samples, "), got ", side.y.sizes());
    // Episodes are checked when they are made; to look at a GPU's again would wait for it.
    if (!device.is_cpu()) return;
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

void Engine::check_moves(const Tensor& moves, at::Device device) const {
  check_like("moves", moves, at::kLong, device);
  TORCH_CHECK_VALUE(moves.dim() == 1 && moves.numel() > 0 && moves.is_contiguous(),
                    "moves: expected (M,) indices in a row, got ", moves.sizes());
  if (!moves.is_cpu()) return;  // a LearnedRule's own, which made them
  const int64_t* const index = moves.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < moves.numel(); ++i) {
    TORCH_CHECK_VALUE(index[i] >= (i == 0 ? 0 : index[i - 1] + 1) && index[i] < plan_.program().adapting,
                      "moves: expected ascending indices below ", plan_.program().adapting, ", got ",
                      index[i]);
  }
}

void Engine::check_inner(const Inner& inner, int64_t shots, at::Device device) const {
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
    check_lstm_weights(inner.lstm, inner.lstm_hidden(), inner.lstm_layers(), dtype_, true, device);
    if (inner.moves) check_moves(*inner.moves, device);
  }
  if (!inner.rates) return;
  const Tensor& rates = *inner.rates;
  TORCH_CHECK_VALUE(rates.dim() == 2 && (rates.size(0) == 1 || rates.size(0) == inner.steps),
                    "rates: expected (1 or ", inner.steps, ", P), got ", rates.sizes());
  check("rates", rates, {rates.size(0), plan_.program().adapting}, device);
}

}  // namespace metafast
