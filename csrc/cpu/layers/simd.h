// Vectors of the instruction set that this file is compiled for, by the compiler's vector extension:
// arithmetic on them is written as on numbers. kLanes of Real; a value's pixel is a whole number of them for
// every set.
#pragma once

#ifndef METAFAST_ISA
#error "define METAFAST_ISA, the instruction set's namespace, before including a kernel"
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>

namespace metafast::cpu {
namespace METAFAST_ISA {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
constexpr int kAccumulators = 24;  // of 32 registers, the rest for operands
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
constexpr int kAccumulators = 12;  // of 16
#else
constexpr int kRegisterBytes = 16;
constexpr int kAccumulators = 12;
#endif

// The smallest vectors that products are made of: half ones with AVX-512, where 40 channels are 2 1/2
// vectors, not 3.
constexpr int kGrainBytes = kRegisterBytes == 64 ? 32 : kRegisterBytes;

// Vectors alias their elements and nothing else (GCC; Clang has them alias all), as a row of these would.
template <class Real>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(kRegisterBytes)));
  typedef float Unaligned __attribute__((vector_size(kRegisterBytes), aligned(4)));
  typedef int32_t Mask __attribute__((vector_size(kRegisterBytes)));
  typedef float Grain __attribute__((vector_size(kGrainBytes)));
  typedef float UnalignedGrain __attribute__((vector_size(kGrainBytes), aligned(4)));
};
template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(kRegisterBytes)));
  typedef double Unaligned __attribute__((vector_size(kRegisterBytes), aligned(8)));
  typedef int64_t Mask __attribute__((vector_size(kRegisterBytes)));
  typedef double Grain __attribute__((vector_size(kGrainBytes)));
  typedef double UnalignedGrain __attribute__((vector_size(kGrainBytes), aligned(8)));
};

template <class Real>
using Vec = typename Simd<Real>::Vec;
template <class Real>
constexpr int kLanes = kRegisterBytes / int(sizeof(Real));

template <class Real>
constexpr int kGrain = kGrainBytes / int(sizeof(Real));

// Lanes that `channels` channels take, in whole grains of this instruction set: a pixel may have more.
template <class Real>
constexpr int64_t lanes_of(int64_t channels) {
  return (channels + kGrain<Real> - 1) / kGrain<Real> * kGrain<Real>;
}

template <class Real>
inline Vec<Real> load(const Real* p) {
  return *reinterpret_cast<const typename Simd<Real>::Unaligned*>(p);
}
template <class Real>
inline void store(Real* p, Vec<Real> v) {
  *reinterpret_cast<typename Simd<Real>::Unaligned*>(p) = v;
}
template <class Real>
inline Vec<Real> splat(Real x) {
  return x - Vec<Real>{};
}
#if defined(__AVX512F__)
// Halves of vectors.
template <class Real>
using Half = typename Simd<Real>::Grain;
template <class Real>
inline Half<Real> load_half(const Real* p) {
  return *reinterpret_cast<const typename Simd<Real>::UnalignedGrain*>(p);
}
template <class Real>
inline void store_half(Real* p, Half<Real> v) {
  *reinterpret_cast<typename Simd<Real>::UnalignedGrain*>(p) = v;
}
inline Half<float> low_half(Vec<float> v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7); }
inline Half<double> low_half(Vec<double> v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3); }
inline Half<float> high_half(Vec<float> v) {
  return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
}
inline Half<double> high_half(Vec<double> v) { return __builtin_shufflevector(v, v, 4, 5, 6, 7); }
template <class Real>
inline Vec<Real> join_halves(Half<Real> low, Half<Real> high) {
  if constexpr (sizeof(Real) == 4) {
    return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  } else {
    return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
  }
}
// The high half of one, the low half of another; and a half twice. By instructions that need no shuffle where
// the compiler would put two.
inline Vec<float> high_from(Vec<float> high, Vec<float> low) { return _mm512_mask_mov_ps(low, 0xff00, high); }
inline Vec<double> high_from(Vec<double> high, Vec<double> low) {
  return _mm512_mask_mov_pd(low, 0xf0, high);
}
inline Vec<float> twice(const float* p) { return _mm512_maskz_broadcast_f32x8(0xffff, _mm256_loadu_ps(p)); }
inline Vec<double> twice(const double* p) { return _mm512_maskz_broadcast_f64x4(0xff, _mm256_loadu_pd(p)); }
#endif
// a < b ? a : b and a > b ? a : b, which is b where one of them is NaN: an instruction of x86, though
// compilers make two of them.
#if defined(__AVX512F__)
inline Vec<float> lesser(Vec<float> a, Vec<float> b) { return _mm512_maskz_min_ps(0xffff, a, b); }
inline Vec<double> lesser(Vec<double> a, Vec<double> b) { return _mm512_maskz_min_pd(0xff, a, b); }
inline Vec<float> greater(Vec<float> a, Vec<float> b) { return _mm512_maskz_max_ps(0xffff, a, b); }
inline Vec<double> greater(Vec<double> a, Vec<double> b) { return _mm512_maskz_max_pd(0xff, a, b); }
#elif defined(__AVX2__)
inline Vec<float> lesser(Vec<float> a, Vec<float> b) { return _mm256_min_ps(a, b); }
inline Vec<double> lesser(Vec<double> a, Vec<double> b) { return _mm256_min_pd(a, b); }
inline Vec<float> greater(Vec<float> a, Vec<float> b) { return _mm256_max_ps(a, b); }
inline Vec<double> greater(Vec<double> a, Vec<double> b) { return _mm256_max_pd(a, b); }
#elif defined(__x86_64__)
inline Vec<float> lesser(Vec<float> a, Vec<float> b) { return _mm_min_ps(a, b); }
inline Vec<double> lesser(Vec<double> a, Vec<double> b) { return _mm_min_pd(a, b); }
inline Vec<float> greater(Vec<float> a, Vec<float> b) { return _mm_max_ps(a, b); }
inline Vec<double> greater(Vec<double> a, Vec<double> b) { return _mm_max_pd(a, b); }
#else
template <class V>
inline V lesser(V a, V b) {
  return a < b ? a : b;
}
template <class V>
inline V greater(V a, V b) {
  return a > b ? a : b;
}
#endif
// a where the condition (a comparison of vectors) holds, else b.
template <class V, class M>
inline V select(M condition, V a, V b) {
  return condition ? a : b;
}

