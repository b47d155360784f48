#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace tmm {
namespace {

constexpr int kMaxHelpers = 255;
constexpr int kSpins = 2000;  // a few microseconds: back-to-back calls find the helpers awake

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

class Pool {
 public:
  void run(int threads, void (*work)(void*, int), void* context) {
    int helpers = threads - 1 < kMaxHelpers ? threads - 1 : kMaxHelpers;
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (helpers <= 0 || !owner.owns_lock()) {
      work(context, 0);
      return;
    }
    helpers = grow(helpers);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = work;
      context_ = context;
      wanted_ = helpers;
      pending_.store(helpers, std::memory_order_relaxed);
      generation_.fetch_add(1, std::memory_order_release);
    }
    start_.notify_all();
    work(context, 0);
    for (int i = 0; i < kSpins; ++i) {
      if (pending_.load(std::memory_order_acquire) == 0) return;
      relax();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return pending_.load(std::memory_order_acquire) == 0; });
  }

 private:
  // Starts missing helpers; a system that refuses another thread leaves us with those we have.
  int grow(int helpers) {
    while (started_ < helpers) {
      try {
        const int worker = started_ + 1;
        const unsigned seen = generation_.load();
        std::thread([this, worker, seen] { serve(worker, seen); }).detach();
      } catch (const std::system_error&) {
        return started_;
      }
      ++started_;
    }
    return helpers;
  }

  void serve(int worker, unsigned seen) {
    for (;;) {
      for (int i = 0; i < kSpins && generation_.load(std::memory_order_acquire) == seen; ++i) relax();
      void (*work)(void*, int);
      void* context;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        start_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        if (worker > wanted_) continue;
        work = work_;
        context = context_;
      }
      work(context, worker);
      if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        std::lock_guard<std::mutex> lock(mutex_);
        done_.notify_one();
      }
    }
  }

  std::mutex owner_, mutex_;
  std::condition_variable start_, done_;
  std::atomic<unsigned> generation_{0};
  std::atomic<int> pending_{0};
  void (*work_)(void*, int) = nullptr;
  void* context_ = nullptr;
  int wanted_ = 0;
  int started_ = 0;
};

// Never destroyed (helpers may outlive main), and replaced, not repaired, in a forked child: its threads and the state of
// its locks belong to the parent. Made when the library is loaded, so that no fork can fall into the making.
alignas(Pool) unsigned char storage[sizeof(Pool)];

Pool* renew() { return new (storage) Pool; }

Pool* pool = [] {
  pthread_atfork(nullptr, nullptr, [] { pool = renew(); });
  return renew();
}();

}  // namespace

void run_parallel(int threads, void (*work)(void*, int), void* context) { pool->run(threads, work, context); }

}  // namespace tmm
