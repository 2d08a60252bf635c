// Exponentials and what is made of them, on vectors: e^x, e^x - 1, log(1 + u), the logistic function, tanh,
// and the normal distribution (for GELU, in erf's place). The standard library's would be called a lane at a
// time.
//
// Errors in units in the last place, float and double: e^x, e^x - 1 and log 1.3, logistic 2.2, tanh 2.5,
// phi 2, slopes 5, Phi 5.5 (in its tail). NaN stays NaN, infinities and large |x| give the limits, results
// below the normal range are rounded as they should.
//
//   e^x      x = k log 2 + r, |r| <= log(2) / 2;  e^r = 1 + r + r^2 q(r);  times 2^k in two halves, so that
//            neither overflows and small results are rounded once
//   log      log(1 + f) = f - h + s (h + z p(z)), h = f^2 / 2, s = f / (2 + f), z = s^2 <= 0.0295
//   normal   Phi(-a) = e^(-a^2 / 2) (5 / 2 + 2 s p(2 s - 1)) / (a + 5), s = a / (a + 5)
//
// q and p interpolate the exact functions at Chebyshev nodes; their errors are below 6e-17 (double), 2e-8
// (float). Tested by tests/engine/test_layers.py, through the activations.
#pragma once

#include "simd.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

template <class Real>
struct Numbers;

template <>
struct Numbers<float> {
  typedef uint32_t Bits __attribute__((vector_size(kRegisterBytes)));
  static constexpr int kMantissa = 23;
  static constexpr uint32_t kBias = 127, kSign = 0x80000000u, kUpperHalf = 0xfffff000u;
  static constexpr float kRound = 0x1.8p23f;  // added and taken away, rounds to a whole number
  static constexpr float kLog2e = 1.44269504f, kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;
  static constexpr float kExpLeast = -104.5f, kExpMost = 89.0f;  // beyond: 0 and infinity
  static constexpr float kExpNormal = 87.0f;                     // e^x and e^-x are normal numbers
  static constexpr float kLeastNormal = 0x1p-126f, kMost = 0x1.fffffep127f;
  static constexpr float kNormalMost = 15.0f;    // Phi(-15) is 0
  static constexpr float kGeluTanhMost = 12.0f;  // as far as its tanh is not 1
  static constexpr float kExp[] = {0.5f, 0.16666577f, 0.0416665547f, 0.00836317307f, 0.00139261761f};
  static constexpr float kLog[] = {0.666666852f, 0.399887348f, 0.295820236f};
  static constexpr float kNormal[] = {-1.73080694f,    1.06542443f,    -0.570119387f,   0.25658599f,
                                      -0.0915560921f,  0.0224507433f,  -0.00170120248f, -0.0013976816f,
                                      0.000615685491f, 0.000147080422f};
};

template <>
struct Numbers<double> {
  typedef uint64_t Bits __attribute__((vector_size(kRegisterBytes)));
  static constexpr int kMantissa = 52;
  static constexpr uint64_t kBias = 1023, kSign = 0x8000000000000000u, kUpperHalf = 0xfffffffff8000000u;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLog2e = 1.4426950408889634, kLog2High = 0x1.62e42feep-1,
                          kLog2Low = 1.9082149292705878e-10;
  static constexpr double kExpLeast = -746.0, kExpMost = 710.0;
  static constexpr double kExpNormal = 708.0;
  static constexpr double kLeastNormal = 0x1p-1022, kMost = 0x1.fffffffffffffp1023;
  static constexpr double kNormalMost = 40.0;
  static constexpr double kGeluTanhMost = 23.0;
  static constexpr double kExp[] = {0.5,
                                    0.16666666666666671,
                                    0.04166666666666667,
                                    0.0083333333333261121,
                                    0.0013888888888883732,
                                    0.00019841269874901259,
                                    2.4801587325605323e-5,
                                    2.7557255297969644e-6,
                                    2.755727357010214e-7,
                                    2.5105259538448493e-8,
                                    2.0914717341716376e-9};
  static constexpr double kLog[] = {0.66666666666666697, 0.39999999999898273, 0.28571428626533616,
                                    0.22222211043776858, 0.18182895750119194, 0.15331501611145328,
                                    0.14619166134887971};
  static constexpr double kNormal[] = {-1.730806950249937,     1.0654244473598804,     -0.57011883138990363,
                                       0.25658567471859681,    -0.091565308548206213,  0.022446669841961028,
                                       -0.0016516030425469089, -0.0013417737290454674, 0.00054390433813381456,
                                       9.9473829617281263e-7,  -6.0370522856157396e-5, 1.0607629378345644e-5,
                                       6.0738159445717591e-6,  -2.0925790280367859e-6, -6.7722577845554833e-7,
                                       3.3973991216171193e-7,  9.4063647685518414e-8,  -5.0439212845077016e-8,
                                       -1.5794600302545059e-8, 5.3393637448026661e-9,  2.1582964870253416e-9};
};

