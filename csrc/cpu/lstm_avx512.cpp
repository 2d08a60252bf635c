#define METAFAST_ISA avx512
#include "lstm_kernel.h"

namespace metafast::cpu {
const LstmTable kLstmAvx512{avx512::kLstmFunctions<float>, avx512::kLstmFunctions<double>};
}  // namespace metafast::cpu
