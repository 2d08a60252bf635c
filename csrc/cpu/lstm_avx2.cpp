#define METAFAST_ISA avx2
#include "lstm_kernel.h"

namespace metafast::cpu {
const LstmTable kLstmAvx2{avx2::kLstmFunctions<float>, avx2::kLstmFunctions<double>};
}  // namespace metafast::cpu
