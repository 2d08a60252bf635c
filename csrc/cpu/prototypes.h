// The CPU kernels of the prototype head, a table per instruction set. See isa.h.
#pragma once

#include "../prototypes.h"

namespace metafast::cpu {

template <class Real>
struct PrototypeFunctions {
  // Elements of a thread's workspace, which may hold anything (`at_once`: for gradients), and of a part's row
  // of d_means.
  int64_t (*workspace)(const PrototypeHead<Real>&, bool at_once);
  int64_t (*d_means)(const PrototypeHead<Real>&);
  // Part `part` of task `task`; all of them in any order.
  void (*forward)(const PrototypeHead<Real>&, int64_t task, int64_t part, Real* workspace);
  void (*backward)(const PrototypeHead<Real>&, int64_t task, int64_t part, Real* workspace);
  // Both of losses alone: sums, and the embeddings' cotangents for d_sums, which are known; means with
  // several parts. Needs neither logits nor residual.
  void (*gradients)(const PrototypeHead<Real>&, int64_t task, int64_t part, Real* workspace);
  // After all parts of a task, where there are several: d_support from d_means.
  void (*finish)(const PrototypeHead<Real>&, int64_t task, Real* workspace);
};

struct PrototypeTable {
  PrototypeFunctions<float> float32;
  PrototypeFunctions<double> float64;
};

extern const PrototypeTable kPrototypesBaseline, kPrototypesAvx2, kPrototypesAvx512;

}  // namespace metafast::cpu
