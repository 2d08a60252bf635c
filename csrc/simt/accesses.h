// Watches every access of a kernel to memory. The kernel's file is compiled with -fsanitize=thread, which
// puts a call before each access, and instead of ThreadSanitizer's library these calls reach accesses.cpp. It
// fails on a read of shared memory that nobody wrote, on shared memory outside its arrays, and on two
// accesses to the same bytes, one of them a write, that nothing orders. What orders two threads' accesses:
//
//   of one block   a barrier of the block between; __syncwarp of one warp; both are atomic
//   of two blocks  both are atomic
//
// So a block may not read what another wrote in the same launch, even behind __threadfence.
#pragma once

#include <string>

namespace emulator::accesses {

void begin_launch();

// Who wrote there in the latest launch, "thread ... wrote it"; empty: nobody, or it was not watched.
std::string writer_of(const void* address);

}  // namespace emulator::accesses
