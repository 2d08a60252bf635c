#define METAFAST_ISA avx2
#include "prototypes_kernel.h"

namespace metafast::cpu {
const PrototypeTable kPrototypesAvx2{avx2::kPrototypeFunctions<float>, avx2::kPrototypeFunctions<double>};
}  // namespace metafast::cpu
