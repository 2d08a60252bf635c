// Scores of few classes, which as lanes would leave half of a vector idle: lanes are features here, and the
// lanes of many sums are added up together. Neither the means nor the scores are transposed for that. Where a
// vector is no longer than what scores are padded to anyway (simd.h, kGrain) there is nothing to gain.
#pragma once

#include <algorithm>

#include "layers/simd.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

template <class Real>
constexpr bool few_classes(int64_t ways) {
  return kGrain<Real> < kLanes<Real> && ways <= kGrain<Real>;
}

// to[c, m] = sum_d (q[m, d] - p[c, d])^2, or sum_d q[m, d] p[c, d]
template <class Real>
struct ScoreAcross {
  const Real* q;  // rows of `whole` features, whole vectors
  int64_t q_row, rows;
  const Real* tail;  // the features after them, a vector for each row; null: none
  const Real* p;     // rows of whole vectors
  int64_t p_row, ways, whole;
  Real* to;  // (ways, to_row), whole vectors of queries; beyond `rows` the last one's, or zeros
  int64_t to_row;
};

#if defined(__AVX512F__)
// Lane i is the sum of the lanes of v[i]: by pairs of vectors within quarters of them, then by quarters.
inline Vec<float> low_pairs(Vec<float> a, Vec<float> b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
}
inline Vec<float> high_pairs(Vec<float> a, Vec<float> b) {
  return __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
}
inline Vec<double> low_pairs(Vec<double> a, Vec<double> b) {
  return __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14);
}
inline Vec<double> high_pairs(Vec<double> a, Vec<double> b) {
  return __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
}
inline Vec<double> sum_of_quarters(Vec<double> a, Vec<double> b) {
  return __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13) +
         __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15);
}
inline Vec<float> sum_of_quarters(Vec<float> a, Vec<float> b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
template <class V>
inline V sum_of_pairs(V a, V b) {
  return low_pairs(a, b) + high_pairs(a, b);
}
inline Vec<float> sums_of_lanes(const Vec<float> (&v)[16]) {
  Vec<float> four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vec<float>* const u = v + 4 * i;
    // Two sums side by side stay so.
    const auto a = reinterpret_cast<Vec<double>>(sum_of_pairs(u[0], u[1])),
               b = reinterpret_cast<Vec<double>>(sum_of_pairs(u[2], u[3]));
    four[i] = reinterpret_cast<Vec<float>>(low_pairs(a, b)) + reinterpret_cast<Vec<float>>(high_pairs(a, b));
  }
  return sum_of_quarters(sum_of_quarters(four[0], four[1]), sum_of_quarters(four[2], four[3]));
}
inline Vec<double> sums_of_lanes(const Vec<double> (&v)[8]) {
  return sum_of_quarters(sum_of_quarters(sum_of_pairs(v[0], v[1]), sum_of_pairs(v[2], v[3])),
                         sum_of_quarters(sum_of_pairs(v[4], v[5]), sum_of_pairs(v[6], v[7])));
}

// Half a vector of queries from `row` on, with classes c and, of two, c + 1.
template <bool kDifference, int kClasses, class Real>
inline void score_tile_across(const ScoreAcross<Real>& s, int64_t row, int64_t c) {
  constexpr int kRows = kGrain<Real>;
  Vec<Real> sums[kLanes<Real>] = {};
  const Real *q[kRows], *tail[kRows] = {};
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
    const int64_t there = std::min(row + m, s.rows - 1);
    q[m] = s.q + there * s.q_row;
    if (s.tail != nullptr) tail[m] = s.tail + there * kLanes<Real>;
  }
  const Real* const p = s.p + c * s.p_row;
  const auto add = [&](const Real* const* rows, int64_t at, int64_t d) {
#pragma GCC unroll 2
    for (int k = 0; k < kClasses; ++k) {
      const Vec<Real> mean = load(p + k * s.p_row + d);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const Vec<Real> x = load(rows[m] + at), difference = x - mean;
        sums[k * kRows + m] += kDifference ? difference * difference : x * mean;
      }
    }
  };
  for (int64_t d = 0; d < s.whole; d += kLanes<Real>) add(q, d, d);
  if (s.tail != nullptr) add(tail, 0, s.whole);
  const Vec<Real> both = sums_of_lanes(sums);
  store_half(s.to + c * s.to_row + row, low_half(both));
  if constexpr (kClasses == 2) store_half(s.to + (c + 1) * s.to_row + row, high_half(both));
}

template <bool kDifference, class Real>
void score_across(const ScoreAcross<Real>& s) {
  for (int64_t row = 0; row < s.to_row; row += kGrain<Real>) {
    int64_t c = 0;
    if (row >= s.rows) {
      for (; c < s.ways; ++c) store_half(s.to + c * s.to_row + row, Half<Real>{});
      continue;
    }
    for (; c + 2 <= s.ways; c += 2) score_tile_across<kDifference, 2>(s, row, c);
    if (c < s.ways) score_tile_across<kDifference, 1>(s, row, c);
  }
}
#else
// Nobody has few classes.
template <bool kDifference, class Real>
void score_across(const ScoreAcross<Real>&) {}
#endif

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
