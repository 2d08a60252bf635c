#define METAFAST_ISA baseline
#include "unroll.h"

namespace metafast::cpu {
const EngineTable kEngineBaseline{baseline::kEngineFunctions<float>, baseline::kEngineFunctions<double>};
}  // namespace metafast::cpu
