// Runs a piece of work once in each order, on the same buffers as they are at first, and demands of all
// orders the same bits.
#pragma once

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "accesses.h"
#include "emulator.h"

namespace emulator {

struct Buffer {
  const char* name;
  void* data;
  size_t bytes;
};

// Throws std::runtime_error with the first byte that differs, and who wrote it if that was watched; the
// buffers are left as the last order left them.
template <class Work>
void check_orders(const std::string& kernel, const std::vector<Buffer>& buffers, const Work& work) {
  using Copy = std::vector<std::byte>;
  const auto copy = [](const Buffer& b) {
    const auto* const begin = static_cast<const std::byte*>(b.data);
    return Copy(begin, begin + b.bytes);
  };
  std::vector<Copy> before, first;
  for (const Buffer& b : buffers) before.push_back(copy(b));
  for (unsigned order = 0; order < kOrders; ++order) {
    for (size_t i = 0; i < buffers.size(); ++i)
      std::memcpy(buffers[i].data, before[i].data(), buffers[i].bytes);
    set_order(order);
    work();
    for (size_t i = 0; i < buffers.size(); ++i) {
      const Copy after = copy(buffers[i]);
      if (order == 0) first.push_back(after);
      for (size_t at = 0; at < after.size(); ++at) {
        if (after[at] == first[i][at]) continue;
        const std::string writer = accesses::writer_of(static_cast<std::byte*>(buffers[i].data) + at);
        throw std::runtime_error("simt: kernel " + kernel + ": " + buffers[i].name +
                                 " differs between order 0 and order " + std::to_string(order) +
                                 ", first at byte " + std::to_string(at) +
                                 (writer.empty() ? "" : "; " + writer));
      }
    }
  }
  set_order(0);
}

}  // namespace emulator