template <class Real>
inline Real magnitude(Real x) {
  return x < 0 ? -x : x;
}

// The sum of all lanes, by halves.
template <class Real, int kHalf = kLanes<Real> / 2>
inline Real sum_of_lanes(Vec<Real> v) {
  if constexpr (kHalf == 0) {
    return v[0];
  } else {
    typename Simd<Real>::Mask other;
    for (int i = 0; i < kLanes<Real>; ++i) other[i] = i ^ kHalf;
    return sum_of_lanes<Real, kHalf / 2>(v + __builtin_shuffle(v, other));
  }
}

// Where sums go: base + factor * sum, or with base null the sum itself. `base` may be where they go.
template <class Real>
struct Onto {
  const Real* base = nullptr;
  Real factor = 1;

  Onto from(int64_t offset) const { return {base == nullptr ? nullptr : base + offset, factor}; }
  Vec<Real> at(int64_t i, Vec<Real> sum) const {
    return base == nullptr ? sum : load(base + i) + factor * sum;
  }
};

// to[:] = the sum of so many rows of `lanes`, `stride` apart: kAtOnce vectors at a time, as each is a chain
// of additions, then what is left.
template <class Real, int kAtOnce = 4>
inline void sum_rows(const Real* rows, int64_t count, int64_t stride, int64_t lanes, const Onto<Real>& onto,
                     Real* to) {
  constexpr int kL = kLanes<Real>;
  int64_t lane = 0;
  for (; lane + kAtOnce * kL <= lanes; lane += kAtOnce * kL) {
    Vec<Real> sum[kAtOnce];
    for (int v = 0; v < kAtOnce; ++v) sum[v] = Vec<Real>{};
    const Real* row = rows + lane;
    for (int64_t n = count; n > 0; --n, row += stride) {
      for (int v = 0; v < kAtOnce; ++v) sum[v] += load(row + v * kL);
    }
    for (int v = 0; v < kAtOnce; ++v) store(to + lane + v * kL, onto.at(lane + v * kL, sum[v]));
  }
  if constexpr (kAtOnce > 1) {
    if (lane < lanes)
      sum_rows<Real, kAtOnce / 2>(rows + lane, count, stride, lanes - lane, onto.from(lane), to + lane);
  }
}

// Calls visit(offset) for the first lane of every pixel of N samples, row by row; `count` pixels lie `pixel`
// apart.
template <class Visit>
inline void for_each_row(int64_t samples, int64_t h, int64_t origin, int64_t sample, int64_t row,
                         const Visit& visit) {
  for (int64_t n = 0; n < samples; ++n) {
    for (int64_t i = 0; i < h; ++i) visit(origin + n * sample + i * row);
  }
}

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