// sum_k c[k] x^k.
template <class Real, int kCount>
inline Vec<Real> polynomial(const Real (&c)[kCount], Vec<Real> x) {
  Vec<Real> sum = splat(c[kCount - 1]);
#pragma GCC unroll 32
  for (int k = kCount - 2; k >= 0; --k) sum = sum * x + c[k];
  return sum;
}

// The bits of x where those of `mask` are set.
template <class Real, class Mask>
inline Vec<Real> masked(Vec<Real> x, Mask mask) {
  return reinterpret_cast<Vec<Real>>(reinterpret_cast<typename Numbers<Real>::Bits>(x) & mask);
}
template <class Real>
inline Vec<Real> absolute(Vec<Real> x) {
  return masked<Real>(x, ~Numbers<Real>::kSign);
}
// x, whose own sign is none, with that of `sign`.
template <class Real>
inline Vec<Real> give_sign(Vec<Real> x, Vec<Real> sign) {
  using Bits = typename Numbers<Real>::Bits;
  const Bits bits = reinterpret_cast<Bits>(x) | (reinterpret_cast<Bits>(sign) & Numbers<Real>::kSign);
  return reinterpret_cast<Vec<Real>>(bits);
}
// |x| with the sign of `sign`.
template <class Real>
inline Vec<Real> with_sign(Vec<Real> x, Vec<Real> sign) {
  return give_sign<Real>(absolute<Real>(x), sign);
}
// x, at most `most` and at least `least`; NaN stays.
template <class Real>
inline Vec<Real> at_most(Vec<Real> x, Real most) {
  return lesser(splat(most), x);
}
template <class Real>
inline Vec<Real> at_least(Vec<Real> x, Real least) {
  return greater(splat(least), x);
}

template <class Real>
struct Exponential {
  Vec<Real> exp, expm1;  // e^x; e^x - 1, for x <= 0 only
};

// Of x + tail, where tail is what x has lost in rounding.
template <class Real>
inline Exponential<Real> exponential(Vec<Real> x, Vec<Real> tail = Vec<Real>{}) {
  using V = Vec<Real>;
  using N = Numbers<Real>;
  using Bits = typename N::Bits;
  x = at_least<Real>(at_most<Real>(x, N::kExpMost), N::kExpLeast);
  const V rounded = x * N::kLog2e + N::kRound;
  const V k = rounded - N::kRound;
  const V r = x - k * N::kLog2High - k * N::kLog2Low + tail;
  const V p = r + r * r * polynomial<Real>(N::kExp, r);
  // In the last bits of `rounded` stands k; biased, so that all of this is unsigned.
  const Bits biased =
      reinterpret_cast<Bits>(rounded) - reinterpret_cast<Bits>(splat(N::kRound)) + 2 * N::kBias;
  const Bits half = biased >> 1;
  const V scale = reinterpret_cast<V>(half << N::kMantissa);
  const V scale1 = reinterpret_cast<V>((biased - half) << N::kMantissa);
  return {(p + Real(1)) * scale * scale1, p * scale * scale1 + (scale * scale1 - Real(1))};
}

// log(2^e (1 + u)) for u in [0, 1] and whole e.
template <class Real>
inline Vec<Real> log_by_parts(Vec<Real> e, Vec<Real> u) {
  using V = Vec<Real>;
  using N = Numbers<Real>;
  const auto large = u > Real(0.41421356237309503);  // then 1 + u = 2 (1 + f)
  const V f = large ? (u - Real(1)) * Real(0.5) : u, k = large ? e + Real(1) : e;
  const V s = f / (f + Real(2)), z = s * s, h = f * f * Real(0.5);
  return k * N::kLog2High - ((h - (s * (h + z * polynomial<Real>(N::kLog, z)) + k * N::kLog2Low)) - f);
}
template <class Real>
inline Vec<Real> log1p_unit(Vec<Real> u) {
  return log_by_parts<Real>(Vec<Real>{}, u);
}
// log x for x from 0 up.
template <class Real>
inline Vec<Real> natural_log(Vec<Real> x) {
  using V = Vec<Real>;
  using N = Numbers<Real>;
  using Bits = typename N::Bits;
  constexpr int kM = N::kMantissa;
  const auto tiny = x < N::kLeastNormal;
  const Bits bits = reinterpret_cast<Bits>(tiny ? x * Real(int64_t(1) << kM) : x);
  const V power = __builtin_convertvector(reinterpret_cast<typename Simd<Real>::Mask>(bits >> kM), V);
  const V e = power - (tiny ? splat(Real(N::kBias + kM)) : splat(Real(N::kBias)));
  const Bits one = (bits & ~(~Bits{} << kM)) | (N::kBias << kM);
  const V log = log_by_parts<Real>(e, reinterpret_cast<V>(one) - Real(1));
  const V limit = x > V{} ? x : x - Real(__builtin_inf());  // of infinity and NaN, and of 0
  return x > V{} && x <= N::kMost ? log : limit;
}

