#define METAFAST_ISA avx512
#include "prototypes_kernel.h"

namespace metafast::cpu {
const PrototypeTable kPrototypesAvx512{avx512::kPrototypeFunctions<float>,
                                       avx512::kPrototypeFunctions<double>};
}  // namespace metafast::cpu
