// A persistent thread pool that survives fork: DataLoader workers inherit the library but not its threads.
#pragma once

#include <cstddef>

namespace tmm {

// Runs work(context, worker) on up to `threads` threads, the caller being worker 0, and returns when all are done.
// Every worker must be able to finish the whole job alone (work is claimed through an atomic counter), because a pool in
// use by another caller gives this one no helpers.
void run_parallel(int threads, void (*work)(void* context, int worker), void* context);

template <class F>
void run_parallel(int threads, F& body) {
  run_parallel(threads, [](void* context, int worker) { (*static_cast<F*>(context))(worker); }, &body);
}

}  // namespace tmm
