// The head of Prototypical Networks, a part of a task's queries at a time, forward and backward.
//
//   p_c = mean of the support of c     s_qc = -|q - p_c|^2, -|q - p_c| or q.p_c / (|q| |p_c|)
//   loss = -sum_q log softmax(s_q)[y_q]                      residual = softmax(s) - one-hot(y)
//   G = d_sums residual + d_logits, the cotangent of s; with W = 2 G, G / |q - p_c| (0 where that is 0):
//   dq = sum_c W (p_c - q)             dp_c = sum_q W (q - p_c)
//   and of cosines, with x' = x / |x|, W = G / |q|:
//   dq = sum_c W p'_c - (G.s)_q q / |q|^2      dp_c = (1 - p'_c p'_c^T) sum_q W (q - p_c) / |p_c|
//
// where the projection lets p_c be taken away from q first: small angles keep their digits, if q is not far
// shorter than p_c.
//
// Queries are taken in blocks that stay in the cache over all that is done with them: their scores are rows
// of classes, which change places with their lanes for the softmax, so that neither is padded much. Norms
// below kLeastNorm count as that, a constant, as in torch.nn.functional.normalize.
//
// A task's queries are cut into the same parts for any number of threads, and sums over them are in order.
// What a mask takes away is never read into a sum. All is overwritten but what lies between rows of D and
// whole vectors. Tested by tests/ops/test_prototypes.py.
#pragma once

#include <algorithm>

#include "../engine/carver.h"
#include "layers/math.h"
#include "layers/multiply.h"
#include "prototypes.h"
#include "prototypes_tiles.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

// log x for x from 1 up; NaN and infinity stay.
template <class Real>
inline Vec<Real> log_from_one(Vec<Real> x) {
  using N = Numbers<Real>;
  using Bits = typename N::Bits;
  using Int = typename Simd<Real>::Mask;
  constexpr int kM = N::kMantissa;
  const Bits bits = reinterpret_cast<Bits>(x);
  const Int power = reinterpret_cast<Int>((bits >> kM) - N::kBias);
  const Bits one = (bits & ~(~Bits{} << kM)) | (N::kBias << kM);
  const Vec<Real> e = __builtin_convertvector(power, Vec<Real>);
  const Vec<Real> log =
      e * N::kLog2High + (e * N::kLog2Low + log1p_unit<Real>(reinterpret_cast<Vec<Real>>(one) - Real(1)));
  return x <= Real(1e30) ? log : x;
}

template <class Real>
class PrototypeTask {
 public:
  using V = Vec<Real>;
  static constexpr int64_t kBlock = 6 * kQueryGroup;          // queries of a block, at most
  static constexpr int64_t kBlockBytes = int64_t(320) << 10;  // with their cotangents they stay in the cache
  static constexpr Real kLeastNorm = Real(1e-12);

  // With a null workspace it only tells the size.
  PrototypeTask(const PrototypeHead<Real>& head, Real* workspace)
      : h_(head), row_(whole(head.features)), class_row_(whole(head.ways)) {
    Carver<Real> carver(workspace);
    const auto take = [&](int64_t count) { return carver.take(count); };
    const bool cosine = h_.metric == Metric::cosine;
    means_ = take(h_.ways * row_);
    unit_ = cosine ? take(h_.ways * row_) : means_;
    transposed_ = take(h_.features * class_row_);
    d_means_ = take(d_size());
    counts_ = take(h_.ways);
    mean_inverse_ = take(h_.ways);
    scores_ = take(kBlock * class_row_);
    across_ = take(h_.ways * kBlock);
    weights_ = take(h_.ways * kBlock);
    rows_ = take(h_.query_mask == nullptr ? 0 : kBlock * row_);
    tail_ = take(kBlock * kLanes<Real>);
    d_tail_ = take(kBlock * kLanes<Real>);
    present_ = take(kBlock);
    most_ = take(kBlock);
    log_ = take(kBlock);
    query_inverse_ = take(kBlock);
    self_ = take(kBlock);
    size_ = carver.size();
  }

  int64_t size() const { return size_; }
  // Of the means' cotangents, (C, D) in whole vectors.
  int64_t d_size() const { return h_.ways * row_; }

