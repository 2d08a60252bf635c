// Elementwise layers y = a(x) on CUDA, no parameters; overwrite. With a' and a'' at x:
//   fwd   y = a(x)              bwd   dx = a' dy
//   tfwd  ty = a' tx            tbwd  tdx = a' tdy + a'' tx dy
// Nothing is kept (saved, tsaved, scratch: 0). Equations, kinks and what becomes of infinities are those of
// cpu/layers/activation.h; a' and a'' are written so that they do not cancel where they are small. Tested by
// tests/engine/test_layers.py on the emulator, and where there is a GPU.
#pragma once

#include "elements.cuh"

namespace metafast::METAFAST_GPU {

// x, its magnitude at most `most`; NaN stays.
template <class Real>
__device__ Real limited(Real x, Real most) {
  return x > most ? most : x < -most ? -most : x;
}

template <class Real>
struct Logistic {
  Real value, slope;  // 1 / (1 + e^-x), value (1 - value)
};

template <class Real>
__device__ Logistic<Real> logistic(Real x) {
  const Real e = std::exp(-std::fabs(x));
  const Real inverse = Real(1) / (e + Real(1)), other = e * inverse;
  return {x < Real(0) ? other : inverse, other * inverse};
}

template <class Real>
struct Derivatives {
  Real first, second;
};

// An activation has value(x), and one of two:
//   kPiecewiseLinear: times_slope(x, d) = a'(x) d, and a'' is zero;
//   else: derivatives(x) = a'(x), a''(x).
template <class Real>
struct Relu {
  static constexpr bool kPiecewiseLinear = true;
  explicit Relu(const Layer&) {}
  __device__ Real value(Real x) const { return Real(0) > x ? Real(0) : x; }
  __device__ Real times_slope(Real x, Real d) const { return x <= Real(0) ? Real(0) : d; }
};

template <class Real>
struct LeakyRelu {
  static constexpr bool kPiecewiseLinear = true;
  Real slope;
  explicit LeakyRelu(const Layer& l) : slope(Real(l.number)) {}
  __device__ Real value(Real x) const { return x > Real(0) ? x : slope * x; }
  __device__ Real times_slope(Real x, Real d) const { return x > Real(0) ? d : slope * d; }
};

// x above 0, else alpha (e^x - 1).
template <class Real>
struct Elu {
  static constexpr bool kPiecewiseLinear = false;
  Real alpha;
  explicit Elu(const Layer& l) : alpha(Real(l.number)) {}
  __device__ Real value(Real x) const { return x > Real(0) ? x : alpha * std::expm1(x); }
  __device__ Derivatives<Real> derivatives(Real x) const {
    const Real curved = alpha * std::exp(x);
    return {x > Real(0) ? Real(1) : curved, x >= Real(0) ? Real(0) : curved};
  }
};

template <class Real>
struct Tanh {
  static constexpr bool kPiecewiseLinear = false;
  explicit Tanh(const Layer&) {}
  __device__ Real value(Real x) const { return std::tanh(x); }
  __device__ Derivatives<Real> derivatives(Real x) const {
    const Real slope = Real(4) * logistic(Real(2) * x).slope;
    return {slope, Real(-2) * std::tanh(x) * slope};
  }
};

template <class Real>
struct Sigmoid {
  static constexpr bool kPiecewiseLinear = false;
  explicit Sigmoid(const Layer&) {}
  __device__ Real value(Real x) const { return logistic(x).value; }
  __device__ Derivatives<Real> derivatives(Real x) const {
    const Logistic<Real> s = logistic(x);
    return {s.slope, s.slope * (Real(1) - Real(2) * s.value)};
  }
};

// x Phi(x).
template <class Real>
struct Gelu {
  static constexpr bool kPiecewiseLinear = false;
  static constexpr Real kMost = Real(40);  // Phi(-40) and phi(40) are 0
  explicit Gelu(const Layer&) {}
  __device__ static Real below(Real x) { return Real(0.5) * std::erfc(x * Real(-0.70710678118654752)); }
  __device__ Real value(Real x) const { return x * below(x); }
  __device__ Derivatives<Real> derivatives(Real x) const {
    const Real z = limited(x, kMost);
    const Real density = Real(0.39894228040143268) * std::exp(Real(-0.5) * z * z);
    return {below(z) + z * density, density * (Real(2) - z * z)};
  }
};

// x (1 + tanh u) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
template <class Real>
struct GeluTanh {
  static constexpr bool kPiecewiseLinear = false;
  static constexpr Real kLinear = Real(2 * 0.79788456080286536),
                        kCubic = Real(2 * 0.79788456080286536 * 0.044715);
  static constexpr Real kMost = Real(23);  // as far as its tanh is not 1
  explicit GeluTanh(const Layer&) {}
  __device__ Real value(Real x) const {
    const Real z = limited(x, kMost);
    return x * logistic(z * (kLinear + kCubic * z * z)).value;
  }
  __device__ Derivatives<Real> derivatives(Real x) const {
    const Real z = limited(x, kMost);
    const Logistic<Real> s = logistic(z * (kLinear + kCubic * z * z));
    const Real inner = kLinear + Real(3) * kCubic * z * z, second_inner = Real(6) * kCubic * z;
    const Real bend = (Real(1) - Real(2) * s.value) * inner * inner + second_inner;
    return {s.value + z * s.slope * inner, s.slope * (Real(2) * inner + z * bend)};
  }
};

// x sigmoid(x).
template <class Real>
struct Silu {
  static constexpr bool kPiecewiseLinear = false;
  explicit Silu(const Layer&) {}
  __device__ Real value(Real x) const { return x * logistic(x).value; }
  __device__ Derivatives<Real> derivatives(Real x) const {
    const Logistic<Real> s = logistic(x);
    return {s.value + x * s.slope, s.slope * (Real(2) + x * (Real(1) - Real(2) * s.value))};
  }
};

// log(1 + e^(beta x)) / beta; x itself where beta x is above the threshold.
template <class Real>
struct Softplus {
  static constexpr bool kPiecewiseLinear = false;
  Real beta, inverse, threshold;
  explicit Softplus(const Layer& l)
      : beta(Real(l.number)), inverse(Real(1 / l.number)), threshold(Real(l.number1)) {}
  __device__ Real value(Real x) const {
    const Real z = beta * x;
    const Real curved = (z > Real(0) ? z : Real(0)) + std::log1p(std::exp(-std::fabs(z)));
    return z > threshold ? x : inverse * curved;
  }
  __device__ Derivatives<Real> derivatives(Real x) const {
    const Real z = beta * x;
    const Logistic<Real> s = logistic(z);
    return {z > threshold ? Real(1) : s.value, z >= threshold ? Real(0) : beta * s.slope};
  }
};

// y = a(x).
template <class Real, class A>
__global__ void __launch_bounds__(kElementThreads, 1)
    activation_value_kernel(const Elements e, const A a, const Batch<const Real> x, const Batch<Real> y) {
  e.each([=](int64_t t, int64_t from, int64_t to) { y.of(t)[to] = a.value(x.of(t)[from]); });
}

// out = a'(x) d. Back: d lies as y does and out as x, else the other way round.
template <class Real, class A, bool kBack>
__global__ void __launch_bounds__(kElementThreads, 1)
    activation_slope_kernel(const Elements e, const A a, const Batch<const Real> x, const Batch<const Real> d,
                            const Batch<Real> out) {
  e.each([=](int64_t t, int64_t from, int64_t to) {
    const Real at = x.of(t)[from], along = d.of(t)[kBack ? to : from];
    Real& product = out.of(t)[kBack ? from : to];
    if constexpr (A::kPiecewiseLinear) {
      product = a.times_slope(at, along);
    } else {
      product = a.derivatives(at).first * along;
    }
  });
}

// tdx = a'(x) tdy + a''(x) tx dy.
template <class Real, class A>
__global__ void __launch_bounds__(kElementThreads, 1)
    activation_bend_kernel(const Elements e, const A a, const Batch<const Real> x, const Batch<const Real> tx,
                           const Batch<const Real> dy, const Batch<const Real> tdy, const Batch<Real> tdx) {
  e.each([=](int64_t t, int64_t from, int64_t to) {
    const Derivatives<Real> d = a.derivatives(x.of(t)[from]);
    tdx.of(t)[from] = d.first * tdy.of(t)[to] + d.second * tx.of(t)[from] * dy.of(t)[to];
  });
}

}  // namespace metafast::METAFAST_GPU
