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
// Where losses alone are asked for, and their gradients with them (gradients()), a block of queries goes all
// the way at once. W's rows sum to 0 there, and where classes are near each other (ClassMeans::centre)
// products do for differences, half the operations: with m = mean_c p_c and p'_c = p_c - m
//
//   s_qc = 2 q.p'_c - (|p_c|^2 - |m|^2) + const(q)
//   dq = sum_c W p'_c                  dp_c = sum_q W q - (sum_q W) p_c
//
// Queries are taken in blocks that stay in the cache over all that is done with them: their scores are rows
// of classes, which change places with their lanes for the softmax, so that neither is padded much; but see
// prototypes_few.h. Norms below ClassMeans::kLeastNorm count as that, a constant, as in
// torch.nn.functional.normalize.
//
// A task's queries are cut into the same parts for any number of threads, and sums over them are in order.
// What a mask takes away is never read into a sum. All is overwritten but what lies between rows of D and
// whole vectors. Tested by tests/ops/test_prototypes.py and
// test_prototype_loss.py.
#pragma once

#include <algorithm>

#include "../engine/carver.h"
#include "layers/math.h"
#include "layers/row_products.h"
#include "prototypes.h"
#include "prototypes_few.h"
#include "prototypes_means.h"
#include "prototypes_tiles.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

template <class Real>
class PrototypeTask {
 public:
  using V = Vec<Real>;
  static constexpr int64_t kBlock = 6 * kQueryGroup;          // queries of a block, at most
  static constexpr int64_t kBlockBytes = int64_t(320) << 10;  // with their cotangents they stay in the cache

  // With a null workspace it only tells the size. `at_once`: it is for gradients().
  PrototypeTask(const PrototypeHead<Real>& head, Real* workspace, bool at_once = false)
      : h_(head),
        carver_(workspace),
        means_(head, at_once, carver_),
        row_(means_.row),
        class_row_(Carver<Real>::whole(head.ways)) {
    const auto take = [&](int64_t count) { return carver_.take(count); };
    transposed_ = take(h_.features * class_row_);
    scores_ = take(kBlock * class_row_);
    across_ = take(h_.ways * kBlock);
    weights_ = take(h_.ways * kBlock);
    rows_ = take(h_.query_mask == nullptr ? 0 : kBlock * row_);
    class_weights_ = take(at_once ? h_.ways : 0);
    tail_ = take(kBlock * kLanes<Real>);
    d_tail_ = take(kBlock * kLanes<Real>);
    present_ = take(kBlock);
    labels_ = take(kBlock);
    losses_ = take(kBlock);
    query_inverse_ = take(kBlock);
    self_ = take(kBlock);
  }

  int64_t size() const { return carver_.size(); }
  // Of the means' cotangents.
  int64_t d_size() const { return means_.size(); }

  void forward(int64_t task, int64_t part) {
    begin_task(task);
    means_.average();
    if (part == 0) means_.write();
    const bool cosine = h_.metric == Metric::cosine;
    if (cosine) means_.normalise();
    transpose(means_.unit, h_.ways, h_.features, row_, transposed_, class_row_);
    double total = 0;
    const int64_t stride = whole_groups(h_.queries);
    for_each_block(part, [&](int64_t first, int64_t n) {
      score_block(first, n);
      if (h_.query_labels == nullptr) return;
      transpose(scores_, n, h_.ways, class_row_, across_, whole_groups(n));
      total +=
          cross_entropy(first, n, nullptr, Real(1), h_.residual + task_ * h_.ways * stride + first, stride);
    });
    if (h_.query_labels != nullptr) h_.sums[task_ * h_.parts + part] = total;
  }

