// Memory and comparisons of the programs that test kernels.
#pragma once

#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>

#include "../../csrc/simt/orders.h"

namespace metafast {

// Memory of the exact size, so that AddressSanitizer sees the end of it.
template <class Real>
struct Array {
  explicit Array(int64_t count, Real value = std::numeric_limits<Real>::quiet_NaN())
      : size(size_t(count)), data(new Real[size]) {
    std::fill_n(data.get(), size, value);
  }
  Real* get() const { return data.get(); }
  Real& operator[](int64_t i) const { return data[size_t(i)]; }
  emulator::Buffer buffer(const char* name) const { return {name, data.get(), size * sizeof(Real)}; }

  size_t size;
  std::unique_ptr<Real[]> data;
};

inline double normal() {
  static std::mt19937 generator(0);
  static std::normal_distribution<double> distribution;
  return distribution(generator);
}

template <class Real>
Array<Real> random(int64_t count) {
  Array<Real> values(count);
  for (size_t i = 0; i < values.size; ++i) values.data[i] = Real(normal());
  return values;
}

// `got` within `roundings` roundings of numbers as large as `scale`; NaN is not.
template <class Real>
void check(Real got, long double wanted, long double scale, int64_t roundings) {
  const long double bound = 0.505L * std::numeric_limits<Real>::epsilon() * scale * (long double)(roundings);
  if (std::fabs((long double)(got)-wanted) <= bound) return;
  throw std::runtime_error("expected " + std::to_string(double(wanted)) + ", got " +
                           std::to_string(double(got)));
}

}  // namespace metafast
