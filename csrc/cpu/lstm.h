// The CPU kernels of lstm_update, a table per instruction set. See isa.h.
#pragma once

#include "../lstm.h"

namespace metafast::cpu {

template <class Real>
struct LstmFunctions {
  // Elements of a thread's workspace, which may hold anything, or where `used` what the same function left
  // there for other blocks of the same Lstm.
  int64_t (*workspace)(const Lstm<Real>&, bool backward);
  // Blocks [begin, end) of coordinates.
  void (*forward)(const Lstm<Real>&, int64_t begin, int64_t end, Real* workspace, bool used);
  // The same, and d_weights, all of them in a row, of these blocks; overwrites.
  void (*backward)(const Lstm<Real>&, int64_t begin, int64_t end, Real* d_weights, Real* workspace,
                   bool used);
};

struct LstmTable {
  LstmFunctions<float> float32;
  LstmFunctions<double> float64;
};

extern const LstmTable kLstmBaseline, kLstmAvx2, kLstmAvx512;

}  // namespace metafast::cpu
