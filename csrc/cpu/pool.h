// Runs tasks on several threads. The caller works too and never waits for a helper that has not begun: after
// a pause a helper takes 20 us to 8 ms to wake, and a whole meta-step of a small net takes 50 us.
//
// Which thread runs a task depends on the moment; what a task computes must not. at::get_num_threads()
// decides how many. Safe to call from several threads (a call that finds the pool busy runs alone) and after
// fork (the child makes its own).
#pragma once

#include <cstdint>

namespace metafast::cpu {

// task(context, index, worker) for every index in 0..tasks-1, begun in their order; worker < threads is never
// used by two at a time.
using Task = void (*)(void* context, int64_t index, int worker);
void run_tasks(int64_t tasks, int threads, Task task, void* context);

template <class F>
void run_tasks(int64_t tasks, int threads, F& f) {
  run_tasks(
      tasks, threads,
      [](void* context, int64_t index, int worker) { (*static_cast<F*>(context))(index, worker); }, &f);
}

// As a Team wants it.
void run_parts(int64_t parts, int threads, void (*part)(void* context, int64_t index), void* context);

}  // namespace metafast::cpu
