// What the emulator's own files share: the launch and the block that run.
#pragma once

#include <string>

#include "emulator.h"
#include "shared.h"

namespace emulator {

struct Launch {
  const char* name = "";
  const std::function<void()>* body = nullptr;
  uint64_t blocks = 0;
  unsigned threads = 0;  // of a block
  size_t most_shared = 0;
  unsigned order = 0;
  uint64_t first_serial = 0;  // blocks are numbered through all launches, in the order they run
  uint64_t serial = 0;        // the block's that runs
  unsigned barriers = 0;      // that the block has passed
  unsigned at_barrier = 0;    // threads that wait at the next
  unsigned votes = 0;         // of them, those that brought a number other than 0
  Thread* first_there = nullptr;
  std::string failure{};  // empty: none so far
};

extern Launch now;
extern Shared shared;

// The index of the block that runs `position`-th.
uint3 block_at(uint64_t position);

// Memory of the emulator's: the threads' stacks and what it knows of them.
bool is_own(const void* address);

std::string text_of(uint3 index);        // (x, y, z)
std::string thread_text(unsigned rank);  // thread (x, y, z)
std::string text_of(const Wait& wait);   // the call and its line

}  // namespace emulator
