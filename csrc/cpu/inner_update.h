// The CPU kernels of inner_update, a table per instruction set. See isa.h.
#pragma once

#include "../inner_update.h"

namespace metafast::cpu {

struct InnerUpdateTable {
  // Elements [begin, end) of the T * P, in row-major order; any split gives the same bits.
  void (*float32)(const InnerUpdate<float>&, int64_t begin, int64_t end);
  void (*float64)(const InnerUpdate<double>&, int64_t begin, int64_t end);
};

extern const InnerUpdateTable kInnerUpdateBaseline, kInnerUpdateAvx2, kInnerUpdateAvx512;

}  // namespace metafast::cpu
