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

// The fewest multiply-adds, of all tasks together, with which a library's product is worth it: it costs a
// launch more (biases, ReLUs and padding follow in a kernel of their own) and the library's way on the host,
// some 10 us on an H100 together. 2^27 of them are 4 us at the data sheet's 67 TFLOP/s in float32, of which
// no product as small gets half. An estimate on paper: nobody has measured it (benchmarks/gpu.md).
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