  void forward(int64_t task, int64_t part) {
    begin_task(task);
    average();
    if (part == 0) {
      for (int64_t c = 0; c < h_.ways; ++c)
        std::copy_n(means_ + c * row_, h_.features, h_.means + (task_ * h_.ways + c) * h_.features);
    }
    const bool cosine = h_.metric == Metric::cosine;
    if (cosine) normalise_means();
    transpose(unit_, h_.ways, h_.features, row_, transposed_, class_row_);
    double total = 0;
    for_each_block(part, [&](int64_t first, int64_t n) {
      const auto run = cosine ? score<false, Real> : score<true, Real>;
      run(q_, q_row_, n, transposed_, class_row_, h_.features, lanes_of<Real>(h_.ways), scores_);
      if (cosine) measure_queries(n);
      write_logits(first, n);
      if (h_.query_labels != nullptr) total += cross_entropy(first, n);
    });
    if (h_.query_labels != nullptr) h_.sums[task_ * h_.parts + part] = total;
  }

  void backward(int64_t task, int64_t part) {
    begin_task(task);
    read_means();
    const bool cosine = h_.metric == Metric::cosine;
    if (cosine) {
      normalise_means();
      // Of a norm that is a constant there is no projection, and nothing may be taken away.
      for (int64_t c = 0; c < h_.ways; ++c) {
        if (mean_inverse_[c] < 0) std::fill_n(means_ + c * row_, row_, Real(0));
      }
    }
    const auto run = cosine ? pull<false, Real> : pull<true, Real>;
    const int64_t features = h_.features, whole_columns = features / kLanes<Real> * kLanes<Real>;
    if (h_.parts > 1) d_means_ = h_.d_means + (task_ * h_.parts + part) * d_size();
    bool add = false;
    for_each_block(part, [&](int64_t first, int64_t n) {
      if (cosine) measure_queries(n);
      weigh(first, n);
      const auto run_means = !cosine || queries_are_long(n) ? pull<true, Real> : pull<false, Real>;
      Real* const d_query = h_.d_query + (task_ * h_.queries + first) * features;
      const Real* const self = cosine ? self_ : nullptr;
      const int64_t lanes = whole_groups(n);
      Pull<Real> queries{q_, q_row_, unit_, row_,    h_.ways,  weights_,
                         1,  lanes,  self,  d_query, features, false};
      Pull<Real> means{means_, row_, q_, q_row_, n, weights_, lanes, 1, nullptr, d_means_, row_, add};
      if (whole_columns > 0) {
        run(queries, n, whole_columns, whole_columns);
        run_means(means, h_.ways, whole_columns, kPullVectors * kLanes<Real>);
      }
      if (const int64_t rest = features - whole_columns; rest > 0) {
        read_tail(n, whole_columns, rest);
        queries.a = means.b = tail_, queries.a_row = means.b_row = kLanes<Real>;
        queries.b += whole_columns, means.a += whole_columns, means.to += whole_columns;
        queries.to = d_tail_, queries.to_row = kLanes<Real>;
        run(queries, n, kLanes<Real>, kLanes<Real>);
        run_means(means, h_.ways, kLanes<Real>, kLanes<Real>);
        for (int64_t q = 0; q < n; ++q)
          std::copy_n(d_tail_ + q * kLanes<Real>, rest, d_query + q * features + whole_columns);
      }
      add = true;
    });
    if (h_.parts == 1) spread();
  }

  void finish(int64_t task) {
    begin_task(task);
    read_means();
    if (h_.metric == Metric::cosine) normalise_means();
    for (int64_t part = 0; part < h_.parts; ++part) {
      const Real* const from = h_.d_means + (task_ * h_.parts + part) * d_size();
      for (int64_t i = 0; i < d_size(); i += kLanes<Real>)
        store(d_means_ + i, part == 0 ? load(from + i) : load(d_means_ + i) + load(from + i));
    }
    spread();
  }

 private:
  static int64_t whole(int64_t count) {
    constexpr int64_t kVector = kVectorBytes / int64_t(sizeof(Real));
    return (count + kVector - 1) / kVector * kVector;
  }

  void begin_task(int64_t task) {
    task_ = task;
    support_ = h_.support + task * h_.supports * h_.features;
    support_labels_ = h_.support_labels + task * h_.supports;
    support_mask_ = h_.support_mask == nullptr ? nullptr : h_.support_mask + task * h_.supports;
    query_mask_ = h_.query_mask == nullptr ? nullptr : h_.query_mask + task * h_.queries;
    class_mask_ = h_.class_mask == nullptr ? nullptr : h_.class_mask + task * h_.ways;
  }
  bool has_sample(int64_t n) const { return support_mask_ == nullptr || support_mask_[n]; }
  bool has_query(int64_t q) const { return query_mask_ == nullptr || query_mask_[q]; }
  bool has_class(int64_t c) const { return class_mask_ == nullptr || class_mask_[c]; }

