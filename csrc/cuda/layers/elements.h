// How a layer's kernels are started in which a thread has an element at a time, and what several layers
// start.
#pragma once

#include <algorithm>

#include "../launch.h"
#include "elements.cuh"

namespace metafast::METAFAST_GPU {

// A grid for kernels whose block's y is the task and whose x is `count` elements of each; of both, more go
// round the kernel's loop.
struct ElementGrid {
  static constexpr int64_t kThreads = 256, kMostBlocks = 65535, kMostTasks = 65535;
  dim3 grid, block;
  bool empty;  // CUDA refuses an empty grid
  ElementGrid(int64_t tasks, int64_t count)
      : grid(unsigned(std::min((count + kThreads - 1) / kThreads, kMostBlocks)),
             unsigned(std::min(tasks, kMostTasks))),
        block(unsigned(kThreads)),
        empty(tasks == 0 || count == 0) {}
};

// kernel(e, args...).
template <class... Params, class... Args>
void launch_elements(const char* name, void (*kernel)(Params...), const Elements& e, CUstream_st* stream,
                     const Args&... args) {
  const ElementGrid g(e.tasks, e.rows * e.count);
  if (!g.empty) launch(name, kernel, g.grid, g.block, 0, stream, e, args...);
}

// Zeros in all lanes of y, the outputs' tangent of a layer whose input has none.
template <class Real>
void clear_output(const char* name, const Call<Real>& c, CUstream_st* stream) {
  launch_elements(name, clear_kernel<Real>, Elements(c.out, c.out, c.tasks, c.samples), stream, c.ty);
}

}  // namespace metafast::METAFAST_GPU
