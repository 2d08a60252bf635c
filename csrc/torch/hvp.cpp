// hvp, the Hessian-vector product of a lowered network's loss as an operator: the network comes as the
// numbers that describe it, and is built once.
//
// From the public function to the loop: metafast/ops/hvp.py (checks, schema, fake kernel, derivative) -> here
// -> engine.cpp -> cpu/unroll.h or cuda/engine.cu.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <list>
#include <mutex>

#include "engine.h"

namespace metafast {
namespace {

using at::Tensor;

struct Built {
  std::vector<int64_t> ints;
  std::vector<double> numbers;
  at::ScalarType dtype;
  std::shared_ptr<Engine> engine;
};

std::shared_ptr<Engine> engine_for(at::IntArrayRef ints, at::ArrayRef<double> numbers, at::ScalarType dtype) {
  constexpr size_t kMost = 16;
  static std::mutex mutex;
  static std::list<Built> built;  // the latest first
  const std::lock_guard<std::mutex> lock(mutex);
  for (auto one = built.begin(); one != built.end(); ++one) {
    if (one->dtype != dtype || ints != at::IntArrayRef(one->ints) ||
        numbers != at::ArrayRef<double>(one->numbers))
      continue;
    built.splice(built.begin(), built, one);
    return built.front().engine;
  }
  built.push_front(
      {ints.vec(), numbers.vec(), dtype, std::make_shared<Engine>(ints.vec(), numbers.vec(), dtype)});
  if (built.size() > kMost) built.pop_back();
  return built.front().engine;
}

// (T, P) products at params (T, P) along vector (T, P), of the loss on x (T, N, ...) and y (T, N, ...).
Tensor hvp(const Tensor& params, const Tensor& vector, const Tensor& constants, const Tensor& x,
           const Tensor& y, at::IntArrayRef ints, at::ArrayRef<double> numbers) {
  return engine_for(ints, numbers, params.scalar_type())->hvp(params, constants, {x, y}, vector);
}

}  // namespace

TORCH_LIBRARY_IMPL(metafast, CPU, m) { m.impl("hvp", hvp); }

#ifdef METAFAST_WITH_CUDA
TORCH_LIBRARY_IMPL(metafast, CUDA, m) { m.impl("hvp", hvp); }
#endif

}  // namespace metafast
