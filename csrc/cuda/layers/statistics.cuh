// The sums and moments of the norms, in an order that hangs on the sizes alone: a thread's elements in short
// pieces, whose errors stay small, then a tree over the block's threads.
#pragma once

#include <stdexcept>
#include <string>

#include "call.h"

namespace metafast::METAFAST_GPU {

constexpr int kNormThreads = 256;
constexpr int kNormBlocks = 2;  // at least, at a time on a multiprocessor: for more the compiler would spill

// Two sums. What follows has no constructors, so that shared memory can have it; {} is nothing yet.
template <class Real>
struct Sums {
  Real a, b;
  __device__ void merge(const Sums& other) {
    a += other.a;
    b += other.b;
  }
};

// The mean of `count` numbers and the sum of their squared distances from it; put together as by T. Chan,
// G. Golub and R. LeVeque (1983).
template <class Real>
struct Moments {
  Real mean, squares;
  unsigned count;
  __device__ void merge(const Moments& other) {
    if (other.count == 0) return;
    if (count == 0) {
      *this = other;
      return;
    }
    const Real share = Real(other.count) / Real(count + other.count), shift = other.mean - mean;
    mean += share * shift;
    squares += other.squares + Real(count) * share * (shift * shift);
    count += other.count;
  }
  // The variance is biased.
  __device__ Real inverse_deviation(double eps) const {
    return Real(1 / std::sqrt(double(squares / Real(count)) + eps));
  }
};

// Over the elements first, first + step, ... below `end`: a thread's. add(q, sums) adds q's. Whole pieces
// know no end, so that their loads can be on the way together.
template <class Real, class Add>
__device__ Sums<Real> sums_of(unsigned first, unsigned end, unsigned step, const Add& add) {
  constexpr unsigned kPiece = 16;
  Sums<Real> sums{};
  unsigned q = first;
  for (; q + (kPiece - 1) * step < end; q += kPiece * step) {
    Sums<Real> piece{};
#pragma unroll 2
    for (unsigned k = 0; k < kPiece; ++k) add(q + k * step, piece);
    sums.merge(piece);
  }
  Sums<Real> last{};
  for (; q < end; q += step) add(q, last);
  sums.merge(last);
  return sums;
}

// value(q) is q's. Of a piece from its first element, so that the moments of a constant are exact.
template <class Real, class Get>
__device__ Moments<Real> moments_of(unsigned first, unsigned end, unsigned step, const Get& value) {
  constexpr int kPiece = 8;
  Moments<Real> moments{};
  for (unsigned q = first; q < end;) {
    Real x[kPiece], sum = 0, squares = 0;
    unsigned count = 0;
#pragma unroll
    for (int k = 0; k < kPiece; ++k) {
      x[k] = q < end ? value(q) : Real(0);
      if (q < end) ++count, q += step;
    }
#pragma unroll
    for (int k = 1; k < kPiece; ++k) sum += k < int(count) ? x[k] - x[0] : Real(0);
    const Real mean = sum / Real(count);
#pragma unroll
    for (int k = 0; k < kPiece; ++k) {
      const Real centred = (x[k] - x[0]) - mean;
      squares += k < int(count) ? centred * centred : Real(0);
    }
    moments.merge({x[0] + mean, squares, count});
  }
  return moments;
}

// The parts of the threads of each of kLanes columns, thread % kLanes, put together in the first of them and
// in shared[column]; all threads must come.
template <int kLanes, class Part>
__device__ void merge_columns(Part& mine, Part (&shared)[kNormThreads]) {
  const int thread = int(threadIdx.x);
  __syncthreads();  // all have read what is there
  shared[thread] = mine;
  for (int half = kNormThreads / 2; half >= kLanes; half /= 2) {
    __syncthreads();
    if (thread >= half) continue;
    mine.merge(shared[thread + half]);
    shared[thread] = mine;
  }
}

// Divides by a number that is known when a kernel starts, by a product and a shift, exact below 2^31
// (T. Granlund and P. Montgomery, 1994): every element's place takes two divisions.
struct Divider {
  unsigned by, factor, shift = 31;
  explicit Divider(int64_t divisor) : by(unsigned(divisor)) {
    while (int64_t(1) << (shift - 31) < divisor) ++shift;
    factor = unsigned(((uint64_t(1) << shift) + by - 1) / by);
  }
  __device__ unsigned operator()(unsigned q) const { return unsigned(uint64_t(q) * factor >> shift); }
};

// What Divider can count.
inline unsigned counted(int64_t things) {
  if (things < int64_t(1) << 31) return unsigned(things);
  throw std::invalid_argument("norm: expected fewer than 2^31 elements, got " + std::to_string(things));
}

// Samples of h x w things: pixels, windows.
struct Domain {
  unsigned count;  // of all samples
  Divider h, w;
  Domain(int64_t samples, int64_t height, int64_t width)
      : count(counted(samples * height * width)), h(height), w(width) {}
};

struct Place {
  unsigned n, i, j;
  __device__ Place(unsigned sample, unsigned row, unsigned column) : n(sample), i(row), j(column) {}
  __device__ Place(const Domain& domain, unsigned q) {
    const unsigned line = domain.w(q);
    j = q - line * domain.w.by;
    n = domain.h(line);
    i = line - n * domain.h.by;
  }
};

__device__ inline int64_t offset(const Value& value, const Place& at, int64_t channel) {
  return value.origin + at.n * value.sample + at.i * value.row + at.j * value.pixel + channel;
}

}  // namespace metafast::METAFAST_GPU
