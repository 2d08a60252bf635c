#define METAFAST_ISA avx2
#include "unroll.h"

namespace metafast::cpu {
const EngineTable kEngineAvx2{avx2::kEngineFunctions<float>, avx2::kEngineFunctions<double>};
}  // namespace metafast::cpu
