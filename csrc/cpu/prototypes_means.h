// The class means of a task: from its support, in the forms that the head's products want, and back, from the
// means' cotangents to the support's. Part of prototypes_kernel.h.
#pragma once

#include <algorithm>

#include "../engine/carver.h"
#include "layers/simd.h"
#include "prototypes.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

template <class Real>
class ClassMeans {
 public:
  using V = Vec<Real>;
  static constexpr Real kLeastNorm = Real(1e-12);
  static constexpr Real kNear = 3;  // |p - m|^2 of classes that are near each other

  ClassMeans(const PrototypeHead<Real>& head, bool at_once, Carver<Real>& workspace)
      : row(Carver<Real>::whole(head.features)), h_(head) {
    const bool centred = at_once && h_.metric == Metric::sqeuclidean;
    rows = workspace.take(h_.ways * row);
    unit = h_.metric == Metric::cosine || centred ? workspace.take(h_.ways * row) : rows;
    d_rows = workspace.take(size());
    inverse = workspace.take(h_.ways);
    squares = workspace.take(centred ? h_.ways : 0);
    counts_ = workspace.take(h_.ways);
    centre_ = workspace.take(centred ? row : 0);
  }

  // Of all rows, (C, D) in whole vectors.
  int64_t size() const { return h_.ways * row; }

  void begin(int64_t task) {
    task_ = task;
    support_ = h_.support + task * h_.supports * h_.features;
    labels_ = h_.support_labels + task * h_.supports;
    mask_ = h_.support_mask == nullptr ? nullptr : h_.support_mask + task * h_.supports;
    class_mask_ = h_.class_mask == nullptr ? nullptr : h_.class_mask + task * h_.ways;
  }
  bool has_class(int64_t c) const { return class_mask_ == nullptr || class_mask_[c]; }

  void average() {
    count();
    std::fill_n(rows, h_.ways * row, Real(0));
    const int64_t features = h_.features;
    for (int64_t n = 0; n < h_.supports; ++n) {
      if (!has_sample(n)) continue;
      const Real* const from = support_ + n * features;
      Real* const to = rows + labels_[n] * row;
      int64_t d = 0;
      for (; d + kLanes<Real> <= features; d += kLanes<Real>) store(to + d, load(to + d) + load(from + d));
      for (; d < features; ++d) to[d] += from[d];
    }
    for (int64_t c = 0; c < h_.ways; ++c) {
      if (counts_[c] <= 1) continue;
      Real* const mean = rows + c * row;
      for (int64_t d = 0; d < row; d += kLanes<Real>) store(mean + d, load(mean + d) / counts_[c]);
    }
  }
  void write() const {
    for (int64_t c = 0; c < h_.ways; ++c)
      std::copy_n(rows + c * row, h_.features, h_.means + (task_ * h_.ways + c) * h_.features);
  }
  void read() {
    for (int64_t c = 0; c < h_.ways; ++c) {
      Real* const to = rows + c * row;
      std::copy_n(h_.means + (task_ * h_.ways + c) * h_.features, h_.features, to);
      std::fill_n(to + h_.features, row - h_.features, Real(0));
    }
  }

