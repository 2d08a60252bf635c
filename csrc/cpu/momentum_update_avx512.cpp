#define METAFAST_ISA avx512
#include "momentum_update_kernel.h"

namespace metafast::cpu {
const MomentumUpdateTable kMomentumUpdateAvx512{avx512::momentum_update<float>,
                                                avx512::momentum_update<double>};
}  // namespace metafast::cpu
