// The head of Prototypical Networks on CUDA, forward and backward; overwrites. The equations are those of
// cpu/prototypes_kernel.h.
//
//   forward    means; with cosines the norms; scores and, with labels, losses: a block a tile of queries
//   backward   with cosines the norms; W: a warp a query; dq: a block a few queries; dp and what it is of
//   each
//              support sample: a block a few classes, over all queries, so that there is nothing to add up
//
// A block's y is the task; any grid covers all. What a mask takes away is never read into a sum. All sums are
// in an order that hangs on the sizes alone. Tested by tests/ops/test_prototypes.py on the emulator, and
// where there is a GPU.
#pragma once

#include "gpu.h"
#include "prototypes.h"
#include "warp.cuh"

namespace metafast::METAFAST_GPU {

constexpr int kHeadThreads = 128, kHeadWarps = kHeadThreads / 32;
constexpr int kHeadClasses = 32;                    // that a block scores at a time
constexpr int kHeadFeatures = 32;                   // in shared memory at a time
constexpr int kPullQueries = 8, kPullClasses = 64;  // of a block for dq, and of W in shared memory at a time
constexpr int kSpreadClasses = 4;                   // of a block for dp

// The head, and what is of it in each kernel.
template <class Real>
struct HeadLaunch {
  PrototypeHead<Real> h;
  PrototypeWorkspace<Real> w;
  int64_t residual_row;  // Nq in whole groups