  void backward(int64_t task, int64_t part) {
    begin_task(task);
    means_.read();
    const bool cosine = h_.metric == Metric::cosine;
    if (cosine) {
      means_.normalise();
      means_.hide_short();
    }
    means_.begin_d(part);
    const int64_t stride = whole_groups(h_.queries);
    for_each_block(part, [&](int64_t first, int64_t n) {
      if (cosine) measure_queries(n);
      if (h_.d_logits != nullptr) read_across(h_.d_logits, first, n);
      weigh(n, h_.d_sums == nullptr ? nullptr : h_.residual + task_ * h_.ways * stride + first, stride,
            h_.d_logits != nullptr);
      if (h_.metric != Metric::sqeuclidean) {
        read_across(h_.logits, first, n);
        weigh_by_logits(n);
      }
      pull_block(first, n, false);
    });
    if (h_.parts == 1) means_.spread();
  }

  // The losses' sums, and what backward makes of d_sums, with neither logits nor residual written.
  void gradients(int64_t task, int64_t part) {
    begin_task(task);
    means_.average();
    if (h_.parts > 1 && part == 0) means_.write();
    const bool cosine = h_.metric == Metric::cosine;
    if (cosine) means_.normalise();
    const bool products = h_.metric == Metric::sqeuclidean && means_.centre();
    const Real* const rows = cosine || products ? means_.unit : means_.rows;
    const bool few = few_classes<Real>(h_.ways);
    if (!few) transpose(rows, h_.ways, h_.features, row_, transposed_, class_row_);
    if (cosine) means_.hide_short();
    means_.begin_d(part);
    const Real factor = h_.d_sums[task_] * Real(h_.metric == Metric::sqeuclidean ? 2 : 1);
    std::fill_n(class_weights_, h_.ways, Real(0));
    double total = 0;
    for_each_block(part, [&](int64_t first, int64_t n) {
      const int64_t lanes = whole_groups(n);
      if (few) {
        score_few_classes(rows, n, !cosine && !products);
        if (!products) logits_across(n);
      } else if (products) {
        score<false>(q_, q_row_, n, transposed_, class_row_, h_.features, lanes_of<Real>(h_.ways), scores_);
        transpose(scores_, n, h_.ways, class_row_, across_, lanes);
      } else {
        score_block(first, n);
        transpose(scores_, n, h_.ways, class_row_, across_, lanes);
      }
      total += cross_entropy(first, n, products ? means_.squares : nullptr, factor, weights_, lanes);
      if (h_.metric != Metric::sqeuclidean) weigh_by_logits(n);
      pull_block(first, n, products);
    });
    if (products) means_.take_away(class_weights_);
    h_.sums[task_ * h_.parts + part] = total;
    if (h_.parts == 1) means_.spread();
  }

  void finish(int64_t task) {
    begin_task(task);
    means_.read();
    if (h_.metric == Metric::cosine) means_.normalise();
    means_.add_parts();
    means_.spread();
  }

 private:
  void begin_task(int64_t task) {
    task_ = task;
    means_.begin(task);
    query_mask_ = h_.query_mask == nullptr ? nullptr : h_.query_mask + task * h_.queries;
  }
  bool has_query(int64_t q) const { return query_mask_ == nullptr || query_mask_[q]; }

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

