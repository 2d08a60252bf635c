#define METAFAST_ISA baseline
#include "inner_update_kernel.h"

namespace metafast::cpu {
const InnerUpdateTable kInnerUpdateBaseline{baseline::inner_update<float>, baseline::inner_update<double>};
}  // namespace metafast::cpu
