#include "emulator.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "accesses.h"
#include "asan.h"
#include "block.h"

namespace emulator {

Running running;
Launch now;
Shared shared;

namespace {

constexpr size_t kStack = 1 << 17;
constexpr size_t kSharedStatic = 48 << 10, kSharedMost = 227 << 10;  // compute capability 9.0

// A pattern for each order. As floating numbers: NaN, large, large and negative, zero.
constexpr std::byte kPoisons[] = {std::byte{0xff}, std::byte{0x5a}, std::byte{0xda}, std::byte{0}};

// Thrown in a fibre to leave the kernel; caught at the fibre's bottom.
struct Abandoned {};

unsigned order = 0;
uint64_t launched = 0;
std::map<const void*, size_t> allowed;  // dynamic shared memory by kernel

Thread threads[kMostThreads];

const Stacks* stacks = nullptr;  // there from the first launch on

std::string where(unsigned rank) {
  return std::string("simt: kernel ") + now.name + ", block " + text_of(running.block_index) + ", " +
         thread_text(rank) + ", order " + std::to_string(now.order) + ": ";
}

// A fibre's bottom: the kernel, once for each block.
void run(void* self) {
  Thread& thread = *static_cast<Thread*>(self);
  for (;;) {
    thread.started = true;
    try {
      (*now.body)();
    } catch (const Abandoned&) {
    } catch (const std::exception& error) {
      now.failure = where(thread.rank) + error.what();
    }
    thread.started = false;
    thread.state = Thread::kLeft;
    thread.fibre.suspend();
  }
}

void prepare(unsigned count) {
  static unsigned prepared = 0;
  if (stacks == nullptr) stacks = new Stacks(kMostThreads, kStack);
  for (; prepared < count; ++prepared) {
    Thread& thread = threads[prepared];
    thread.rank = prepared;
    thread.fibre.prepare((*stacks)[prepared], kStack, run, &thread);
  }
}

void resume(Thread& thread) {
  running.thread = &thread;
  thread.fibre.resume();
  running.thread = nullptr;
}

void suspend() {
  running.thread->fibre.suspend();
  if (!now.failure.empty()) throw Abandoned();
}

bool same_line(const Wait& a, const Wait& b) {
  return a.site.line() == b.site.line() && std::strcmp(a.site.file_name(), b.site.file_name()) == 0;
}

// They wait for each other: barriers at one line, collectives of one kind and mask at any.
bool same(const Wait& a, const Wait& b) {
  const bool call =
      a.call == b.call || (a.call != nullptr && b.call != nullptr && !std::strcmp(a.call, b.call));
  return call && a.mask == b.mask && (a.mask != 0 || same_line(a, b));
}

void wait(const char* call, unsigned mask, uint64_t value, const Site& site) {
  running.thread->wait = {call, site, mask};
  running.thread->value = value;
  running.thread->state = Thread::kWaiting;
}

bool released = false;  // some thread, since the scheduler looked

void release(Thread& thread) {
  thread.state = Thread::kReady;
  released = true;
}

// The lanes of the warp of `of` that its mask names; a name without a thread is left out.
template <class Each>
void for_lanes(const Thread& of, unsigned mask, const Each& each) {
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    const unsigned rank = of.warp() * kWarp + unsigned(std::countr_zero(rest));
    if (rank < now.threads) each(threads[rank]);
  }
}

constexpr const char* kActiveMask = "__activemask";

// Nobody can go on: those that ask which lanes are here get their answer.
bool release_active_masks() {
  const auto asks = [](const Thread& t) { return t.state == Thread::kWaiting && t.wait.call == kActiveMask; };
  Thread* const end = threads + now.threads;
  Thread* const first = std::find_if(threads, end, asks);
  if (first == end) return false;
  unsigned here = 0;
  for_lanes(*first, ~0u, [&](const Thread& lane) {
    if (asks(lane) && same_line(lane.wait, first->wait)) here |= 1u << lane.lane();
  });
  for_lanes(*first, here, [&](Thread& lane) { lane.outcome = here, release(lane); });
  return true;
}

// Why a thread waits: the first that should come and does not. `gone`: it never will, whatever others do.
std::string obstacle(const Thread& waits, bool& gone) {
  const bool all = waits.wait.mask == 0;
  const unsigned first = all ? 0 : waits.warp() * kWarp, last = all ? now.threads : first + kWarp;
  for (unsigned rank = first; rank < last; ++rank) {
    if (!all && (waits.wait.mask >> rank % kWarp & 1) == 0) continue;
    gone = rank >= now.threads || threads[rank].state == Thread::kLeft;
    if (rank >= now.threads) return "the block has no lane " + std::to_string(rank % kWarp);
    if (gone) return thread_text(rank) + " has left the kernel";
    if (!same(threads[rank].wait, waits.wait)) {
      return thread_text(rank) + " waits at " + text_of(threads[rank].wait);
    }
  }
  return "the emulator is at fault";
}

// Nobody can go on and the block is not done: whom somebody waits for, best if that one is the cause.
std::string stuck() {
  std::string found;
  for (unsigned rank = 0; rank < now.threads; ++rank) {
    if (threads[rank].state != Thread::kWaiting) continue;
    bool gone = false;
    const std::string why = obstacle(threads[rank], gone);
    if (found.empty() || gone)
      found = where(rank) + "waits forever at " + text_of(threads[rank].wait) + ": " + why;
    if (gone) break;
  }
  return found;
}

// Threads in the launch's order until all have left. The two plain orders let the first that can go on go as
// far as it can; the random ones go round, differently each time.
void run_block(std::vector<unsigned>& ranks, std::mt19937& random) {
  shared.begin_block(kPoisons[now.order % std::size(kPoisons)]);
  now.barriers = now.at_barrier = 0;
  for (unsigned rank = 0; rank < now.threads; ++rank) {
    Thread& thread = threads[rank];
    thread.index = {rank % running.block_size.x, rank / running.block_size.x % running.block_size.y,
                    rank / running.block_size.x / running.block_size.y};
    thread.state = Thread::kReady;
    thread.clock = 0;
  }
  const bool rounds = now.order >= 2;
  for (;;) {
    bool any = false, done = true;
    if (rounds) std::shuffle(ranks.begin(), ranks.end(), random);
    for (size_t at = 0; at < ranks.size(); ++at) {
      Thread& thread = threads[ranks[at]];
      if (thread.state == Thread::kReady) {
        any = true, released = false;
        resume(thread);
        if (!now.failure.empty()) return;
        if (!rounds && released) break;
      }
      done = done && thread.state == Thread::kLeft;
    }
    if (any) continue;
    if (done) return;
    if (!release_active_masks()) {
      now.failure = stuck();
      return;
    }
  }
}

// Every thread that is in the kernel leaves it.
void abandon() {
  for (unsigned rank = 0; rank < now.threads; ++rank) {
    if (threads[rank].started) resume(threads[rank]);
  }
}

void check_limits(const char* name, dim3 grid, dim3 block, size_t shared_bytes, size_t most_shared) {
  const auto check = [&](const char* what, uint64_t got, uint64_t least, uint64_t most) {
    if (got >= least && got <= most) return;
    throw std::invalid_argument(std::string("simt: kernel ") + name + ": " + what + ": expected " +
                                std::to_string(least) + " to " + std::to_string(most) + ", got " +
                                std::to_string(got));
  };
  check("grid.x", grid.x, 1, 0x7fffffff), check("grid.y", grid.y, 1, 65535),
      check("grid.z", grid.z, 1, 65535);
  check("block.x", block.x, 1, 1024), check("block.y", block.y, 1, 1024), check("block.z", block.z, 1, 64);
  check("threads of a block", uint64_t(block.x) * block.y * block.z, 1, kMostThreads);
  check("dynamic shared bytes", shared_bytes, 0, most_shared);
}

// AddressSanitizer is about to end the process.
void name_thread(const char*) {
  if (running.thread != nullptr)
    std::fprintf(stderr, "%sAddressSanitizer's report is of this\n", where(running.thread->rank).c_str());
}

}  // namespace