  __device__ bool has_sample(int64_t t, int64_t n) const {
    return h.support_mask == nullptr || h.support_mask[t * h.supports + n];
  }
  __device__ bool has_query(int64_t t, int64_t q) const {
    return h.query_mask == nullptr || h.query_mask[t * h.queries + q];
  }
  __device__ bool has_class(int64_t t, int64_t c) const {
    return h.class_mask == nullptr || h.class_mask[t * h.ways + c];
  }
};

// means: a block a class.
template <class Real>
__global__ void __launch_bounds__(kHeadThreads) prototype_means_kernel(const HeadLaunch<Real> a) {
  const PrototypeHead<Real>& h = a.h;
  for (int64_t t = blockIdx.y; t < h.tasks; t += gridDim.y) {
    const int64_t* const labels = h.support_labels + t * h.supports;
    for (int64_t c = blockIdx.x; c < h.ways; c += gridDim.x) {
      for (int64_t d = threadIdx.x; d < h.features; d += kHeadThreads) {
        Real sum = 0;
        int64_t count = 0;
        for (int64_t n = 0; n < h.supports; ++n) {
          if (labels[n] != c || !a.has_sample(t, n)) continue;
          sum += h.support[(t * h.supports + n) * h.features + d];
          ++count;
        }
        h.means[(t * h.ways + c) * h.features + d] = count > 1 ? sum / Real(count) : sum;
      }
    }
  }
}

// 1 / max(|x|, 1e-12) of each row, a warp a row; negative where it is the latter, a constant.
template <class Real>
__global__ void __launch_bounds__(kHeadThreads)
    prototype_norms_kernel(const Real* x, int64_t rows, int64_t features, Real* inverse) {
  constexpr Real kLeast = Real(1e-12);
  const int lane = int(threadIdx.x) % 32;
  const int64_t stride = int64_t(gridDim.x) * kHeadWarps;
  for (int64_t row = int64_t(blockIdx.x) * kHeadWarps + threadIdx.x / 32; row < rows; row += stride) {
    Real sum = 0;
    for (int64_t d = lane; d < features; d += 32) sum += x[row * features + d] * x[row * features + d];
    const Real norm = std::sqrt(warp_sum(sum));
    if (lane == 0) inverse[row] = norm < kLeast ? Real(-1) / kLeast : Real(1) / norm;
  }
}

// logits, and with labels residual and sums: a block a tile of queries.
template <class Real>
__global__ void __launch_bounds__(kHeadThreads, 1) prototype_scores_kernel(const HeadLaunch<Real> a) {
  constexpr int kTile = int(kPrototypeTile), kRow = kHeadFeatures + 1;
  constexpr int kPairs = kTile * kHeadClasses / kHeadThreads;  // of a query and a class, of a thread
  METAFAST_SHARED(Real, queries, [kTile][kRow]);
  METAFAST_SHARED(Real, means, [kHeadClasses][kRow]);
  METAFAST_SHARED(double, losses, [kTile]);
  const PrototypeHead<Real>& h = a.h;
  const bool cosine = h.metric == Metric::cosine;
  const int64_t first = blockIdx.x * kPrototypeTile;  // the grid's x is the tiles
  const int there = int(h.queries - first < kTile ? h.queries - first : kTile), warp = int(threadIdx.x) / 32,
            lane = int(threadIdx.x) % 32;
  for (int64_t t = blockIdx.y; t < h.tasks; t += gridDim.y) {
    Real* const logits = h.logits + (t * h.queries + first) * h.ways;
    for (int64_t class_0 = 0; class_0 < h.ways; class_0 += kHeadClasses) {
      const int classes = int(h.ways - class_0 < kHeadClasses ? h.ways - class_0 : kHeadClasses);
      Real scores[kPairs] = {};
      for (int64_t start = 0; start < h.features; start += kHeadFeatures) {
        const int deep = int(h.features - start < kHeadFeatures ? h.features - start : kHeadFeatures);
        __syncthreads();  // all have read what is there
        for (int at = int(threadIdx.x); at < kTile * kHeadFeatures; at += kHeadThreads) {
          const int row = at / kHeadFeatures, d = at % kHeadFeatures;
          queries[row][d] = row < there && d < deep
                                ? h.query[(t * h.queries + first + row) * h.features + start + d]
                                : Real(0);
        }
        for (int at = int(threadIdx.x); at < classes * kHeadFeatures; at += kHeadThreads) {
          const int row = at / kHeadFeatures, d = at % kHeadFeatures;
          means[row][d] = d < deep ? h.means[(t * h.ways + class_0 + row) * h.features + start + d] : Real(0);
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < kPairs; ++k) {
          const int pair = int(threadIdx.x) + k * kHeadThreads, q = pair / classes, c = pair % classes;
          if (q >= there) continue;
          Real sum = 0;  // of these features alone: long sums in pieces keep their digits
          for (int d = 0; d < kHeadFeatures; ++d) {
            const Real x = queries[q][d], p = means[c][d];
            sum += cosine ? x * p : (x - p) * (x - p);
          }
          scores[k] += sum;
        }
      }
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
        const int pair = int(threadIdx.x) + k * kHeadThreads, q = pair / classes, c = pair % classes;
        if (q >= there) continue;
        const int64_t query = first + q, known = class_0 + c;
        Real logit = Real(0) - scores[k];  // 0 stays 0, not -0
        if (h.metric == Metric::euclidean) logit = Real(0) - std::sqrt(scores[k]);
        if (cosine) {
          logit = scores[k] * std::fabs(a.w.mean_inverse[t * h.ways + known]) *
                  std::fabs(a.w.query_inverse[t * h.queries + query]);
        }
        if (!a.has_query(t, query)) logit = 0;
        if (!a.has_class(t, known)) logit = -Real(INFINITY);
        logits[q * h.ways + known] = logit;
      }
    }
    if (h.query_labels == nullptr) continue;
    __syncthreads();
    for (int q = warp; q < kTile; q += kHeadWarps) {
      const int64_t query = first + q;
      const bool asked = q < there && a.has_query(t, query);
      Real most = -Real(INFINITY), sum = 0;
      for (int64_t c = lane; asked && c < h.ways; c += 32) {
        const Real x = logits[q * h.ways + c];
        most = x > most ? x : most;
      }
      most = warp_max(most);
      for (int64_t c = lane; asked && c < h.ways; c += 32) sum += std::exp(logits[q * h.ways + c] - most);
      sum = warp_sum(sum);
      const int64_t label = asked ? h.query_labels[t * h.queries + query] : -1;
      for (int64_t c = lane; query < a.residual_row && c < h.ways; c += 32) {
        const Real p = asked ? std::exp(logits[q * h.ways + c] - most) / sum : Real(0);
        h.residual[(t * h.ways + c) * a.residual_row + query] = c == label ? p - 1 : p;
      }
      if (lane == 0) {
        losses[q] = asked ? double(std::log(sum) + (most - logits[q * h.ways + label])) : 0.0;
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      double sum = 0;
      for (int q = 0; q < kTile; ++q) sum += losses[q];
      h.sums[blockIdx.x * h.tasks + t] = sum;
    }
  }
}

// W, and with cosines self: a warp a query.
template <class Real>
__global__ void __launch_bounds__(kHeadThreads, 1) prototype_weights_kernel(const HeadLaunch<Real> a) {
  const PrototypeHead<Real>& h = a.h;
  const int lane = int(threadIdx.x) % 32;
  const bool cosine = h.metric == Metric::cosine;
  const int64_t stride = int64_t(gridDim.x) * kHeadWarps;
  for (int64_t t = blockIdx.y; t < h.tasks; t += gridDim.y) {
    const Real d_sum = h.d_sums == nullptr ? Real(0) : h.d_sums[t];
    for (int64_t q = int64_t(blockIdx.x) * kHeadWarps + threadIdx.x / 32; q < h.queries; q += stride) {
      const int64_t row = (t * h.queries + q) * h.ways;
      const bool asked = a.has_query(t, q);
      const Real inverse = cosine && asked ? a.w.query_inverse[t * h.queries + q] : Real(0);
      Real along = 0;
      for (int64_t c = lane; c < h.ways; c += 32) {
        Real weight = 0;
        if (asked && a.has_class(t, c)) {
          if (h.d_logits != nullptr) weight = h.d_logits[row + c];
          if (h.d_sums != nullptr) weight += d_sum * h.residual[(t * h.ways + c) * a.residual_row + q];
          if (h.metric == Metric::sqeuclidean) {
            weight *= 2;
          } else if (h.metric == Metric::euclidean) {
            const Real distance = -h.logits[row + c];
            weight = distance == 0 ? Real(0) : weight / distance;
          } else {
            along += weight * h.logits[row + c];
            weight *= std::fabs(inverse);
          }
        }
        a.w.weights[(t * h.ways + c) * h.queries + q] = weight;
      }
      if (!cosine) continue;
      along = warp_sum(along);
      // Of a norm that is a constant there is no projection.
      if (lane == 0) a.w.self[t * h.queries + q] = inverse > 0 ? -along * inverse * inverse : Real(0);
    }
  }
}

// d_query: a block a few queries, a thread a feature of each.
template <class Real>
__global__ void __launch_bounds__(kHeadThreads, 1) prototype_pull_kernel(const HeadLaunch<Real> a) {
  METAFAST_SHARED(Real, weights, [kPullClasses][kPullQueries]);
  const PrototypeHead<Real>& h = a.h;
  const bool cosine = h.metric == Metric::cosine;
  const int64_t first = int64_t(blockIdx.x) * kPullQueries;
  const int there = int(h.queries - first < kPullQueries ? h.queries - first : kPullQueries);
  for (int64_t t = blockIdx.y; t < h.tasks; t += gridDim.y) {
    for (int64_t start = 0; start < h.features; start += kHeadThreads) {
      const int64_t d = start + threadIdx.x;
      const bool mine = d < h.features;
      const Real* const query = h.query + (t * h.queries + first) * h.features + d;
      Real x[kPullQueries], sums[kPullQueries];
      for (int q = 0; q < kPullQueries; ++q) {
        const bool asked = mine && q < there && a.has_query(t, first + q);
        x[q] = asked ? query[q * h.features] : Real(0);
        sums[q] = cosine && asked ? a.w.self[t * h.queries + first + q] * x[q] : Real(0);
      }
      for (int64_t class_0 = 0; class_0 < h.ways; class_0 += kPullClasses) {
        const int classes = int(h.ways - class_0 < kPullClasses ? h.ways - class_0 : kPullClasses);
        __syncthreads();  // all have read what is there
        for (int at = int(threadIdx.x); at < classes * kPullQueries; at += kHeadThreads) {
          const int c = at / kPullQueries, q = at % kPullQueries;
          weights[c][q] =
              q < there ? a.w.weights[(t * h.ways + class_0 + c) * h.queries + first + q] : Real(0);
        }
        __syncthreads();
        for (int c = 0; mine && c < classes; ++c) {
          const int64_t known = t * h.ways + class_0 + c;
          Real p = h.means[known * h.features + d];
          if (cosine) p *= std::fabs(a.w.mean_inverse[known]);
          for (int q = 0; q < kPullQueries; ++q) sums[q] += weights[c][q] * (cosine ? p : p - x[q]);
        }
      }
      Real* const d_query = h.d_query + (t * h.queries + first) * h.features + d;
      for (int q = 0; q < kPullQueries; ++q) {
        if (mine && q < there) d_query[q * h.features] = sums[q];
      }
    }
  }
}

// The sums of the block's values, a row of them for each class, into `sums`; all threads must come.
template <class Real>
__device__ void block_sums(const Real (&x)[kSpreadClasses], Real (&of_warps)[kSpreadClasses][kHeadWarps],
                           Real (&sums)[kSpreadClasses]) {
  __syncthreads();  // all have read what is there
  for (int k = 0; k < kSpreadClasses; ++k) {
    const Real sum = warp_sum(x[k]);
    if (threadIdx.x % 32 == 0) of_warps[k][threadIdx.x / 32] = sum;
  }
  __syncthreads();
  for (int k = 0; k < kSpreadClasses; ++k) {
    sums[k] = 0;
    for (int warp = 0; warp < kHeadWarps; ++warp) sums[k] += of_warps[k][warp];
  }
}

// d_support: a block a few classes, a thread a feature of each.
template <class Real>
__global__ void __launch_bounds__(kHeadThreads, 1) prototype_spread_kernel(const HeadLaunch<Real> a) {
  METAFAST_SHARED(Real, of_warps, [kSpreadClasses][kHeadWarps]);
  const PrototypeHead<Real>& h = a.h;
  const bool cosine = h.metric == Metric::cosine;
  const int64_t first = int64_t(blockIdx.x) * kSpreadClasses;
  const int classes = int(h.ways - first < kSpreadClasses ? h.ways - first : kSpreadClasses);
  for (int64_t t = blockIdx.y; t < h.tasks; t += gridDim.y) {
    const int64_t* const labels = h.support_labels + t * h.supports;
    Real scale[kSpreadClasses], inverse[kSpreadClasses], along[kSpreadClasses] = {};
    for (int k = 0; k < kSpreadClasses; ++k) {
      int64_t count = 0;
      for (int64_t n = 0; n < h.supports; ++n) count += labels[n] == first + k && a.has_sample(t, n);
      inverse[k] = cosine && k < classes ? a.w.mean_inverse[t * h.ways + first + k] : Real(0);
      scale[k] = count == 0 ? Real(0) : (cosine ? std::fabs(inverse[k]) : Real(1)) / Real(count);
    }
    for (int64_t d = threadIdx.x; d < h.features; d += kHeadThreads) {
      Real p[kSpreadClasses], sums[kSpreadClasses] = {};
      for (int k = 0; k < kSpreadClasses; ++k)
        p[k] = k < classes ? h.means[(t * h.ways + first + k) * h.features + d] : Real(0);
      for (int64_t q = 0; q < h.queries; ++q) {
        if (!a.has_query(t, q)) continue;
        const Real x = h.query[(t * h.queries + q) * h.features + d];
        const Real length = cosine ? std::fabs(a.w.query_inverse[t * h.queries + q]) : Real(0);
        for (int k = 0; k < kSpreadClasses; ++k) {
          if (k >= classes) continue;
          // The projection lets p be taken away, which keeps the digits of small angles where q is not far
          // shorter; of a norm that is a constant there is none.
          const bool less = !cosine || (inverse[k] > 0 && length <= 4 * inverse[k]);
          sums[k] += a.w.weights[(t * h.ways + first + k) * h.queries + q] * (less ? x - p[k] : x);
        }
      }
      for (int k = 0; k < kSpreadClasses; ++k) {
        if (k >= classes) continue;
        if (cosine) {
          a.w.d_means[(t * h.ways + first + k) * h.features + d] = sums[k];
          if (inverse[k] > 0) along[k] += sums[k] * p[k] * inverse[k];
          continue;
        }
        for (int64_t n = 0; n < h.supports; ++n) {
          if (labels[n] == first + k && a.has_sample(t, n))
            h.d_support[(t * h.supports + n) * h.features + d] = scale[k] * sums[k];
        }
      }
      if (first > 0) continue;
      for (int64_t n = 0; n < h.supports; ++n) {
        if (!a.has_sample(t, n)) h.d_support[(t * h.supports + n) * h.features + d] = 0;
      }
    }
    if (!cosine) continue;
    Real projection[kSpreadClasses];
    block_sums(along, of_warps, projection);
    for (int64_t d = threadIdx.x; d < h.features; d += kHeadThreads) {
      for (int k = 0; k < kSpreadClasses; ++k) {
        if (k >= classes) continue;
        const int64_t at = (t * h.ways + first + k) * h.features + d;
        Real sum = a.w.d_means[at];
        if (inverse[k] > 0) sum -= projection[k] * h.means[at] * inverse[k];
        for (int64_t n = 0; n < h.supports; ++n) {
          if (labels[n] == first + k && a.has_sample(t, n))
            h.d_support[(t * h.supports + n) * h.features + d] = scale[k] * sum;
        }
      }
    }
  }
}

}  // namespace metafast::METAFAST_GPU
