// The head of Prototypical Networks: what the kernels get. The equations stand in metafast/ops/prototypes.py.
#pragma once

#include <cstdint>

namespace metafast {

enum class Metric { sqeuclidean, euclidean, cosine };

// Queries come in groups of these, so that a row of them is whole vectors for every instruction set.
constexpr int64_t kQueryGroup = 16;
inline int64_t whole_groups(int64_t queries) {
  return (queries + kQueryGroup - 1) / kQueryGroup * kQueryGroup;
}

// T tasks, Ns support samples, Nq queries, C classes, D features; Nq' is Nq in whole groups.
template <class Real>
struct PrototypeHead {
  int64_t tasks, supports, queries, ways, features;
  int64_t parts;  // that a task's queries are cut into, of whole groups each; one is one thread's work
  Metric metric;
  const Real *support, *query;                         // (T, Ns, D), (T, Nq, D)
  const int64_t *support_labels, *query_labels;        // (T, Ns), (T, Nq); without the latter no losses
  const bool *support_mask, *query_mask, *class_mask;  // (T, Ns), (T, Nq), (T, C), null: all are there
  Real *means, *logits;                                // (T, C, D), (T, Nq, C)
  double* sums;                                        // (T, parts) of losses
  Real* residual;                                      // (T, C, Nq') softmax - one-hot
  const Real *d_sums, *d_logits;                       // backward: (T,), (T, Nq, C), null: zero
  Real *d_support, *d_query;                           // (T, Ns, D), (T, Nq, D)
  Real* d_means;  // (T, parts, C, D in whole vectors) with several parts: what each adds to the means'
                  // cotangents
};

}  // namespace metafast