  template <class Visit>
  void for_each_block(int64_t part, const Visit& visit) {
    const int64_t groups = whole_groups(h_.queries) / kQueryGroup;
    const int64_t begin = groups * part / h_.parts * kQueryGroup,
                  end = std::min(groups * (part + 1) / h_.parts * kQueryGroup, h_.queries);
    const int64_t groups_that_fit = kBlockBytes / (h_.features * int64_t(sizeof(Real)) * kQueryGroup);
    const int64_t block = std::clamp<int64_t>(groups_that_fit * kQueryGroup, kQueryGroup, kBlock);
    for (int64_t first = begin; first < end; first += block) {
      const int64_t n = std::min(block, end - first);
      take_queries(first, n);
      visit(first, n);
    }
  }

  // Where the block's rows are: in place, or with masks copied, zeros for those that are not there.
  void take_queries(int64_t first, int64_t n) {
    const Real* const from = h_.query + (task_ * h_.queries + first) * h_.features;
    for (int64_t q = 0; q < whole_groups(n); ++q) present_[q] = q < n && has_query(first + q) ? 1 : 0;
    q_ = from, q_row_ = h_.features;
    if (query_mask_ == nullptr) return;
    for (int64_t q = 0; q < n; ++q) {
      Real* const to = rows_ + q * row_;
      std::fill_n(to, row_, Real(0));
      if (has_query(first + q)) std::copy_n(from + q * h_.features, h_.features, to);
    }
    q_ = rows_, q_row_ = row_;
  }
  void read_tail(int64_t n, int64_t column, int64_t count) {
    for (int64_t q = 0; q < n; ++q) {
      for (int64_t i = 0; i < kLanes<Real>; ++i)
        tail_[q * kLanes<Real> + i] = i < count ? q_[q * q_row_ + column + i] : Real(0);
    }
  }

