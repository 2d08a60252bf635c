// The CPU kernels of momentum_update, a table per instruction set. See isa.h.
#pragma once

#include "../momentum_update.h"

namespace metafast::cpu {

struct MomentumUpdateTable {
  // Elements [begin, end) of the T * P; any split gives the same bits.
  void (*float32)(const MomentumUpdate<float>&, int64_t begin, int64_t end);
  void (*float64)(const MomentumUpdate<double>&, int64_t begin, int64_t end);
};

extern const MomentumUpdateTable kMomentumUpdateBaseline, kMomentumUpdateAvx2, kMomentumUpdateAvx512;

}  // namespace metafast::cpu
