#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace metafast::cpu {
namespace {

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class Pool {
 public:
  // False where another thread is using the pool.
  bool run(int64_t tasks, int threads, Task task, void* context) {
    const std::unique_lock<std::mutex> use(in_use_, std::try_to_lock);
    if (!use) return false;
    while (helpers_ < threads - 1) std::thread(&Pool::help, this, ++helpers_).detach();
    tasks_ = tasks;
    task_ = task;
    context_ = context;
    threads_.store(threads, std::memory_order_relaxed);
    next_.store(0, std::memory_order_relaxed);
    gate_.store(kOpen, std::memory_order_release);
    generation_.fetch_add(1);
    if (sleepers_.load() > 0) {
      const std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    work(0);
    // Nobody may begin from here on; those who have, finish.
    gate_.fetch_and(~kOpen, std::memory_order_acq_rel);
    while (gate_.load(std::memory_order_acquire) != 0) relax();
    return true;
  }

 private:
  static constexpr int64_t kOpen = int64_t(1) << 32;  // above it: the helpers inside

  void work(int worker) {
    const int64_t tasks = tasks_;
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tasks;) task_(context_, i, worker);
  }

  void help(int worker) {
    uint64_t seen = 0;
    for (;;) {
      seen = wait_for_more_than(seen);
      if (worker >= threads_.load(std::memory_order_relaxed)) continue;
      int64_t gate = gate_.load(std::memory_order_acquire);
      while ((gate & kOpen) != 0 && !gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) {
      }
      if ((gate & kOpen) == 0) continue;
      // Another job may have begun meanwhile, with fewer threads; then this worker has no workspace in it.
      if (worker < threads_.load(std::memory_order_relaxed)) work(worker);
      gate_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  // Looks hard for a moment, then politely (other libraries' threads want the core too), then sleeps.
  uint64_t wait_for_more_than(uint64_t seen) {
    using Clock = std::chrono::steady_clock;
    for (int i = 0; i < 2000; ++i) {
      if (generation_.load(std::memory_order_acquire) != seen) return generation_.load();
      relax();
    }
    for (const auto end = Clock::now() + std::chrono::milliseconds(1); Clock::now() < end;) {
      if (generation_.load(std::memory_order_acquire) != seen) return generation_.load();
      std::this_thread::yield();
    }
    std::unique_lock<std::mutex> lock(sleep_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [&] { return generation_.load() != seen; });
    sleepers_.fetch_sub(1);
    return generation_.load();
  }

  std::mutex in_use_;
  int helpers_ = 0;
  // The job; stands still while the gate is open or somebody is inside.
  int64_t tasks_ = 0;
  Task task_ = nullptr;
  void* context_ = nullptr;
  std::atomic<int> threads_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> gate_{0};
  alignas(64) std::atomic<uint64_t> generation_{0};
  std::atomic<int> sleepers_{0};
  std::mutex sleep_;
  std::condition_variable wake_;
};

// Never destroyed: its threads run until the process ends.
std::atomic<Pool*> pool{nullptr};

Pool& current_pool() {
  static const int hooked = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
  (void)hooked;
  Pool* now = pool.load(std::memory_order_acquire);
  if (now != nullptr) return *now;
  Pool* mine = new Pool;
  if (pool.compare_exchange_strong(now, mine)) return *mine;
  delete mine;  // another thread was first; mine has no threads yet
  return *now;
}

}  // namespace

void run_tasks(int64_t tasks, int threads, Task task, void* context) {
  if (int64_t(threads) > tasks) threads = int(tasks);
  if (threads > 1 && current_pool().run(tasks, threads, task, context)) return;
  for (int64_t i = 0; i < tasks; ++i) task(context, i, 0);
}

void run_parts(int64_t parts, int threads, void (*part)(void* context, int64_t index), void* context) {
  auto task = [&](int64_t index, int) { part(context, index); };
  run_tasks(parts, threads, task);
}

}  // namespace metafast::cpu
