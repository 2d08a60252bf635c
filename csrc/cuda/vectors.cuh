// What a meta-step does to vectors of all tasks besides the layers: a thread has an element, and what it does
// with it is one of these. All overwrite unless they say so. Tested through the meta-step, by tests/engine/
// and tests/test_inner_options.py.
#pragma once

#include "layers/elements.cuh"

namespace metafast::METAFAST_GPU {

// f(task, at) for all elements at < count of all tasks.
template <class F>
__global__ void __launch_bounds__(kElementThreads, 1) vector_kernel(int64_t tasks, int64_t count, const F f) {
  for_each_element(tasks, count, f);
}

template <class Real>
struct Fill {
  Real value;
  Batch<Real> to;
  __device__ void operator()(int64_t t, int64_t i) const { to.of(t)[i] = value; }
};

// In place: by factor.
template <class Real>
struct Scale {
  Real factor;
  Batch<Real> to;
  __device__ void operator()(int64_t t, int64_t i) const { to.of(t)[i] *= factor; }
};

// to = from + factor * more; `to` may be `from`. Where `more` is null it is `from`.
template <class Real>
struct AddScaled {
  Batch<const Real> from, more;
  Real factor;
  Batch<Real> to;
  __device__ void operator()(int64_t t, int64_t i) const {
    const Real one = from.null() ? Real(0) : from.of(t)[i];
    to.of(t)[i] = more.null() ? one : one + factor * more.of(t)[i];
  }
};

// Parameters in the engine's order from the user's; null constants are zeros.
template <class Real>
struct ToEngine {
  const int64_t* source;
  int64_t adapting;
  Batch<const Real> user;
  const Real* constants;
  Batch<Real> w;
  __device__ void operator()(int64_t t, int64_t i) const {
    const int64_t from = source[i];
    w.of(t)[i] = from < 0               ? Real(0)
                 : from < adapting      ? user.of(t)[from]
                 : constants != nullptr ? constants[from - adapting]
                                        : Real(0);
  }
};

// to[place[i]] = factor * w[i], for those i whose place is one of `count`; the others stay.
template <class Real>
struct Scatter {
  const int64_t* place;
  int64_t count;
  Real factor;
  Batch<const Real> w;
  Batch<Real> to;
  __device__ void operator()(int64_t t, int64_t i) const {
    const int64_t at = place[i];
    if (at >= 0 && at < count) to.of(t)[at] = factor * w.of(t)[i];
  }
};

// to = from + factor * coordinates[place[i]], `from` where i has no place; null: 0.
template <class Real>
struct Gather {
  const int64_t* place;
  int64_t count;
  Real factor;
  Batch<const Real> from, coordinates;
  Batch<Real> to;
  __device__ void operator()(int64_t t, int64_t i) const {
    const int64_t at = place[i];
    const Real one = from.null() ? Real(0) : from.of(t)[i];
    to.of(t)[i] = at >= 0 && at < count ? one + factor * coordinates.of(t)[at] : one;
  }
};

// to = from + sign * rates * x, where `from` may be null: 0.
template <class Real>
struct Rated {
  const Real* rates;
  Real sign;
  Batch<const Real> from, x;
  Batch<Real> to;
  __device__ void operator()(int64_t t, int64_t i) const {
    const Real one = from.null() ? Real(0) : from.of(t)[i];
    to.of(t)[i] = one + sign * rates[i] * x.of(t)[i];
  }
};

// The rates' gradient: -lam g, or added to what is there.
template <class Real>
struct RateGradient {
  Batch<const Real> lam, g;
  bool begins;
  Batch<Real> to;
  __device__ void operator()(int64_t t, int64_t i) const {
    const Real part = -lam.of(t)[i] * g.of(t)[i];
    to.of(t)[i] = begins ? part : to.of(t)[i] + part;
  }
};

// `first` elements of a, then those of b; and back.
template <class Real>
struct Join {
  int64_t first;
  Batch<const Real> a, b;
  Batch<Real> to;
  __device__ void operator()(int64_t t, int64_t i) const {
    to.of(t)[i] = i < first ? a.of(t)[i] : b.of(t)[i - first];
  }
};
template <class Real>
struct Split {
  int64_t first;
  Batch<const Real> from;
  Batch<Real> a, b;
  __device__ void operator()(int64_t t, int64_t i) const {
    (i < first ? a.of(t)[i] : b.of(t)[i - first]) = from.of(t)[i];
  }
};

// A task's mean of `parts` sums, which lie a task beside the next; count is 1.
template <class Real>
struct MeanOfParts {
  const double* sums;
  int64_t parts, tasks, of;
  Real* to;
  __device__ void operator()(int64_t t, int64_t) const {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += sums[part * tasks + t];
    to[t] = Real(sum / double(of));
  }
};

// The start (rows, H) of the LSTM's states (rows, M, H), the same for every coordinate; and the sums of their
// cotangents over the coordinates, in order, (rows, H).
template <class Real>
struct Spread {
  int64_t coordinates, hidden;
  const Real* start;  // null: zeros
  Batch<Real> to;
  __device__ void operator()(int64_t t, int64_t i) const {
    const int64_t row = i / (coordinates * hidden);
    to.of(t)[i] = start == nullptr ? Real(0) : start[row * hidden + i % hidden];
  }
};
template <class Real>
struct Gathered {
  int64_t coordinates, hidden;
  Batch<const Real> from;
  Batch<Real> to;
  __device__ void operator()(int64_t t, int64_t i) const {
    const Real* const x = from.of(t) + i / hidden * coordinates * hidden + i % hidden;
    Real sum = 0;
    for (int64_t n = 0; n < coordinates; ++n) sum += x[n * hidden];
    to.of(t)[i] = sum;
  }
};

}  // namespace metafast::METAFAST_GPU
