// AddressSanitizer's calls that the emulator makes; nothing in a build without it.
#pragma once

#include <cstddef>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator::asan {

#ifdef __SANITIZE_ADDRESS__
inline void leave(void** mine, const void* bottom, size_t bytes) {
  __sanitizer_start_switch_fiber(mine, bottom, bytes);
}
inline void arrive(void* mine, const void** bottom, size_t* bytes) {
  __sanitizer_finish_switch_fiber(mine, bottom, bytes);
}
inline void forbid(const void* memory, size_t bytes) { __asan_poison_memory_region(memory, bytes); }
inline void allow(const void* memory, size_t bytes) { __asan_unpoison_memory_region(memory, bytes); }
inline void on_report(void (*report)(const char*)) { __asan_set_error_report_callback(report); }
#else
inline void leave(void**, const void*, size_t) {}
inline void arrive(void*, const void**, size_t*) {}
inline void forbid(const void*, size_t) {}
inline void allow(const void*, size_t) {}
inline void on_report(void (*)(const char*)) {}
#endif

}  // namespace emulator::asan
