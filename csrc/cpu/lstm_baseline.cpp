#define METAFAST_ISA baseline
#include "lstm_kernel.h"

namespace metafast::cpu {
const LstmTable kLstmBaseline{baseline::kLstmFunctions<float>, baseline::kLstmFunctions<double>};
}  // namespace metafast::cpu
