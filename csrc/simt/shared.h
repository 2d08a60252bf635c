// A block's shared memory: named arrays in one arena with forbidden gaps between, filled with a pattern
// before each block. Blocks run one after another, so there is one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulator {

struct SharedArray {
  const char* name;
  const void* key;  // one for each declaration and template instance; null: the dynamic array
  size_t offset;    // in the arena
  size_t bytes;
};

class Shared {
 public:
  static constexpr size_t kArena = 1 << 19;

  // No arrays, but the dynamic one if it has a byte.
  void begin_launch(size_t dynamic_bytes);

  // Fills all with `poison` and forgets who wrote what.
  void begin_block(std::byte poison);

  // The array of a declaration; null: no room for it. A new one starts with the poison.
  void* array(const char* name, const void* key, size_t bytes, size_t align);

  std::byte* dynamic();  // null: there is none
  size_t dynamic_bytes() const;
  size_t static_bytes() const;

  bool holds(const void* address) const {
    return size_t(static_cast<const std::byte*>(address) - arena_.data()) < kArena;
  }
  // The array that has all these bytes, null: there is none.
  const SharedArray* find(const void* address, size_t bytes) const;
  size_t offset_of(const void* address) const {
    return size_t(static_cast<const std::byte*>(address) - arena_.data());
  }
  unsigned char& written(size_t offset) { return written_[offset]; }

 private:
  SharedArray& add(const char* name, const void* key, size_t bytes, size_t align);

  std::vector<std::byte> arena_ = std::vector<std::byte>(kArena);
  std::vector<unsigned char> written_ = std::vector<unsigned char>(kArena);  // a flag a byte
  std::vector<SharedArray> arrays_;
  size_t end_ = 0;
  std::byte poison_{};
};

}  // namespace emulator