std::string text_of(uint3 index) {
  return std::string("(") + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

std::string thread_text(unsigned rank) { return "thread " + text_of(threads[rank].index); }

std::string text_of(const Wait& wait) {
  const char* const file = std::strrchr(wait.site.file_name(), '/');
  std::string text = std::string(wait.call) + " (" + (file != nullptr ? file + 1 : wait.site.file_name()) +
                     ":" + std::to_string(wait.site.line());
  if (wait.mask != 0) {
    char mask[24];
    std::snprintf(mask, sizeof mask, ", mask 0x%08x", wait.mask);
    text += mask;
  }
  return text + ")";
}

bool is_own(const void* address) {
  const auto in = [&](const void* begin, const void* end) { return address >= begin && address < end; };
  return stacks->hold(address) || in(&running, &running + 1) || in(std::begin(threads), std::end(threads));
}

uint3 block_at(uint64_t position) {
  uint64_t at = position;
  if (now.order == 1) at = now.blocks - 1 - position;
  if (now.order >= 2) {  // a step that shares no factor with the count visits all
    uint64_t step = now.blocks / 2 + 7919 * now.order;
    while (std::gcd(step, now.blocks) != 1) ++step;
    at = uint64_t((unsigned __int128)(step)*position % now.blocks + now.order) % now.blocks;
  }
  return {unsigned(at % running.grid_size.x), unsigned(at / running.grid_size.x % running.grid_size.y),
          unsigned(at / running.grid_size.x / running.grid_size.y)};
}

void set_order(unsigned number) { order = number; }

uint64_t blocks() { return now.serial; }

uint64_t launches() { return launched; }

bool allow_shared(const void* kernel, size_t bytes) {
  if (bytes > kSharedMost) return false;
  allowed[kernel] = bytes;
  return true;
}

void launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
            const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const auto found = allowed.find(kernel);
  const size_t dynamic = found == allowed.end() ? kSharedStatic : std::max(found->second, kSharedStatic);
  check_limits(name, grid, block, shared_bytes, dynamic);

  ++launched;
  const uint64_t serial = now.serial + 1;
  now = Launch{.name = name,
               .body = &body,
               .blocks = uint64_t(grid.x) * grid.y * grid.z,
               .threads = block.x * block.y * block.z,
               .most_shared = found == allowed.end() ? kSharedStatic : kSharedMost,
               .order = order,
               .first_serial = serial,
               .serial = serial};
  running.grid_size = grid, running.block_size = block;
  prepare(now.threads);
  shared.begin_launch(shared_bytes);
  accesses::begin_launch();
  asan::on_report(name_thread);

  std::vector<unsigned> ranks(now.threads);
  std::iota(ranks.begin(), ranks.end(), 0u);
  if (order == 1) std::reverse(ranks.begin(), ranks.end());
  std::mt19937 random(order);
  for (uint64_t position = 0; position < now.blocks && now.failure.empty(); ++position) {
    now.serial = serial + position;
    running.block_index = block_at(position);
    run_block(ranks, random);
  }
  if (now.failure.empty()) return;
  abandon();
  throw std::runtime_error(now.failure);
}