template <class Real>
struct Logistic {
  Vec<Real> value, slope;  // 1 / (1 + e^-x), and value (1 - value) without its cancellation
};

template <class Real>
inline Logistic<Real> logistic(Vec<Real> x) {
  const Vec<Real> e = exponential<Real>(-absolute<Real>(x)).exp;
  const Vec<Real> inverse = Real(1) / (e + Real(1)), other = e * inverse;
  return {x < Real(0) ? other : inverse, other * inverse};
}

// e^x where the result is no smaller than numbers are precise, for |x| <= kExpNormal; p = e^r - 1 and 2^k.
template <class Real>
struct ExponentialParts {
  Vec<Real> p, scale;
};
template <class Real>
inline ExponentialParts<Real> exponential_parts(Vec<Real> x) {
  using V = Vec<Real>;
  using N = Numbers<Real>;
  using Bits = typename N::Bits;
  constexpr Real kRound = N::kRound + Real(N::kBias);
  const V rounded = x * N::kLog2e + kRound;
  const V k = rounded - kRound;
  const V r = x - k * N::kLog2High - k * N::kLog2Low;
  // In the last bits of `rounded` stands the exponent of 2^k; what else it has is shifted out.
  const Bits scale = reinterpret_cast<Bits>(rounded) << N::kMantissa;
  return {r + r * r * polynomial<Real>(N::kExp, r), reinterpret_cast<V>(scale)};
}

// logistic(x).value and hyperbolic_tangent(x).value in fewer operations, for gates, where the values of large
// |x| may be those of kExpNormal.
template <class Real>
inline Vec<Real> logistic_value(Vec<Real> x) {
  using N = Numbers<Real>;
  x = at_least<Real>(at_most<Real>(x, N::kExpNormal), -N::kExpNormal);
  const ExponentialParts<Real> e = exponential_parts<Real>(-x);
  return Real(1) / (Real(1) + (e.p * e.scale + e.scale));
}
template <class Real>
inline Vec<Real> tanh_value(Vec<Real> x) {
  using N = Numbers<Real>;
  const Vec<Real> z = at_most<Real>(absolute<Real>(x), N::kExpNormal / 2) * Real(-2);
  const ExponentialParts<Real> e = exponential_parts<Real>(z);
  const Vec<Real> less = (Real(1) - e.scale) - e.p * e.scale;  // 1 - e^z
  return give_sign<Real>(less / (Real(2) - less), x);
}

template <class Real>
struct HyperbolicTangent {
  Vec<Real> value, slope;  // tanh x, 1 - tanh^2 x without its cancellation
};

template <class Real>
inline HyperbolicTangent<Real> hyperbolic_tangent(Vec<Real> x) {
  const Exponential<Real> e = exponential<Real>(absolute<Real>(x) * Real(-2));
  const Vec<Real> sum = e.expm1 + Real(2), inverse = Real(1) / sum;
  return {with_sign<Real>(e.expm1 / sum, x), Real(4) * e.exp * inverse * inverse};
}

template <class Real>
struct Normal {
  Vec<Real> below, density;  // Phi(x) = (1 + erf(x / sqrt 2)) / 2, phi(x)
  Vec<Real> x;               // limited to where phi(x) is not 0
};

template <class Real>
inline Normal<Real> normal(Vec<Real> x) {
  using V = Vec<Real>;
  using N = Numbers<Real>;
  const V a = at_most<Real>(absolute<Real>(x), N::kNormalMost);
  // a^2 is upper^2 + (a - upper) (a + upper), of which the first has no rounding.
  const V upper = masked<Real>(a, N::kUpperHalf);
  const V e = exponential<Real>(upper * upper * Real(-0.5), (a - upper) * (a + upper) * Real(-0.5)).exp;
  const V inverse = Real(1) / (a + Real(5)), s = a * inverse;
  const V above =
      e * (inverse * (Real(2.5) + Real(2) * s * polynomial<Real>(N::kNormal, Real(2) * s - Real(1))));
  return {x < Real(0) ? above : Real(1) - above, e * Real(0.39894228040143268), with_sign<Real>(a, x)};
}

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
