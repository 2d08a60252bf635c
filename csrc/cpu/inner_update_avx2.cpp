#define METAFAST_ISA avx2
#include "inner_update_kernel.h"

namespace metafast::cpu {
const InnerUpdateTable kInnerUpdateAvx2{avx2::inner_update<float>, avx2::inner_update<double>};
}  // namespace metafast::cpu
