#include "fibre.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#include "asan.h"

// Pushes the callee-saved registers, leaves the stack pointer in *from, and goes on where `to` was left.
extern "C" __attribute__((visibility("hidden"))) void emulator_switch(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
constexpr size_t kSaved = 8, kReturn = 6;  // words: the registers, the return address, one to align the stack
#elif defined(__aarch64__)
asm(R"(
.text
.type emulator_switch, %function
emulator_switch:
  stp x29, x30, [sp, #-160]!
  stp x19, x20, [sp, #16]
  stp x21, x22, [sp, #32]
  stp x23, x24, [sp, #48]
  stp x25, x26, [sp, #64]
  stp x27, x28, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #16]
  ldp x21, x22, [sp, #32]
  ldp x23, x24, [sp, #48]
  ldp x25, x26, [sp, #64]
  ldp x27, x28, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x29, x30, [sp], #160
  ret
.size emulator_switch, .-emulator_switch
)");
constexpr size_t kSaved = 20, kReturn = 1;
#else
#error "the emulator's switch is written for x86-64 and 64-bit ARM"
#endif

namespace emulator {
namespace {

// The one that resumes: where it stands, and its stack.
void* resumer = nullptr;
const void* resumer_stack = nullptr;
size_t resumer_bytes = 0;
Fibre* entering = nullptr;

}  // namespace

void Fibre::prepare(std::byte* stack, size_t bytes, void (*run)(void*), void* argument) {
  run_ = run, argument_ = argument, stack_ = stack, bytes_ = bytes;
  auto* const saved = reinterpret_cast<void**>(stack + bytes) - kSaved;
  for (size_t i = 0; i < kSaved; ++i) saved[i] = nullptr;
  saved[kReturn] = reinterpret_cast<void*>(&Fibre::enter);
  stopped_at_ = saved;
}

void Fibre::enter() {
  Fibre* const self = entering;
  asan::arrive(nullptr, &resumer_stack, &resumer_bytes);
  self->run_(self->argument_);
}

void Fibre::resume() {
  void* mine = nullptr;
  entering = this;
  asan::leave(&mine, stack_, bytes_);
  emulator_switch(&resumer, stopped_at_);
  asan::arrive(mine, nullptr, nullptr);
}

void Fibre::suspend() {
  asan::leave(&fake_stack_, resumer_stack, resumer_bytes);
  emulator_switch(&stopped_at_, resumer);
  asan::arrive(fake_stack_, &resumer_stack, &resumer_bytes);
}

Stacks::Stacks(size_t count, size_t bytes) : stride_(bytes + kGuard), total_(count * stride_) {
  void* const memory =
      mmap(nullptr, total_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<std::byte*>(memory);
  for (size_t i = 0; i < count; ++i) {
    if (mprotect(memory_ + i * stride_, kGuard, PROT_NONE) != 0) throw std::bad_alloc();
  }
}

}  // namespace emulator
