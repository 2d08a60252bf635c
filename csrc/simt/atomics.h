// CUDA's atomics: one thread runs at a time, so they are the plain operations; accesses.h is told.
#pragma once

#include <algorithm>
#include <type_traits>

#include "emulator.h"

namespace emulator {

class Atomic {
 public:
  Atomic() { set(true); }
  ~Atomic() { set(false); }
  Atomic(const Atomic&) = delete;

 private:
  static void set(bool on) {
    asm volatile("" ::: "memory");  // no access moves out
    running.thread->atomic = on;
    asm volatile("" ::: "memory");
  }
};

// *address = change(*address); what was there before.
template <class T, class Change>
T atomically(T* address, const Change& change) {
  const Atomic mark;
  const T before = *address;
  *address = change(before);
  return before;
}

}  // namespace emulator

// clang-format off
#define EMULATOR_ATOMIC(name, expression)                                                                       \
  template <class T> T name(T* address, std::type_identity_t<T> value) {                                        \
    return emulator::atomically(address, [&](T old) { return T(expression); });                                 \
  }
EMULATOR_ATOMIC(atomicAdd, old + value)
EMULATOR_ATOMIC(atomicSub, old - value)
EMULATOR_ATOMIC(atomicMin, std::min(old, value))
EMULATOR_ATOMIC(atomicMax, std::max(old, value))
EMULATOR_ATOMIC(atomicAnd, old & value)
EMULATOR_ATOMIC(atomicOr, old | value)
EMULATOR_ATOMIC(atomicXor, old ^ value)
EMULATOR_ATOMIC(atomicExch, (void(old), value))
EMULATOR_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
EMULATOR_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef EMULATOR_ATOMIC
// clang-format on

template <class T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  return emulator::atomically(address, [&](T old) { return old == compare ? value : old; });
}
