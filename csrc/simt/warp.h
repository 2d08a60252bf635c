// CUDA's barriers and a warp's collectives. Stricter than the hardware: all lanes that a mask names must
// come, also those that left, and no lane may read one that the mask does not name, even if it drops what it
// read.
#pragma once

#include <cstring>
#include <type_traits>

#include "emulator.h"

using EmulatorSite = std::source_location;

inline void __syncthreads(EmulatorSite site = EmulatorSite::current()) {
  emulator::block_barrier("__syncthreads", 0, site);
}
inline int __syncthreads_count(int predicate, EmulatorSite site = EmulatorSite::current()) {
  return int(emulator::block_barrier("__syncthreads_count", predicate != 0, site));
}
inline int __syncthreads_or(int predicate, EmulatorSite site = EmulatorSite::current()) {
  return emulator::block_barrier("__syncthreads_or", predicate != 0, site) != 0;
}
inline int __syncthreads_and(int predicate, EmulatorSite site = EmulatorSite::current()) {
  return emulator::block_barrier("__syncthreads_and", predicate == 0, site) == 0;
}

inline void __syncwarp(unsigned mask = ~0u, EmulatorSite site = EmulatorSite::current()) {
  emulator::meet("__syncwarp", mask, 0, site);
}
inline unsigned __activemask(EmulatorSite site = EmulatorSite::current()) {
  return emulator::active_mask(site);
}

// Fences order nothing here that is not in order already: one thread runs at a time.
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace emulator {

template <class T>
uint64_t to_bits(T value) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// The lanes come in groups of `width`; source(lane, the group's first, the next group's first) is whom a lane
// reads, itself where that is outside.
template <class T, class Source>
T shuffle(const char* call, unsigned mask, T value, int width, const Site& site, const Source& source) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fail(std::string(call) + ": width: expected 1, 2, 4, 8, 16 or 32, got " + std::to_string(width));
  }
  const uint64_t* const lanes = meet(call, mask, to_bits(value), site);
  const int lane = int(running.thread->lane()), first = lane / width * width;
  const int from = source(lane, first, first + width);
  if ((mask >> from & 1) == 0) {
    fail(std::string(call) + " reads lane " + std::to_string(from) + ", which is not in its mask");
  }
  return from_bits<T>(lanes[from]);
}

template <class T, class Combine>
T reduce(const char* call, unsigned mask, T value, const Site& site, const Combine& combine) {
  const uint64_t* const lanes = meet(call, mask, to_bits(value), site);
  T all{};
  bool any = false;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    const T one = from_bits<T>(lanes[lane]);
    all = any ? T(combine(all, one)) : one;
    any = true;
  }
  return all;
}

// The lanes of the mask for which holds(what it brought) is true.
template <class Holds>
unsigned lanes_where(const uint64_t* lanes, unsigned mask, const Holds& holds) {
  unsigned found = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane)
    found |= unsigned((mask >> lane & 1) && holds(lanes[lane])) << lane;
  return found;
}

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, EmulatorSite site = EmulatorSite::current()) {
  return emulator::shuffle("__shfl_sync", mask, value, width, site,
                           [&](int, int first, int) { return first + (from & (width - 1)); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32,
                 EmulatorSite site = EmulatorSite::current()) {
  return emulator::shuffle("__shfl_up_sync", mask, value, width, site, [&](int lane, int first, int) {
    return lane - first >= int(by) ? lane - int(by) : lane;
  });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32,
                   EmulatorSite site = EmulatorSite::current()) {
  return emulator::shuffle("__shfl_down_sync", mask, value, width, site, [&](int lane, int, int end) {
    return end - lane > int(by) ? lane + int(by) : lane;
  });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32,
                  EmulatorSite site = EmulatorSite::current()) {
  return emulator::shuffle("__shfl_xor_sync", mask, value, width, site, [&](int lane, int, int end) {
    return (lane ^ with) < end ? lane ^ with : lane;  // an earlier group may be read, a later one not
  });
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EmulatorSite site = EmulatorSite::current()) {
  const uint64_t* const lanes = emulator::meet("__ballot_sync", mask, predicate != 0, site);
  return emulator::lanes_where(lanes, mask, [](uint64_t yes) { return yes != 0; });
}
inline int __any_sync(unsigned mask, int predicate, EmulatorSite site = EmulatorSite::current()) {
  const uint64_t* const lanes = emulator::meet("__any_sync", mask, predicate != 0, site);
  return emulator::lanes_where(lanes, mask, [](uint64_t yes) { return yes != 0; }) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EmulatorSite site = EmulatorSite::current()) {
  const uint64_t* const lanes = emulator::meet("__all_sync", mask, predicate != 0, site);
  return emulator::lanes_where(lanes, mask, [](uint64_t yes) { return yes != 0; }) == mask;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, EmulatorSite site = EmulatorSite::current()) {
  const uint64_t mine = emulator::to_bits(value);
  const uint64_t* const lanes = emulator::meet("__match_any_sync", mask, mine, site);
  return emulator::lanes_where(lanes, mask, [&](uint64_t theirs) { return theirs == mine; });
}

// clang-format off
#define EMULATOR_REDUCE(name, Type, expression)                                                                 \
  inline Type name(unsigned mask, Type value, EmulatorSite site = EmulatorSite::current()) {                    \
    return emulator::reduce(#name, mask, value, site, [](Type a, Type b) { return expression; });               \
  }
EMULATOR_REDUCE(__reduce_add_sync, unsigned, a + b)
EMULATOR_REDUCE(__reduce_add_sync, int, int(unsigned(a) + unsigned(b)))
EMULATOR_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
EMULATOR_REDUCE(__reduce_min_sync, int, a < b ? a : b)
EMULATOR_REDUCE(__reduce_max_sync, unsigned, a < b ? b : a)
EMULATOR_REDUCE(__reduce_max_sync, int, a < b ? b : a)
EMULATOR_REDUCE(__reduce_and_sync, unsigned, a & b)
EMULATOR_REDUCE(__reduce_or_sync, unsigned, a | b)
EMULATOR_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef EMULATOR_REDUCE
// clang-format on
