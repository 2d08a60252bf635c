#include "shared.h"

#include <algorithm>

#include "asan.h"

namespace emulator {

// Between arrays, so that what is written past one's end is not in the next.
constexpr size_t kGap = 256;

void Shared::begin_launch(size_t dynamic_bytes) {
  asan::forbid(arena_.data(), kArena);
  arrays_.clear();
  end_ = kGap;
  if (dynamic_bytes != 0) add("dynamic", nullptr, dynamic_bytes, 128);
}

void Shared::begin_block(std::byte poison) {
  poison_ = poison;
  for (const SharedArray& array : arrays_) {
    std::fill_n(arena_.data() + array.offset, array.bytes, poison);
    std::fill_n(written_.data() + array.offset, array.bytes, 0);
  }
}

SharedArray& Shared::add(const char* name, const void* key, size_t bytes, size_t align) {
  const size_t at = size_t(reinterpret_cast<uintptr_t>(arena_.data()));
  const size_t offset = (at + end_ + align - 1) / align * align - at;
  end_ = offset + bytes + kGap;
  asan::allow(arena_.data() + offset, bytes);
  return arrays_.emplace_back(name, key, offset, bytes);
}

void* Shared::array(const char* name, const void* key, size_t bytes, size_t align) {
  for (const SharedArray& array : arrays_) {
    if (array.key == key) return arena_.data() + array.offset;
  }
  if (end_ + align + bytes + kGap > kArena) return nullptr;
  const SharedArray& array = add(name, key, bytes, std::max<size_t>(align, 16));
  std::fill_n(arena_.data() + array.offset, bytes, poison_);
  std::fill_n(written_.data() + array.offset, bytes, 0);
  return arena_.data() + array.offset;
}

std::byte* Shared::dynamic() {
  return dynamic_bytes() == 0 ? nullptr : arena_.data() + arrays_.front().offset;
}

size_t Shared::dynamic_bytes() const {
  return !arrays_.empty() && arrays_.front().key == nullptr ? arrays_.front().bytes : 0;
}

size_t Shared::static_bytes() const {
  size_t bytes = 0;
  for (const SharedArray& array : arrays_) bytes += array.key != nullptr ? array.bytes : 0;
  return bytes;
}

const SharedArray* Shared::find(const void* address, size_t bytes) const {
  const size_t offset = offset_of(address);
  for (const SharedArray& array : arrays_) {
    if (offset >= array.offset && offset + bytes <= array.offset + array.bytes) return &array;
  }
  return nullptr;
}

}  // namespace emulator
