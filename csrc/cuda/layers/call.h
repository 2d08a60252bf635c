// What a layer's four functions get on CUDA, for all tasks at once: the same functions, of the same values in
// the same places (engine/program.h), as cpu/layers/call.h gives for one task.
//
//   fwd    y   = f(x, w)                                     may keep things in `saved` for the other three
//   bwd    dx, dw   = vjp of f at (x, w) on dy               after fwd; may keep more in `saved`
//   tfwd   ty  = jvp of f at (x, w) on (tx, tw)              after fwd; may keep things in `tsaved`
//   tbwd   tdx, tdw = derivative of bwd along (tx, tw, tdy)  after fwd, bwd and tfwd
//
// Each starts kernels on the stream, for all tasks in one launch, and waits for nothing. What is null, what
// is overwritten and what the padding holds is as on the CPU: no border is written, lanes C..pixel-1 of
// values and tangents are finite, those of adjoints (dx, tdx) and of parameters' gradients (dw, tdw) written
// as zeros. `saved` and `tsaved` have saved_per_sample * N + saved_per_layer elements for each task, scratch
// what Plan says. The bits hang neither on the order of blocks nor of threads: sums go in a fixed order, by
// one thread or a fixed tree, never by atomics.
#pragma once

#include <type_traits>

#include "../../batched_product.h"
#include "../../engine/program.h"
#include "../gpu.h"

struct CUstream_st;

namespace metafast::METAFAST_GPU {

// A buffer of each task, `task` elements from one to the next; 0: all tasks have the same.
template <class T>
struct Batch {
  T* first = nullptr;
  int64_t task = 0;

  __device__ __host__ T* of(int64_t t) const { return first + t * task; }
  __device__ __host__ bool null() const { return first == nullptr; }
  __device__ __host__ Batch operator+(int64_t elements) const { return {first + elements, task}; }
  // To Batch<const T>; a template, since nvcc warns of a conversion of a class to itself.
  template <class To>
    requires std::is_same_v<To, const T>
  __device__ __host__ operator Batch<To>() const {
    return {first, task};
  }
};

// By value, as a kernel takes it.
template <class Real>
struct Call {
  using In = Batch<const Real>;
  using Out = Batch<Real>;

  Layer layer;             // its `reads` is the host's memory: not for kernels
  Value in;                // of x, tx, dx, tdx
  Value in1;               // of x1, tx1, dx1, tdx1, in add alone
  Value out;               // of y, ty, dy, tdy
  int64_t tasks, samples;  // T, N
  In w, tw;
  Out dw, tdw;
  In x, x1, tx, tx1;
  Out y, ty;
  In dy, tdy;
  Out dx, dx1, tdx, tdx1;
  Out saved, tsaved, scratch;
  BatchedProducts<Real> products;  // the host's: not for kernels
};

// A layer's row in the kernel table: what is missing does not compile.
template <class Real>
struct LayerFunctions {
  using Function = void (*)(const Call<Real>&, CUstream_st*);
  Function fwd, bwd, tfwd, tbwd;
  constexpr LayerFunctions(Function f, Function b, Function tf, Function tb)
      : fwd(f), bwd(b), tfwd(tf), tbwd(tb) {}
};

}  // namespace metafast::METAFAST_GPU
