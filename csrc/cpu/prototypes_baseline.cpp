#define METAFAST_ISA baseline
#include "prototypes_kernel.h"

namespace metafast::cpu {
const PrototypeTable kPrototypesBaseline{baseline::kPrototypeFunctions<float>,
                                         baseline::kPrototypeFunctions<double>};
}  // namespace metafast::cpu
