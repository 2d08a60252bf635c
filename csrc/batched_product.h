// What crosses to a library's strided batched matrix product, which may stand in for our tiled kernel on
// CUDA (cuda/layers/conv.cu): no torch in here.
//
//   out[t] = a[t] b[t], or with `accumulate` out[t] += a[t] b[t]
//
// Letters: T tasks. Element (i, j) of task t's matrix lies at first + t * task + i * row + j * column.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace metafast {

template <class T>
struct StridedMatrices {
  T* first;
  int64_t task;         // 0: all tasks have the same one
  int64_t row, column;  // one of them is 1, the other at least as long as what it steps over
};

template <class Real>
struct BatchedProduct {
  int64_t tasks, rows, columns, depth;  // T, and of a (rows, depth), b (depth, columns), out (rows, columns)
  StridedMatrices<const Real> a, b;
  StridedMatrices<Real> out;  // overlaps no factor
  bool accumulate;            // else out is overwritten, whatever it holds
};

// The fewest multiply-adds, of all tasks together, with which a library's product is thought worth it. Beside
// our one launch it costs up to two more (biases, ReLUs and padding are kernels of their own), 2.5 us each by
// benchmarks/gpu.md, and some microseconds of the host. 2^27 of them take 4 us at an H100's 67 TFLOP/s in
// float32, 12 us at a third of that: from there on what a better product saves can pay. On paper; nobody has
// measured it.
constexpr int64_t kFewestBatchedProduct = int64_t(1) << 27;

// Starts the product on the stream of the current device and waits for nothing.
template <class Real>
using BatchedProductFunction = void (*)(const BatchedProduct<Real>&, CUstream_st*);

template <class Real>
struct BatchedProducts {
  BatchedProductFunction<Real> function = nullptr;  // null: our own tiled kernel does them all
  int64_t fewest = kFewestBatchedProduct;
};

}  // namespace metafast
