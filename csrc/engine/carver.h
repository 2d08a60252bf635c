// Hands out scratch memory, to the CPU's tasks and to the launchers on a device alike.
#pragma once

#include "program.h"

namespace metafast {

// In whole vectors; with no memory it only counts. Always inlined: functions that were left would be merged
// by the linker between instruction sets.
template <class Real>
class Carver {
 public:
  [[gnu::always_inline]] explicit Carver(Real* memory) : memory_(memory) {}
  [[gnu::always_inline]] static int64_t whole(int64_t count) {
    constexpr int64_t kVector = kVectorBytes / int64_t(sizeof(Real));
    return (count + kVector - 1) / kVector * kVector;
  }
  [[gnu::always_inline]] Real* take(int64_t count) {
    Real* const at = memory_ == nullptr ? nullptr : memory_ + size_;
    size_ += whole(count);
    return at;
  }
  [[gnu::always_inline]] int64_t size() const { return size_; }

 private:
  Real* memory_;
  int64_t size_ = 0;
};

}  // namespace metafast
