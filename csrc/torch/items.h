// Work on torch's own threads, not the pool of the engine: torch's operations around an operator leave them
// spinning for milliseconds, on the cores that a pool would want.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <vector>

namespace metafast {

// run(item, worker) for every item below `items`. A worker begins with its own range, the same in every call,
// whose memory its core may still have; who is done helps the others.
template <class Run>
void for_each_item(int64_t items, int64_t threads, const Run& run) {
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Range> ranges(static_cast<size_t>(threads));
  for (int64_t r = 0; r < threads; ++r) {
    ranges[size_t(r)].next = r * items / threads;
    ranges[size_t(r)].end = (r + 1) * items / threads;
  }
  at::parallel_for(0, threads, 1, [&](int64_t worker, int64_t) {
    for (int64_t r = 0; r < threads; ++r) {
      Range& range = ranges[size_t((worker + r) % threads)];
      for (int64_t item = range.next++; item < range.end; item = range.next++) run(item, worker);
    }
  });
}

}  // namespace metafast
