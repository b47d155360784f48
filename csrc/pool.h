// A persistent thread pool that survives fork: DataLoader workers inherit the library but not its threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>

namespace tmm {

// Runs work(context, worker) on up to `threads` threads, the caller being worker 0, and returns when all are done.
// Every worker must be able to finish the whole job alone (work is claimed through an atomic counter), because a pool in
// use by another caller gives this one no helpers.
void run_parallel(int threads, void (*work)(void* context, int worker), void* context);

template <class F>
void run_parallel(int threads, F& body) {
  run_parallel(threads, [](void* context, int worker) { (*static_cast<F*>(context))(worker); }, &body);
}

// Splits [0, count) into chunks that threads claim: body(first, last). Throws std::bad_alloc when any of them did.
template <class F>
void for_chunks(int64_t count, int64_t chunk, int threads, F body) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> no_memory{false};
  auto work = [&](int) {
    try {
      for (;;) {
        const int64_t first = next.fetch_add(chunk);
        if (first >= count) return;
        body(first, std::min(count, first + chunk));
      }
    } catch (const std::bad_alloc&) {
      no_memory = true;
    }
  };
  run_parallel(static_cast<int>(std::min<int64_t>(threads, (count + chunk - 1) / chunk)), work);
  if (no_memory) throw std::bad_alloc();
}

}  // namespace tmm
