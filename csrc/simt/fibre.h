// Fibres: functions that stop in the middle and go on later, all on one thread of the system. A switch saves
// what the ABI has the callee save, some nanoseconds; swapcontext would make two system calls.
#pragma once

#include <cstddef>

namespace emulator {

class Fibre {
 public:
  // Has the fibre call run(argument), which never returns, on that stack at its first resume.
  void prepare(std::byte* stack, size_t bytes, void (*run)(void*), void* argument);

  // Runs the fibre until it suspends itself. Not from within a fibre.
  void resume();

  // Back to resume's caller. No exception may leave a fibre.
  void suspend();

 private:
  static void enter();

  void (*run_)(void*) = nullptr;
  void* argument_ = nullptr;
  void* stopped_at_ = nullptr;  // its stack pointer
  std::byte* stack_ = nullptr;
  size_t bytes_ = 0;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
};

// `count` stacks of `bytes` each (multiples of a page) side by side, with a page between that may not be
// touched: an overflow ends the process. Never freed.
class Stacks {
 public:
  Stacks(size_t count, size_t bytes);
  std::byte* operator[](size_t i) const { return memory_ + i * stride_ + kGuard; }
  bool hold(const void* address) const {
    return size_t(static_cast<const std::byte*>(address) - memory_) < total_;
  }

 private:
  static constexpr size_t kGuard = 65536;  // the largest page
  size_t stride_, total_;
  std::byte* memory_;
};

}  // namespace emulator
