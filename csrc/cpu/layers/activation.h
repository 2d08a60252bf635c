// Elementwise layers y = a(x), no parameters. With a' and a'' at x:
//   fwd   y = a(x)              bwd   dx = a' dy
//   tfwd  ty = a' tx            tbwd  tdx = a' tdy + a'' tx dy
// All overwrite; nothing is kept (saved, tsaved, scratch: 0): each function looks at x again. At kinks a' is
// torch's, and where a' is 0 or 1 by choice (ReLU) an infinite dy is dropped or passed on as torch does.
// Tested by tests/engine/test_layers.py.
#pragma once

#include "math.h"
#include "pixels.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// An activation has value(x), and one of two:
//   kPiecewiseLinear: times_slope(x, d) = a'(x) d, and a'' is zero;
//   else: derivatives(x) = a'(x), a''(x).
template <class Real>
struct Derivatives {
  Vec<Real> first, second;
};

template <class Real>
struct Relu {
  using V = Vec<Real>;
  static constexpr bool kPiecewiseLinear = true;
  explicit Relu(const Layer&) {}
  V value(V x) const { return V{} > x ? V{} : x; }
  V times_slope(V x, V d) const { return x <= V{} ? V{} : d; }
};

template <class Real>
struct LeakyRelu {
  using V = Vec<Real>;
  static constexpr bool kPiecewiseLinear = true;
  Real slope;
  explicit LeakyRelu(const Layer& l) : slope(Real(l.number)) {}
  V value(V x) const { return x > V{} ? x : slope * x; }
  V times_slope(V x, V d) const { return x > V{} ? d : slope * d; }
};

// x above 0, else alpha (e^x - 1).
template <class Real>
struct Elu {
  using V = Vec<Real>;
  static constexpr bool kPiecewiseLinear = false;
  Real alpha;
  explicit Elu(const Layer& l) : alpha(Real(l.number)) {}
  V value(V x) const { return x > V{} ? x : alpha * exponential<Real>(x).expm1; }
  Derivatives<Real> derivatives(V x) const {
    const V curved = alpha * exponential<Real>(x).exp;
    return {x > V{} ? splat(Real(1)) : curved, x >= V{} ? V{} : curved};
  }
};

template <class Real>
struct Tanh {
  using V = Vec<Real>;
  static constexpr bool kPiecewiseLinear = false;
  explicit Tanh(const Layer&) {}
  V value(V x) const { return hyperbolic_tangent<Real>(x).value; }
  Derivatives<Real> derivatives(V x) const {
    const HyperbolicTangent<Real> t = hyperbolic_tangent<Real>(x);
    return {t.slope, Real(-2) * t.value * t.slope};
  }
};

template <class Real>
struct Sigmoid {
  using V = Vec<Real>;
  static constexpr bool kPiecewiseLinear = false;
  explicit Sigmoid(const Layer&) {}
  V value(V x) const { return logistic<Real>(x).value; }
  Derivatives<Real> derivatives(V x) const {
    const Logistic<Real> s = logistic<Real>(x);
    return {s.slope, s.slope * (Real(1) - Real(2) * s.value)};
  }
};

// x Phi(x).
template <class Real>
struct Gelu {
  using V = Vec<Real>;
  static constexpr bool kPiecewiseLinear = false;
  explicit Gelu(const Layer&) {}
  V value(V x) const { return x * normal<Real>(x).below; }
  Derivatives<Real> derivatives(V x) const {
    const Normal<Real> n = normal<Real>(x);
    return {n.below + n.x * n.density, n.density * (Real(2) - n.x * n.x)};
  }
};

// x (1 + tanh u) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
template <class Real>
struct GeluTanh {
  using V = Vec<Real>;
  static constexpr bool kPiecewiseLinear = false;
  static constexpr Real kLinear = Real(2 * 0.79788456080286536),
                        kCubic = Real(2 * 0.79788456080286536 * 0.044715);
  explicit GeluTanh(const Layer&) {}
  static V limited(V x) {
    return with_sign<Real>(at_most<Real>(absolute<Real>(x), Numbers<Real>::kGeluTanhMost), x);
  }
  V value(V x) const {
    const V z = limited(x);
    return x * logistic<Real>(z * (kLinear + kCubic * z * z)).value;
  }
  Derivatives<Real> derivatives(V x) const {
    const V z = limited(x);
    const Logistic<Real> s = logistic<Real>(z * (kLinear + kCubic * z * z));
    const V inner = kLinear + Real(3) * kCubic * z * z, second_inner = Real(6) * kCubic * z;
    const V bend = (Real(1) - Real(2) * s.value) * inner * inner + second_inner;
    return {s.value + z * s.slope * inner, s.slope * (Real(2) * inner + z * bend)};
  }
};

