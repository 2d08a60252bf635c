#define METAFAST_ISA avx512
#include "unroll.h"

namespace metafast::cpu {
const EngineTable kEngineAvx512{avx512::kEngineFunctions<float>, avx512::kEngineFunctions<double>};
}  // namespace metafast::cpu
