#define METAFAST_ISA avx512
#include "inner_update_kernel.h"

namespace metafast::cpu {
const InnerUpdateTable kInnerUpdateAvx512{avx512::inner_update<float>, avx512::inner_update<double>};
}  // namespace metafast::cpu
