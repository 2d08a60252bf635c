// How kernels are started that go round their loops of blocks and of tasks, as elements.cuh's do, and what
// several layers start.
#pragma once

#include <algorithm>

#include "../launch.h"
#include "elements.cuh"

namespace metafast::METAFAST_GPU {

// kernel(args...) in `blocks` blocks for each task.
template <class... Params, class... Args>
void launch_blocks(const char* name, void (*kernel)(Params...), int64_t tasks, int64_t blocks, int threads,
                   CUstream_st* stream, const Args&... args) {
  if (tasks == 0 || blocks == 0) return;  // CUDA refuses an empty grid
  constexpr int64_t kMostBlocks = 65535;  // more go round the kernel's loop
  const dim3 grid(unsigned(std::min(blocks, kMostBlocks)), unsigned(std::min(tasks, kMostTasks)));
  launch(name, kernel, grid, dim3(unsigned(threads)), 0, stream, args...);
}

// kernel(args...) for `count` elements of each task.
template <class... Params, class... Args>
void launch_elements(const char* name, void (*kernel)(Params...), int64_t tasks, int64_t count,
                     CUstream_st* stream, const Args&... args) {
  launch_blocks(name, kernel, tasks, (count + kElementThreads - 1) / kElementThreads, kElementThreads, stream,
                args...);
}

// kernel(e, args...).
template <class... Params, class... Args>
void launch_elements(const char* name, void (*kernel)(Params...), const Elements& e, CUstream_st* stream,
                     const Args&... args) {
  launch_elements(name, kernel, e.tasks, e.rows * e.count, stream, e, args...);
}

// Zeros in all lanes of ty, the outputs' tangent of a layer whose input has none.
template <class Real>
void clear_output_tangent(const char* name, const Call<Real>& c, CUstream_st* stream) {
  launch_elements(name, clear_kernel<Real>, Elements(c.out, c.out, c.tasks, c.samples), stream, c.ty);
}

}  // namespace metafast::METAFAST_GPU