  void measure_queries(int64_t n) {
    std::fill_n(query_inverse_, whole_groups(n), Real(0));
    for (int64_t q = 0; q < n; ++q) query_inverse_[q] = means_.inverse_norm(q_ + q * q_row_);
  }
  // A quarter of the means' norms at least, all of them.
  bool queries_are_long(int64_t n) const {
    Real most = 0, least = Real(1) / means_.kLeastNorm;
    for (int64_t q = 0; q < n; ++q) most = std::max(most, present_[q] * magnitude(query_inverse_[q]));
    for (int64_t c = 0; c < h_.ways; ++c) {
      if (means_.has_class(c)) least = std::min(least, magnitude(means_.inverse[c]));
    }
    return most <= 4 * least;
  }
  // scores_ = logits, which are written where they are asked for.
  void score_block(int64_t first, int64_t n) {
    const bool cosine = h_.metric == Metric::cosine;
    const auto run = cosine ? score<false, Real> : score<true, Real>;
    run(q_, q_row_, n, transposed_, class_row_, h_.features, lanes_of<Real>(h_.ways), scores_);
    if (cosine) measure_queries(n);
    write_logits(first, n);
  }
  // By grains, as score stored them: a wider load would have to wait.
  void write_logits(int64_t first, int64_t n) {
    using Unaligned = typename Simd<Real>::UnalignedGrain;
    const int64_t ways = h_.ways, lanes = lanes_of<Real>(ways);
    const bool wanted = h_.logits != nullptr;
    Real* const logits = wanted ? h_.logits + (task_ * h_.queries + first) * ways : nullptr;
    for (int64_t q = 0; q < n; ++q) {
      Real* const row = scores_ + q * class_row_;
      // A row may run over into the next one, which is written after it; the last ones may not.
      const bool over = wanted && q * ways + lanes <= n * ways;
      const bool masked = (query_mask_ != nullptr && !has_query(first + q)) || h_.class_mask != nullptr;
      for (int64_t c = 0; c < lanes; c += kGrain<Real>) {
        const auto value = logit(*reinterpret_cast<Unaligned*>(row + c), q);
        *reinterpret_cast<Unaligned*>(row + c) = value;
        if (over) *reinterpret_cast<Unaligned*>(logits + q * ways + c) = value;
      }
      if (masked) mask_logits(first + q, row);
      if (wanted && (masked || !over)) std::copy_n(row, ways, logits + q * ways);
    }
  }
  void mask_logits(int64_t q, Real* row) const {
    for (int64_t c = 0; c < h_.ways; ++c) {
      if (!means_.has_class(c)) {
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
    return Real(0) - square_roots(score);
  }

  // Of a vector, or of half of one.
  template <class Vector>
  static Vector square_roots(Vector x) {
#pragma GCC unroll 16
    for (size_t i = 0; i < sizeof(x) / sizeof(Real); ++i) x[i] = square_root(x[i]);
    return x;
  }

  // The sum of the block's losses for the logits across_, which with `squares` (C,) are 2 across_ - squares;
  // writes the residual times `factor`, its classes `stride` apart.
  double cross_entropy(int64_t first, int64_t n, const Real* squares, Real factor, Real* residual,
                       int64_t stride) {
    const int64_t ways = h_.ways, lanes = whole_groups(n);
    const int64_t* const labels = h_.query_labels + task_ * h_.queries + first;
    for (int64_t q = 0; q < n; ++q) labels_[q] = Real(labels[q]);
    for (int64_t q = 0; q < lanes; ++q) labels_[q] = present_[q] > 0 ? labels_[q] : Real(-1);
    for (int64_t j = 0; j < lanes; j += kLanes<Real>) {
      V most = splat(-Real(__builtin_inf()));
      for (int64_t c = 0; c < ways; ++c) {
        if (!means_.has_class(c)) continue;
        V x = load(across_ + c * lanes + j);
        if (squares != nullptr) {
          x = Real(2) * x - squares[c];
          store(across_ + c * lanes + j, x);
        }
        most = greater(x, most);
      }
      const V label = load(labels_ + j);
      const auto there = label >= V{};
      V sum{}, own{}, index{};
      for (int64_t c = 0; c < ways; ++c, index += Real(1)) {
        if (!means_.has_class(c)) continue;
        const V x = load(across_ + c * lanes + j), e = softmax_exponential(x - most);
        own = label == index ? x : own;
        store(residual + c * stride + j, e);
        sum += e;
      }
      const V scale = factor / sum;
      index = V{};
      for (int64_t c = 0; c < ways; ++c, index += Real(1)) {
        Real* const to = residual + c * stride + j;
        if (!means_.has_class(c)) {
          store(to, V{});
          continue;
        }
        const V p = there ? load(to) * scale : V{};
        store(to, label == index ? p - factor : p);
      }
      store(losses_ + j, there ? natural_log<Real>(sum) + (most - own) : V{});
    }
    double total[4] = {};
    for (int64_t q = 0; q < n; ++q) total[q % 4] += double(losses_[q]);
    return (total[0] + total[1]) + (total[2] + total[3]);
  }
  // e^x for x <= 0; 0 where what is made of it would be below the normal numbers, which cores are slow with.
  static V softmax_exponential(V x) {
    const ExponentialParts<Real> e = exponential_parts<Real>(x);
    return x < -Real(0.8) * Numbers<Real>::kExpNormal ? V{} : e.p * e.scale + e.scale;
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

  // weights_ = G, (C, n in whole groups), or with squared distances W: of the residual, and with `rows` of
  // across_.
  void weigh(int64_t n, const Real* residual, int64_t stride, bool rows) {
    const int64_t lanes = whole_groups(n);
    const Real d_sum = residual == nullptr ? Real(0) : h_.d_sums[task_];
    const Real twice = h_.metric == Metric::sqeuclidean ? 2 : 1;
    for (int64_t c = 0; c < h_.ways; ++c) {
      Real* const to = weights_ + c * lanes;
      if (!means_.has_class(c)) {
        std::fill_n(to, lanes, Real(0));
        continue;
      }
      for (int64_t j = 0; j < lanes; j += kLanes<Real>) {
        V g = rows ? load(across_ + c * lanes + j) : V{};
        if (residual != nullptr) g += d_sum * load(residual + c * stride + j);
        store(to + j, twice * g);
      }
    }
  }
  // Of G in weights_ and the logits in across_: W, and with cosines self_.
  void weigh_by_logits(int64_t n) {
    const int64_t ways = h_.ways, lanes = whole_groups(n);
    if (h_.metric == Metric::euclidean) {
      for (int64_t i = 0; i < ways * lanes; i += kLanes<Real>) {
        const V distance = -load(across_ + i);
        store(weights_ + i, distance == V{} ? V{} : load(weights_ + i) / distance);
      }
      return;
    }
    std::fill_n(self_, lanes, Real(0));
    for (int64_t c = 0; c < ways; ++c) {
      if (!means_.has_class(c)) continue;
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

  // across_ = scores of few classes, by differences or by products.
  void score_few_classes(const Real* rows, int64_t n, bool differences) {
    const int64_t whole = h_.features / kLanes<Real> * kLanes<Real>, rest = h_.features - whole;
    if (rest > 0) read_tail(n, whole, rest);
    const auto run = differences ? score_across<true, Real> : score_across<false, Real>;
    run({q_, q_row_, n, rest > 0 ? tail_ : nullptr, rows, row_, h_.ways, whole, across_, whole_groups(n)});
  }
  // across_ = logits, of the scores.
  void logits_across(int64_t n) {
    const int64_t lanes = whole_groups(n);
    if (h_.metric == Metric::cosine) measure_queries(n);
    for (int64_t c = 0; c < h_.ways; ++c) {
      for (int64_t j = 0; j < lanes; j += kLanes<Real>) {
        Real* const to = across_ + c * lanes + j;
        V score = load(to);
        if (h_.metric == Metric::cosine) {
          score *= absolute<Real>(load(query_inverse_ + j));
        } else if (h_.metric == Metric::euclidean) {
          score = Real(0) - square_roots(score);
        } else {
          score = Real(0) - score;  // 0 stays 0, not -0
        }
        store(to, score);
      }
    }
  }

  // The block's d_query, and what it adds to the means' cotangents, of W; by `products`, or by
  // differences.
  void pull_block(int64_t first, int64_t n, bool products) {
    const int64_t features = h_.features, whole_columns = features / kLanes<Real> * kLanes<Real>;
    Real* const d_query = h_.d_query + (task_ * h_.queries + first) * features;
    if (products) sum_weights(n);
    const bool means_by_products = products || (h_.metric == Metric::cosine && !queries_are_long(n));
    const auto run = [&](const Real* q, int64_t q_row, int64_t column, int64_t columns, Real* to,
                         int64_t to_row) {
      if (products) {
        multiply_queries(n, column, columns, to, to_row);
      } else {
        pull_queries(q, q_row, n, column, columns, to, to_row);
      }
      if (means_by_products) {
        multiply_means(q, q_row, n, column, columns);
      } else {
        pull_means(q, q_row, n, column, columns);
      }
    };
    if (whole_columns > 0) run(q_, q_row_, 0, whole_columns, d_query, features);
    const int64_t rest = features - whole_columns;
    if (rest == 0) return;
    read_tail(n, whole_columns, rest);
    run(tail_, kLanes<Real>, whole_columns, kLanes<Real>, d_tail_, kLanes<Real>);
    for (int64_t q = 0; q < n; ++q)
      std::copy_n(d_tail_ + q * kLanes<Real>, rest, d_query + q * features + whole_columns);
  }
  // `columns` of n rows `to` from W, the classes and the queries q; in differences, or cosines.
  void pull_queries(const Real* q, int64_t q_row, int64_t n, int64_t column, int64_t columns, Real* to,
                    int64_t to_row) const {
    const bool cosine = h_.metric == Metric::cosine;
    const Pull<Real> p{q,    q_row,           (cosine ? means_.unit : means_.rows) + column,
                       row_, h_.ways,         weights_,
                       1,    whole_groups(n), cosine ? self_ : nullptr,
                       to,   to_row,          false};
    cosine ? pull<false>(p, n, columns, columns) : pull<true>(p, n, columns, columns);
  }
  void pull_means(const Real* q, int64_t q_row, int64_t n, int64_t column, int64_t columns) const {
    pull<true>(Pull<Real>{means_.rows + column, row_, q, q_row, n, weights_, whole_groups(n), 1, nullptr,
                          means_.d_rows + column, row_, true},
               h_.ways, columns, kPullVectors * kLanes<Real>);
  }
  // The same by matrix products: of the centred classes; and without (sum_q W) p_c, which is taken away at
  // the end.
  void multiply_queries(int64_t n, int64_t column, int64_t columns, Real* to, int64_t to_row) const {
    run_outer_product<Real>(nullptr,
                            {.x = weights_,
                             .g = means_.unit + column,
                             .x_row = whole_groups(n),
                             .g_row = row_,
                             .samples = h_.ways,
                             .d = to,
                             .d_row = to_row},
                            n, columns);
  }
  void multiply_means(const Real* q, int64_t q_row, int64_t n, int64_t column, int64_t columns) const {
    run_row_product<Real>(nullptr,
                          {.first = {weights_, q, whole_groups(n), q_row, n},
                           .c = means_.d_rows + column,
                           .c_row = row_,
                           .add = true},
                          h_.ways, columns);
  }
  // class_weights_ += sum_q W, of a block.
  void sum_weights(int64_t n) {
    const int64_t lanes = whole_groups(n);
    for (int64_t c = 0; c < h_.ways; ++c) {
      V sum{};
      for (int64_t j = 0; j < lanes; j += kLanes<Real>) sum += load(weights_ + c * lanes + j);
      class_weights_[c] += sum_of_lanes<Real>(sum);
    }
  }

  const PrototypeHead<Real>& h_;
  Carver<Real> carver_;
  ClassMeans<Real> means_;
  int64_t row_, class_row_, task_ = 0, q_row_ = 0;
  const Real* q_ = nullptr;
  const bool* query_mask_ = nullptr;
  Real *transposed_, *scores_, *across_, *weights_, *rows_, *tail_, *d_tail_, *present_, *labels_, *losses_,
      *query_inverse_, *self_, *class_weights_;
};

template <class Real>
int64_t prototype_workspace(const PrototypeHead<Real>& head, bool at_once) {
  return PrototypeTask<Real>(head, nullptr, at_once).size();
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
void prototype_gradients(const PrototypeHead<Real>& head, int64_t task, int64_t part, Real* workspace) {
  PrototypeTask<Real>(head, workspace, true).gradients(task, part);
}
template <class Real>
void prototype_finish(const PrototypeHead<Real>& head, int64_t task, Real* workspace) {
  PrototypeTask<Real>(head, workspace).finish(task);
}

template <class Real>
constexpr PrototypeFunctions<Real> kPrototypeFunctions{prototype_workspace<Real>, prototype_d_means<Real>,
                                                       prototype_forward<Real>,   prototype_backward<Real>,
                                                       prototype_gradients<Real>, prototype_finish<Real>};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
