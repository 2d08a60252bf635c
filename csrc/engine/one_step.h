// Which layers cpu/one_step.h does without weights of tasks' own.
#pragma once

#include <cstdint>

#include "program.h"

namespace metafast {

// Whether a linear layer's weights after one step are better left as a sum of a matrix that all tasks share
// and a thin one, with so many support and query samples: three products with thin matrices against three
// more with matrices of a task's own and the passes over these, counted in multiplications. Always inlined,
// as functions that were left would be merged by the linker between instruction sets.
[[gnu::always_inline]] inline bool is_wide(const Program& program, const Layer& l, int64_t supports,
                                           int64_t queries) {
  constexpr int64_t kPasses = 11, kVector = 8;
  if (l.kind != Kind::linear) return false;
  const int64_t inputs = program.values[l.in].c, outputs = program.values[l.out].c;
  const int64_t thin = 3 * queries * ((supports + kVector - 1) / kVector * kVector) * (inputs + outputs);
  return thin <= (3 * supports + kPasses) * inputs * outputs;
}

}  // namespace metafast