  void normalise() {
    for (int64_t c = 0; c < h_.ways; ++c) {
      const Real* const mean = rows + c * row;
      const Real signed_inverse = inverse_norm(mean), scale = magnitude(signed_inverse);
      for (int64_t d = 0; d < row; d += kLanes<Real>) store(unit + c * row + d, scale * load(mean + d));
      inverse[c] = signed_inverse;
    }
  }
  // Of a norm that is a constant there is no projection, and nothing may be taken away.
  void hide_short() {
    for (int64_t c = 0; c < h_.ways; ++c) {
      if (inverse[c] < 0) std::fill_n(rows + c * row, row, Real(0));
    }
  }
  // unit = p', squares = |p_c|^2 - |m|^2 (zeros for classes that are not there), and whether products may
  // stand for differences: they round as R^2 + 2 R |q| does, R = max |p'|. Where R^2 <= kNear and |m| <= R
  // that is a few units for queries that are near, and less than |q - p|^2 for those that are far.
  bool centre() {
    Real there = 0, radius = 0;
    std::fill_n(centre_, row, Real(0));
    for (int64_t c = 0; c < h_.ways; ++c) {
      if (!has_class(c)) continue;
      there += 1;
      for (int64_t d = 0; d < row; d += kLanes<Real>)
        store(centre_ + d, load(centre_ + d) + load(rows + c * row + d));
    }
    for (int64_t d = 0; d < row; d += kLanes<Real>) store(centre_ + d, load(centre_ + d) / there);
    for (int64_t c = 0; c < h_.ways; ++c) {
      Real* const to = unit + c * row;
      const Real* const mean = rows + c * row;
      squares[c] = 0;
      if (!has_class(c)) {
        std::fill_n(to, row, Real(0));
        continue;
      }
      for (int64_t d = 0; d < row; d += kLanes<Real>) store(to + d, load(mean + d) - load(centre_ + d));
      const Real square = dot(to, to);
      squares[c] = square + 2 * dot(centre_, to);
      radius = std::max(radius, square);
    }
    return radius <= kNear && dot(centre_, centre_) <= radius;
  }
  void begin_d(int64_t part) {
    if (h_.parts > 1) d_rows = h_.d_means + (task_ * h_.parts + part) * size();
    std::fill_n(d_rows, size(), Real(0));
  }
  // d_p_c -= weights[c] p_c.
  void take_away(const Real* weights) {
    for (int64_t c = 0; c < h_.ways; ++c) {
      for (int64_t d = c * row; d < (c + 1) * row; d += kLanes<Real>)
        store(d_rows + d, load(d_rows + d) - weights[c] * load(rows + d));
    }
  }
  // After all parts, where there are several: d_rows are their sums.
  void add_parts() {
    for (int64_t part = 0; part < h_.parts; ++part) {
      const Real* const from = h_.d_means + (task_ * h_.parts + part) * size();
      for (int64_t i = 0; i < size(); i += kLanes<Real>)
        store(d_rows + i, part == 0 ? load(from + i) : load(d_rows + i) + load(from + i));
    }
  }
  // d_support from the means' cotangents.
  void spread() {
    count();
    const int64_t features = h_.features;
    for (int64_t c = 0; c < h_.ways; ++c) {
      if (counts_[c] == 0) continue;
      Real* const d = d_rows + c * row;
      Real scale = Real(1) / counts_[c];
      if (h_.metric == Metric::cosine) {
        const Real* const along = unit + c * row;
        if (inverse[c] > 0) {
          const Real size = dot(d, along);
          for (int64_t i = 0; i < row; i += kLanes<Real>) store(d + i, load(d + i) - size * load(along + i));
        }
        scale *= magnitude(inverse[c]);
      }
      if (scale == 1) continue;
      for (int64_t i = 0; i < row; i += kLanes<Real>) store(d + i, scale * load(d + i));
    }
    for (int64_t n = 0; n < h_.supports; ++n) {
      Real* const to = h_.d_support + (task_ * h_.supports + n) * features;
      if (has_sample(n)) {
        const Real* const from = d_rows + labels_[n] * row;
        int64_t d = 0;
        for (; d + kLanes<Real> <= features; d += kLanes<Real>) store(to + d, load(from + d));
        for (; d < features; ++d) to[d] = from[d];
      } else {
        std::fill_n(to, features, Real(0));
      }
    }
  }

  Real dot(const Real* x, const Real* y) const {
    const int64_t features = h_.features;
    V sums[4] = {};
    int64_t d = 0;
    for (; d + 4 * kLanes<Real> <= features; d += 4 * kLanes<Real>) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int64_t at = d + i * kLanes<Real>;
        sums[i] += load(x + at) * load(y + at);
      }
    }
    Real sum = sum_of_lanes<Real>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; d < features; ++d) sum += x[d] * y[d];
    return sum;
  }
  // 1 / max(|x|, kLeastNorm), negative where it is the latter, a constant.
  Real inverse_norm(const Real* x) const {
    const Real norm = square_root(dot(x, x));
    return norm < kLeastNorm ? Real(-1) / kLeastNorm : Real(1) / norm;
  }

  int64_t row;              // elements from one class to the next
  Real *rows, *unit;        // p; of cosines p / |p|, or p', else p again
  Real* d_rows;             // their cotangents
  Real *inverse, *squares;  // of cosines 1 / |p|, negative where that is a constant; see centre()

 private:
  bool has_sample(int64_t n) const { return mask_ == nullptr || mask_[n]; }
  void count() {
    std::fill_n(counts_, h_.ways, Real(0));
    for (int64_t n = 0; n < h_.supports; ++n) {
      if (has_sample(n)) counts_[labels_[n]] += 1;
    }
  }

  const PrototypeHead<Real>& h_;
  int64_t task_ = 0;
  const Real* support_ = nullptr;
  const int64_t* labels_ = nullptr;
  const bool *mask_ = nullptr, *class_mask_ = nullptr;
  Real *counts_, *centre_;
};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