// x sigmoid(x).
template <class Real>
struct Silu {
  using V = Vec<Real>;
  static constexpr bool kPiecewiseLinear = false;
  explicit Silu(const Layer&) {}
  V value(V x) const { return x * logistic<Real>(x).value; }
  Derivatives<Real> derivatives(V x) const {
    const Logistic<Real> s = logistic<Real>(x);
    return {s.value + x * s.slope, s.slope * (Real(2) + x * (Real(1) - Real(2) * s.value))};
  }
};

// log(1 + e^(beta x)) / beta; x itself where beta x is above the threshold.
template <class Real>
struct Softplus {
  using V = Vec<Real>;
  static constexpr bool kPiecewiseLinear = false;
  Real beta, inverse, threshold;
  explicit Softplus(const Layer& l)
      : beta(Real(l.number)), inverse(Real(1 / l.number)), threshold(Real(l.number1)) {}
  V value(V x) const {
    const V z = beta * x;
    const V curved = (z > V{} ? z : V{}) + log1p_unit<Real>(exponential<Real>(-absolute<Real>(z)).exp);
    return z > threshold ? x : inverse * curved;
  }
  Derivatives<Real> derivatives(V x) const {
    const V z = beta * x;
    const Logistic<Real> s = logistic<Real>(z);
    return {z > threshold ? splat(Real(1)) : s.value, z >= threshold ? V{} : beta * s.slope};
  }
};

// a'(x) d.
template <class Real, class A>
inline Vec<Real> times_slope(const A& a, Vec<Real> x, Vec<Real> d) {
  if constexpr (A::kPiecewiseLinear) {
    return a.times_slope(x, d);
  } else {
    return a.derivatives(x).first * d;
  }
}

template <class Real, template <class> class A>
void activation_fwd(const Call<Real>& c) {
  for_each_vector<Real>(*c.in, *c.out, c.samples,
                        [a = A<Real>(*c.layer), x = c.x, y = c.y](int64_t i, int64_t o) {
                          store(y + o, a.value(load(x + i)));
                        });
}

template <class Real, template <class> class A>
void activation_bwd(const Call<Real>& c) {
  if (c.dx == nullptr) return;
  for_each_vector<Real>(*c.in, *c.out, c.samples,
                        [a = A<Real>(*c.layer), x = c.x, dy = c.dy, dx = c.dx](int64_t i, int64_t o) {
                          store(dx + i, times_slope<Real>(a, load(x + i), load(dy + o)));
                        });
}

template <class Real, template <class> class A>
void activation_tfwd(const Call<Real>& c) {
  if (c.tx == nullptr) {
    return clear_pixels(*c.out, c.samples, c.ty);
  }
  for_each_vector<Real>(*c.in, *c.out, c.samples,
                        [a = A<Real>(*c.layer), x = c.x, tx = c.tx, ty = c.ty](int64_t i, int64_t o) {
                          store(ty + o, times_slope<Real>(a, load(x + i), load(tx + i)));
                        });
}

template <class Real, template <class> class A>
void activation_tbwd(const Call<Real>& c) {
  if (c.tdx == nullptr) return;
  if (A<Real>::kPiecewiseLinear || c.tx == nullptr) {
    for_each_vector<Real>(*c.in, *c.out, c.samples,
                          [a = A<Real>(*c.layer), x = c.x, tdy = c.tdy, tdx = c.tdx](int64_t i, int64_t o) {
                            store(tdx + i, times_slope<Real>(a, load(x + i), load(tdy + o)));
                          });
  } else if constexpr (!A<Real>::kPiecewiseLinear) {
    for_each_vector<Real>(*c.in, *c.out, c.samples,
                          [a = A<Real>(*c.layer), x = c.x, tx = c.tx, dy = c.dy, tdy = c.tdy, tdx = c.tdx](
                              int64_t i, int64_t o) {
                            const Derivatives<Real> d = a.derivatives(load(x + i));
                            store(tdx + i, d.first * load(tdy + o) + d.second * load(tx + i) * load(dy + o));
                          });
  }
}

template <class Real, template <class> class A>
constexpr LayerFunctions<Real> kActivation{Split::samples, activation_fwd<Real, A>, activation_bwd<Real, A>,
                                           activation_tfwd<Real, A>, activation_tbwd<Real, A>};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
