// The program of tests/simt/test_kernels.py: `library NAME` runs a kernel of csrc/cuda on its own, in what no
// operator asks of it too, in every order, at odd sizes, into poisoned memory, and compares with the equation
// in long double.
#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <string>

#include "../../csrc/cuda/momentum_update.h"
#include "../../csrc/cuda/weighted_sum.h"
#include "arrays.h"

namespace metafast {
namespace {

constexpr int64_t kSizes[] = {1, 13, 255, 256, 257, 1031};

template <class Real>
void weighted_sums() {
  for (const int64_t tasks : {0, 1, 7, 32}) {
    for (const int64_t size : kSizes) {
      for (const bool weighted : {false, true}) {
        const auto x = random<Real>(tasks * size), weights = random<Real>(tasks);
        const Array<Real> out(size);
        emulator::check_orders("weighted_sum", {out.buffer("out")}, [&] {
          simt::weighted_sum<Real>({x.get(), weighted ? weights.get() : nullptr, tasks, size, out.get()},
                                   nullptr);
        });
        for (int64_t p = 0; p < size; ++p) {
          long double sum = 0, scale = 0;
          for (int64_t t = 0; t < tasks; ++t) {
            const long double term = (weighted ? weights[t] : 1.0L) * x[t * size + p];
            sum += term, scale += std::fabs(term);
          }
          check(out[p], sum, scale, tasks + 1);
        }
      }
    }
  }
}

template <class Real>
void momentum_updates() {
  const Real lr = Real(0.3), momentum = Real(0.9);
  for (const int64_t count : kSizes) {
    for (const bool first : {false, true}) {
      const auto params = random<Real>(count), grads = random<Real>(count), velocity = random<Real>(count);
      const Array<Real> updated(count), next(count);
      emulator::check_orders("momentum_update", {updated.buffer("updated"), next.buffer("velocity")}, [&] {
        simt::momentum_update<Real>({params.get(), grads.get(), first ? nullptr : velocity.get(), lr,
                                     momentum, count, updated.get(), next.get()},
                                    nullptr);
      });
      for (int64_t i = 0; i < count; ++i) {
        const long double before = first ? 0.0L : (long double)(velocity[i]);
        const long double after = momentum * before + grads[i],
                          size = std::fabs(momentum * before) + std::fabs(grads[i]);
        check(next[i], after, size, 2);
        check(updated[i], params[i] - lr * after, std::fabs(params[i]) + lr * size, 4);
      }
      // In place.
      simt::momentum_update<Real>({params.get(), grads.get(), first ? nullptr : velocity.get(), lr, momentum,
                                   count, params.get(), velocity.get()},
                                  nullptr);
      for (int64_t i = 0; i < count; ++i) {
        check(params[i], updated[i], 0, 0);
        check(velocity[i], next[i], 0, 0);
      }
    }
  }
}

}  // namespace
}  // namespace metafast

int main(int, char** names) {
  using namespace metafast;
  const std::map<std::string, std::function<void()>> kernels = {
      {"weighted_sum float32", weighted_sums<float>},
      {"weighted_sum float64", weighted_sums<double>},
      {"momentum_update float32", momentum_updates<float>},
      {"momentum_update float64", momentum_updates<double>},
  };
  try {
    kernels.at(names[1])();
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 1;
  }
  std::puts("ok");
}
