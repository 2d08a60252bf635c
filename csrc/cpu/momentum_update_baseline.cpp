#define METAFAST_ISA baseline
#include "momentum_update_kernel.h"

namespace metafast::cpu {
const MomentumUpdateTable kMomentumUpdateBaseline{baseline::momentum_update<float>,
                                                  baseline::momentum_update<double>};
}  // namespace metafast::cpu
