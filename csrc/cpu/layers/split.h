// A loop whose iterations a team of threads shares, where one task has several (cpu/team.h). What an
// iteration gives must not depend on which others run with it: then the bits are the same for any number of
// threads.
#pragma once

#ifndef METAFAST_ISA
#error "define METAFAST_ISA, the instruction set's namespace, before including a kernel"
#endif

#include <algorithm>
#include <cstdint>

#include "../team.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// Multiplications and additions below which handing out parts costs more than it saves: a few microseconds.
constexpr double kWorthSplitting = 2e5;

// One copy of the loop for all callers: two that the compiler inlines may contract a b + c d differently, and
// a part would not have the bits of the whole.
#if defined(__clang__)
#define METAFAST_ONE_COPY __attribute__((noinline))
#else
#define METAFAST_ONE_COPY __attribute__((noinline, noclone))
#endif
template <class F>
METAFAST_ONE_COPY void run_range(const F& f, int64_t begin, int64_t end) {
  f(begin, end);
}
#undef METAFAST_ONE_COPY

// f(begin, end) over ranges that together are 0..count. `work`: operations of all iterations, roughly.
template <class F>
inline void in_parts(const Team* team, int64_t count, double work, const F& f) {
  if (team == nullptr || count < 2 || work < kWorthSplitting) {
    run_range(f, 0, count);
    return;
  }
  struct Loop {
    const F& f;
    int64_t count, parts;
  };
  // Two for each thread, as one may come late.
  Loop loop{f, count, std::min<int64_t>(count, 2 * team->threads)};
  team->run(
      loop.parts, team->threads,
      [](void* context, int64_t part) {
        const Loop& l = *static_cast<const Loop*>(context);
        run_range(l.f, l.count * part / l.parts, l.count * (part + 1) / l.parts);
      },
      &loop);
}

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