  void count() {
    std::fill_n(counts_, h_.ways, Real(0));
    for (int64_t n = 0; n < h_.supports; ++n) {
      if (has_sample(n)) counts_[support_labels_[n]] += 1;
    }
  }
  void average() {
    count();
    std::fill_n(means_, h_.ways * row_, Real(0));
    const int64_t features = h_.features;
    for (int64_t n = 0; n < h_.supports; ++n) {
      if (!has_sample(n)) continue;
      const Real* const from = support_ + n * features;
      Real* const to = means_ + support_labels_[n] * row_;
      int64_t d = 0;
      for (; d + kLanes<Real> <= features; d += kLanes<Real>) store(to + d, load(to + d) + load(from + d));
      for (; d < features; ++d) to[d] += from[d];
    }
    for (int64_t c = 0; c < h_.ways; ++c) {
      if (counts_[c] <= 1) continue;
      Real* const mean = means_ + c * row_;
      for (int64_t d = 0; d < row_; d += kLanes<Real>) store(mean + d, load(mean + d) / counts_[c]);
    }
  }
  void read_means() {
    for (int64_t c = 0; c < h_.ways; ++c) {
      Real* const to = means_ + c * row_;
      std::copy_n(h_.means + (task_ * h_.ways + c) * h_.features, h_.features, to);
      std::fill_n(to + h_.features, row_ - h_.features, Real(0));
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
  void normalise_means() {
    for (int64_t c = 0; c < h_.ways; ++c) {
      const Real* const mean = means_ + c * row_;
      const Real signed_inverse = inverse_norm(mean), inverse = magnitude(signed_inverse);
      for (int64_t d = 0; d < row_; d += kLanes<Real>) store(unit_ + c * row_ + d, inverse * load(mean + d));
      mean_inverse_[c] = signed_inverse;
    }
  }
  void measure_queries(int64_t n) {
    std::fill_n(query_inverse_, whole_groups(n), Real(0));
    for (int64_t q = 0; q < n; ++q) query_inverse_[q] = inverse_norm(q_ + q * q_row_);
  }
  // A quarter of the means' norms at least, all of them.
  bool queries_are_long(int64_t n) const {
    Real most = 0, least = Real(1) / kLeastNorm;
    for (int64_t q = 0; q < n; ++q) most = std::max(most, present_[q] * magnitude(query_inverse_[q]));
    for (int64_t c = 0; c < h_.ways; ++c) {
      if (has_class(c)) least = std::min(least, magnitude(mean_inverse_[c]));
    }
    return most <= 4 * least;
  }
  static Real magnitude(Real x) { return x < 0 ? -x : x; }

  // scores_ become logits and are written. By grains, as score stored them: a wider load would have to wait.
  void write_logits(int64_t first, int64_t n) {
    using Unaligned = typename Simd<Real>::UnalignedGrain;
    const int64_t ways = h_.ways, lanes = lanes_of<Real>(ways);
    Real* const logits = h_.logits + (task_ * h_.queries + first) * ways;
    for (int64_t q = 0; q < n; ++q) {
      Real* const row = scores_ + q * class_row_;
      // A row may run over into the next one, which is written after it; the last ones may not.
      const bool over = q * ways + lanes <= n * ways;
      const bool masked = (query_mask_ != nullptr && !has_query(first + q)) || class_mask_ != nullptr;
      for (int64_t c = 0; c < lanes; c += kGrain<Real>) {
        const auto value = logit(*reinterpret_cast<Unaligned*>(row + c), q);
        *reinterpret_cast<Unaligned*>(row + c) = value;
        if (over) *reinterpret_cast<Unaligned*>(logits + q * ways + c) = value;
      }
      if (masked) mask_logits(first + q, row);
      if (masked || !over) std::copy_n(row, ways, logits + q * ways);
    }
  }
  void mask_logits(int64_t q, Real* row) const {
    for (int64_t c = 0; c < h_.ways; ++c) {
      if (!has_class(c)) {
        row[c] = -Real(__builtin_inf());
      } else if (!has_query(q)) {
        row[c] = 0;
      }
    }
  }
  typename Simd<Real>::Grain logit(typename Simd<Real>::Grain score, int64_t q) const {
    if (h_.metric == Metric::sqeuclidean) return Real(0) - score;  // 0 stays 0, not -0
    if (h_.metric == Metric::cosine) {
      return score * magnitude(query_inverse_[q]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kGrain<Real>; ++i) score[i] = Real(0) - square_root(score[i]);
    return score;
  }

  // The sum of the block's losses; writes residual.
  double cross_entropy(int64_t first, int64_t n) {
    const int64_t ways = h_.ways, lanes = whole_groups(n), stride = whole_groups(h_.queries);
    transpose(scores_, n, ways, class_row_, across_, lanes);
    Real* const residual = h_.residual + task_ * ways * stride + first;
    for (int64_t j = 0; j < lanes; j += kLanes<Real>) {
      V most = load(across_ + j);
      for (int64_t c = 1; c < ways; ++c) {
        const V x = load(across_ + c * lanes + j);
        most = x > most ? x : most;
      }
      V sum{};
      for (int64_t c = 0; c < ways; ++c) {
        const V e = exponential<Real>(load(across_ + c * lanes + j) - most).exp;
        store(weights_ + c * lanes + j, e);
        sum += e;
      }
      const V there = load(present_ + j), inverse = Real(1) / sum;
      for (int64_t c = 0; c < ways; ++c) {
        const V p = load(weights_ + c * lanes + j) * inverse;
        store(residual + c * stride + j, there > V{} ? p : V{});
      }
      store(most_ + j, most);
      store(log_ + j, log_from_one<Real>(sum));
    }
    double total = 0;
    const int64_t* const labels = h_.query_labels + task_ * h_.queries + first;
    for (int64_t q = 0; q < n; ++q) {
      if (present_[q] == 0) continue;
      total += double(log_[q] + (most_[q] - across_[labels[q] * lanes + q]));
      residual[labels[q] * stride + q] -= 1;
    }
    return total;
  }

  // across_ = (n, C) rows of the user's, transposed; zeros where there is no query.
  void read_across(const Real* rows, int64_t first, int64_t n) {
    const Real* const from = rows + (task_ * h_.queries + first) * h_.ways;
    for (int64_t q = 0; q < n; ++q) {
      Real* const to = scores_ + q * class_row_;
      if (has_query(first + q)) {
        std::copy_n(from + q * h_.ways, h_.ways, to);
      } else {
        std::fill_n(to, h_.ways, Real(0));
      }
    }
    transpose(scores_, n, h_.ways, class_row_, across_, whole_groups(n));
  }

  // weights_ = W, (C, n in whole groups), and with cosines self_.
  void weigh(int64_t first, int64_t n) {
    const int64_t ways = h_.ways, lanes = whole_groups(n), stride = whole_groups(h_.queries);
    const bool sums = h_.d_sums != nullptr, rows = h_.d_logits != nullptr;
    if (rows) read_across(h_.d_logits, first, n);
    const Real d_sum = sums ? h_.d_sums[task_] : Real(0), twice = h_.metric == Metric::sqeuclidean ? 2 : 1;
    for (int64_t c = 0; c < ways; ++c) {
      Real* const to = weights_ + c * lanes;
      const Real* const residual = sums ? h_.residual + (task_ * ways + c) * stride + first : nullptr;
      if (!has_class(c)) {
        std::fill_n(to, lanes, Real(0));
        continue;
      }
      for (int64_t j = 0; j < lanes; j += kLanes<Real>) {
        V g = rows ? load(across_ + c * lanes + j) : V{};
        if (sums) g += d_sum * load(residual + j);
        store(to + j, twice * g);
      }
    }
    if (h_.metric == Metric::sqeuclidean) return;
    read_across(h_.logits, first, n);
    if (h_.metric == Metric::euclidean) {
      for (int64_t i = 0; i < ways * lanes; i += kLanes<Real>) {
        const V distance = -load(across_ + i);
        store(weights_ + i, distance == V{} ? V{} : load(weights_ + i) / distance);
      }
      return;
    }
    std::fill_n(self_, lanes, Real(0));
    for (int64_t c = 0; c < ways; ++c) {
      if (!has_class(c)) continue;
      for (int64_t j = 0; j < lanes; j += kLanes<Real>) {
        const V inverse = absolute<Real>(load(query_inverse_ + j));
        const V g = load(weights_ + c * lanes + j), part = g * load(across_ + c * lanes + j);
        store(self_ + j, load(self_ + j) + part);
        store(weights_ + c * lanes + j, g * inverse);
      }
    }
    for (int64_t j = 0; j < lanes; j += kLanes<Real>) {
      const V inverse = load(query_inverse_ + j);
      store(self_ + j, inverse < V{} ? V{} : -load(self_ + j) * inverse * inverse);
    }
  }

  // d_support from the means' cotangents.
  void spread() {
    count();
    const int64_t features = h_.features;
    for (int64_t c = 0; c < h_.ways; ++c) {
      if (counts_[c] == 0) continue;
      Real* const d = d_means_ + c * row_;
      Real scale = Real(1) / counts_[c];
      if (h_.metric == Metric::cosine) {
        const Real inverse = mean_inverse_[c];
        const Real* const unit = unit_ + c * row_;
        if (inverse > 0) {
          const Real along = dot(d, unit);
          for (int64_t i = 0; i < row_; i += kLanes<Real>) store(d + i, load(d + i) - along * load(unit + i));
        }
        scale *= magnitude(inverse);
      }
      if (scale == 1) continue;
      for (int64_t i = 0; i < row_; i += kLanes<Real>) store(d + i, scale * load(d + i));
    }
    for (int64_t n = 0; n < h_.supports; ++n) {
      Real* const to = h_.d_support + (task_ * h_.supports + n) * features;
      if (has_sample(n)) {
        std::copy_n(d_means_ + support_labels_[n] * row_, features, to);
      } else {
        std::fill_n(to, features, Real(0));
      }
    }
  }

  const PrototypeHead<Real>& h_;
  int64_t row_, class_row_, size_, task_ = 0, q_row_ = 0;
  const Real *support_ = nullptr, *q_ = nullptr;
  const int64_t* support_labels_ = nullptr;
  const bool *support_mask_ = nullptr, *query_mask_ = nullptr, *class_mask_ = nullptr;
  Real *means_, *unit_, *transposed_, *d_means_, *counts_, *mean_inverse_, *scores_, *across_, *weights_,
      *rows_, *tail_, *d_tail_, *present_, *most_, *log_, *query_inverse_, *self_;
};

template <class Real>
int64_t prototype_workspace(const PrototypeHead<Real>& head) {
  return PrototypeTask<Real>(head, nullptr).size();
}
template <class Real>
int64_t prototype_d_means(const PrototypeHead<Real>& head) {
  return PrototypeTask<Real>(head, nullptr).d_size();
}
template <class Real>
void prototype_forward(const PrototypeHead<Real>& head, int64_t task, int64_t part, Real* workspace) {
  PrototypeTask<Real>(head, workspace).forward(task, part);
}
template <class Real>
void prototype_backward(const PrototypeHead<Real>& head, int64_t task, int64_t part, Real* workspace) {
  PrototypeTask<Real>(head, workspace).backward(task, part);
}
template <class Real>
void prototype_finish(const PrototypeHead<Real>& head, int64_t task, Real* workspace) {
  PrototypeTask<Real>(head, workspace).finish(task);
}

template <class Real>
constexpr PrototypeFunctions<Real> kPrototypeFunctions{prototype_workspace<Real>, prototype_d_means<Real>,
                                                       prototype_forward<Real>, prototype_backward<Real>,
                                                       prototype_finish<Real>};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
