// An emulator of CUDA's execution model: kernels, the very headers that nvcc compiles, run on the CPU, a
// fibre a thread, and what CUDA leaves undefined is an error that names kernel, block and thread. For tests:
// it is thorough, not fast, and not part of what ships. What a kernel sees of it is in cuda_runtime.h.
//
// A block's threads run one at a time, each until it waits (a barrier, a warp's collective) or leaves; blocks
// run one after another. In what order is a number, set_order: a kernel's results must not depend on it. So
// found are:
//
//   a barrier or collective that some never reach   launch, at once or when nobody can go on
//   a shuffle from a lane that is not there         at the shuffle
//   a launch over the hardware's limits             launch
//   results that depend on the order of threads     compare the orders' results (orders.h)
//   reads of shared memory that nobody wrote        the same: each order fills it with another pattern;
//                                                   or at the read (accesses.h)
//   unordered access to the same memory             at the access (accesses.h)
//   access out of bounds                            AddressSanitizer; its report is followed by the names
//
// accesses.h needs kernels compiled with -fsanitize=thread, which excludes AddressSanitizer: two builds.
//
// Not emulated: what needs blocks or threads to run at the same time (spinning on memory), streams that
// overlap, other memory spaces, and the speed of anything.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>

#include "fibre.h"
#include "vectors.h"

namespace emulator {

using Site = std::source_location;

constexpr unsigned kWarp = 32;
constexpr unsigned kMostThreads = 1024;
constexpr unsigned kOrders = 4;  // that tests try: ascending, descending, two random ones

// What threads wait for: all of the block, or the lanes of a mask, at the same call.
struct Wait {
  const char* call = nullptr;
  Site site;
  unsigned mask = 0;  // 0: the block
};

struct Thread {
  enum State { kReady, kWaiting, kLeft };

  Fibre fibre;
  uint3 index{};
  unsigned rank = 0;  // in the block, x fastest
  State state = kReady;
  bool started = false;   // is in the kernel
  bool atomic = false;    // what it does to memory just now is atomic
  unsigned clock = 0;     // grows at each __syncwarp that it takes part in
  Wait wait;              // while it waits
  uint64_t value = 0;     // what it brings there
  uint64_t outcome = 0;   // what a barrier found
  uint64_t lanes[kWarp];  // what a collective's lanes brought

  unsigned lane() const { return rank % kWarp; }
  unsigned warp() const { return rank / kWarp; }
};

struct Running {
  Thread* thread = nullptr;  // null: no kernel runs
  uint3 block_index{};
  dim3 block_size, grid_size;
};
extern Running running;

// From now on launches run in that order, any number, for all threads of the process.
void set_order(unsigned order);

// How many blocks all launches so far have run.
uint64_t blocks();

// How many launches have begun so far, those that failed among them; not those that were over the limits.
uint64_t launches();

// Runs the kernel for each thread of the grid. `kernel` is its address, for what was allowed to it.
// Throws std::runtime_error with all that is found wrong, std::invalid_argument for the limits.
void launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
            const std::function<void()>& body);

// Allows a kernel that many bytes of dynamic shared memory, cudaFuncSetAttribute's way.
bool allow_shared(const void* kernel, size_t bytes);

// The following are for the thread that runs.

// Ends the launch: names kernel, block, thread and order before the text.
[[noreturn]] void fail(const std::string& text);

// Waits for all threads of the block at this call; how many of them brought a number other than 0.
unsigned block_barrier(const char* call, unsigned value, const Site& site);

// Waits for the lanes of the mask at this call; what each lane brought, 0 for those not in the mask.
const uint64_t* meet(const char* call, unsigned mask, uint64_t value, const Site& site);

// Lanes of the warp that are here now. That is up to the hardware: all that come here before they wait for
// something else, or, in the orders with an odd number, nobody but the thread itself.
unsigned active_mask(const Site& site);

// The array of a declaration in shared memory, and the dynamic one.
void* shared_array(const char* name, const void* key, size_t bytes, size_t align);
void* dynamic_shared();

}  // namespace emulator
