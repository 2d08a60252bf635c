#include "accesses.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <unordered_map>
#include <vector>

#include "block.h"

namespace emulator::accesses {
namespace {

constexpr uint16_t kSeveral = 0xffff;
constexpr uint8_t kSeveralWarps = 0xff;

// The latest access of a kind to a word of memory; that of several threads where nothing orders theirs.
struct Record {
  uint32_t block = 0;  // its serial number, the latest one's of several; 0: there was no access
  uint32_t barriers = 0;
  uint32_t clock = 0;
  uint16_t thread = 0;
  uint8_t warp = 0;
  uint8_t bytes : 4 = 0;  // of the word
  uint8_t atomic : 1 = 0;
  uint8_t several_blocks : 1 = 0;
};

struct Word {
  Record write, read;
};

constexpr size_t kPage = 4096;  // bytes of memory, each four with a Word
constexpr size_t kMostPages = 1 << 14;

struct Page {
  Word words[kPage / 4];
};

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;

// The pages that were last asked for.
struct Recent {
  uintptr_t number = 0;
  Page* page = nullptr;
} recent[256];

Word& word_at(uintptr_t address) {
  const uintptr_t number = address / kPage;
  Recent& found = recent[number % std::size(recent)];
  if (found.page == nullptr || found.number != number) {
    std::unique_ptr<Page>& page = pages[number];
    if (page == nullptr) page = std::make_unique<Page>();
    found = {number, page.get()};
  }
  return found.page->words[address % kPage / 4];
}

// Whether all that the record stands for is over and seen by the thread that makes this access.
bool over(const Record& before, const Record& access, uint32_t oldest) {
  if (before.block < oldest) return true;
  if (before.several_blocks || before.block != access.block) return false;
  if (before.barriers != access.barriers || before.thread == access.thread) return true;
  return before.warp == access.warp && before.clock < access.clock;
}

bool compatible(const Record& before, const Record& access, uint32_t oldest) {
  return (before.bytes & access.bytes) == 0 || (before.atomic && access.atomic) ||
         over(before, access, oldest);
}

void add(Record& record, const Record& access, uint32_t oldest) {
  if ((record.bytes & access.bytes) != 0 && !over(record, access, oldest)) {
    record.thread = kSeveral;
    if (record.warp != access.warp) record.warp = kSeveralWarps;
    if (record.block != access.block) record.several_blocks = 1;
    record.block = access.block;
    record.clock = std::max(record.clock, access.clock);
    record.bytes |= access.bytes;
    return;
  }
  const Record before = record;
  record = access;
  if (before.block == access.block && before.barriers == access.barriers && before.thread == access.thread) {
    record.bytes |= before.bytes;
    record.atomic &= before.atomic;
  }
}

const char* text_of(const Record& record, bool write) {
  if (record.atomic) return "changed atomically";
  return write ? "wrote" : "read";
}

std::string place(const void* address, size_t bytes) {
  if (const SharedArray* const array = shared.find(address, bytes)) {
    return std::string("shared ") + array->name + ", byte " +
           std::to_string(shared.offset_of(address) - array->offset);
  }
  char text[40];
  std::snprintf(text, sizeof text, "global memory at %p", address);
  return text;
}

// The record's threads.
std::string who(const Record& record) {
  const std::string threads = record.thread == kSeveral ? "several threads" : thread_text(record.thread);
  if (record.several_blocks) return threads + " of several blocks";
  return threads + " of block " + emulator::text_of(block_at(record.block - now.first_serial));
}

[[noreturn]] void conflict(const Record& before, bool wrote, const void* address, size_t bytes, bool write) {
  const char* const now_does = running.thread->atomic ? "changes atomically" : write ? "writes" : "reads";
  fail(std::string(now_does) + " what " + who(before) + " " + text_of(before, wrote) +
       ", with nothing that orders them: " + place(address, bytes));
}

void check_shared(const void* address, size_t bytes, bool write) {
  if (shared.find(address, bytes) == nullptr) {
    fail(std::string(write ? "writes" : "reads") + " shared memory outside its arrays");
  }
  const size_t offset = shared.offset_of(address);
  for (size_t i = 0; i < bytes; ++i) {
    unsigned char& written = shared.written(offset + i);
    if (write) written = 1;
    if (!written) fail("reads what nobody wrote: " + place(address, bytes));
  }
}

void watch(const void* memory, size_t bytes, bool write) {
  if (running.thread == nullptr || !running.thread->started || is_own(memory)) return;
  const bool is_shared = shared.holds(memory);
  if (is_shared) check_shared(memory, bytes, write);
  // The first block whose accesses may meet this one's.
  const auto oldest = uint32_t(is_shared ? now.serial : now.first_serial);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory), end = begin + bytes;
  Record access{.block = uint32_t(now.serial),
                .barriers = now.barriers,
                .clock = running.thread->clock,
                .thread = uint16_t(running.thread->rank),
                .warp = uint8_t(running.thread->warp()),
                .atomic = running.thread->atomic};
  for (uintptr_t at = begin & ~uintptr_t(3); at < end; at += 4) {
    access.bytes = 15;
    if (at < begin) access.bytes &= 15 << (begin - at);
    if (at + 4 > end) access.bytes &= 15 >> (at + 4 - end);
    Word& word = word_at(at);
    if (!compatible(word.write, access, oldest)) conflict(word.write, true, memory, bytes, write);
    if (!write) {
      add(word.read, access, oldest);
      continue;
    }
    if (!compatible(word.read, access, oldest)) conflict(word.read, false, memory, bytes, write);
    add(word.write, access, oldest);
  }
}

}  // namespace

void begin_launch() {
  if (pages.size() < kMostPages) return;
  pages.clear();
  std::fill(std::begin(recent), std::end(recent), Recent());
}

std::string writer_of(const void* address) {
  const Record& write = word_at(reinterpret_cast<uintptr_t>(address)).write;
  return write.block < now.first_serial ? "" : who(write) + " " + text_of(write, true) + " it";
}

}  // namespace emulator::accesses

// What -fsanitize=thread calls.
#define EMULATOR_ACCESS(bytes)                                                               \
  void __tsan_read##bytes(void* p) { emulator::accesses::watch(p, bytes, false); }           \
  void __tsan_write##bytes(void* p) { emulator::accesses::watch(p, bytes, true); }           \
  void __tsan_unaligned_read##bytes(void* p) { emulator::accesses::watch(p, bytes, false); } \
  void __tsan_unaligned_write##bytes(void* p) { emulator::accesses::watch(p, bytes, true); } \
  void __tsan_volatile_read##bytes(void* p) { emulator::accesses::watch(p, bytes, false); }  \
  void __tsan_volatile_write##bytes(void* p) { emulator::accesses::watch(p, bytes, true); }

extern "C" {
EMULATOR_ACCESS(1)
EMULATOR_ACCESS(2)
EMULATOR_ACCESS(4)
EMULATOR_ACCESS(8)
EMULATOR_ACCESS(16)
void __tsan_read_range(void* p, size_t bytes) { emulator::accesses::watch(p, bytes, false); }
void __tsan_write_range(void* p, size_t bytes) { emulator::accesses::watch(p, bytes, true); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
// A function's static variable that is made at the first call asks whether it is there.
// Of host code beside the kernels: a shared_ptr's count.
uint32_t __tsan_atomic32_fetch_add(volatile uint32_t* p, uint32_t value, int) {
  return __atomic_fetch_add(p, value, __ATOMIC_ACQ_REL);
}
uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
}