void fail(const std::string& text) {
  now.failure = where(running.thread->rank) + text;
  throw Abandoned();
}

unsigned block_barrier(const char* call, unsigned value, const Site& site) {
  wait(call, 0, value, site);
  if (now.at_barrier == 0) now.first_there = running.thread, now.votes = 0;
  if (!same(now.first_there->wait, running.thread->wait)) {
    fail("comes to " + text_of(running.thread->wait) + " while " + thread_text(now.first_there->rank) +
         " waits at " + text_of(now.first_there->wait));
  }
  now.votes += value != 0;
  if (++now.at_barrier == now.threads) {
    now.at_barrier = 0, ++now.barriers;
    for (unsigned rank = 0; rank < now.threads; ++rank) {
      threads[rank].outcome = now.votes, release(threads[rank]);
    }
  }
  suspend();
  return unsigned(running.thread->outcome);
}

const uint64_t* meet(const char* call, unsigned mask, uint64_t value, const Site& site) {
  wait(call, mask, value, site);
  if ((mask >> running.thread->lane() & 1) == 0)
    fail("is not in the mask of " + text_of(running.thread->wait));
  unsigned here = 0, clock = 0;
  uint64_t values[kWarp] = {};
  for_lanes(*running.thread, mask, [&](const Thread& lane) {
    if (lane.state != Thread::kWaiting || !same(lane.wait, running.thread->wait)) return;
    here |= 1u << lane.lane();
    values[lane.lane()] = lane.value;
    clock = std::max(clock, lane.clock);
  });
  if (here == mask) {
    const bool orders_memory = std::strcmp(call, "__syncwarp") == 0;
    for_lanes(*running.thread, mask, [&](Thread& lane) {
      std::copy(std::begin(values), std::end(values), lane.lanes);
      if (orders_memory) lane.clock = clock + 1;
      release(lane);
    });
  }
  suspend();
  return running.thread->lanes;
}

unsigned active_mask(const Site& site) {
  if (now.order % 2 == 1) return 1u << running.thread->lane();
  wait(kActiveMask, 1u << running.thread->lane(), 0, site);
  suspend();
  return unsigned(running.thread->outcome);
}

void* shared_array(const char* name, const void* key, size_t bytes, size_t align) {
  void* const array = shared.array(name, key, bytes, align);
  const size_t fixed = shared.static_bytes(), dynamic = shared.dynamic_bytes();
  if (array == nullptr || fixed > kSharedStatic || fixed + dynamic > now.most_shared) {
    fail("shared memory for " + std::string(name) + ": expected at most " + std::to_string(kSharedStatic) +
         " static bytes and " + std::to_string(now.most_shared) + " in all, got " +
         std::to_string(array == nullptr ? fixed + bytes : fixed) + " and " + std::to_string(dynamic) +
         " dynamic ones");
  }
  return array;
}

void* dynamic_shared() {
  if (shared.dynamic() == nullptr) fail("has no dynamic shared memory: it was launched with 0 bytes");
  return shared.dynamic();
}

}  // namespace emulator
