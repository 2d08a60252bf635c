// How one task is the work of several threads, where there are fewer tasks than threads: kernels cut what
// they give into parts (layers/split.h), of which a thread that is free takes the next. Plain, so that the
// torch side fills it in and the instruction sets' files call nothing outside of them.
#pragma once

#include <cstdint>

namespace metafast::cpu {

struct Team {
  int threads;
  // part(context, i) once for each i in 0..parts-1, on any threads; returns when all are done.
  void (*run)(int64_t parts, int threads, void (*part)(void* context, int64_t index), void* context);
};

}  // namespace metafast::cpu
