#pragma once

#ifndef METAFAST_ISA
#error "define METAFAST_ISA, the instruction set's namespace, before including a kernel"
#endif

#include "../engine/program.h"

namespace metafast::cpu {
namespace METAFAST_ISA {

// Hands out a workspace in whole vectors; with none it only counts.
template <class Real>
class Carver {
 public:
  explicit Carver(Real* workspace) : workspace_(workspace) {}
  Real* take(int64_t count) {
    constexpr int64_t kVector = kVectorBytes / int64_t(sizeof(Real));
    Real* const at = workspace_ == nullptr ? nullptr : workspace_ + size_;
    size_ += (count + kVector - 1) / kVector * kVector;
    return at;
  }
  int64_t size() const { return size_; }

 private:
  Real* workspace_;
  int64_t size_ = 0;
};

}  // namespace METAFAST_ISA
}  // namespace metafast::cpu
