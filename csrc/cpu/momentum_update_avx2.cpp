#define METAFAST_ISA avx2
#include "momentum_update_kernel.h"

namespace metafast::cpu {
const MomentumUpdateTable kMomentumUpdateAvx2{avx2::momentum_update<float>, avx2::momentum_update<double>};
}  // namespace metafast::cpu
