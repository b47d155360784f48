#include "digest.h"

#include <algorithm>
#include <atomic>

#include "isa.h"
#include "pool.h"
#include "rows.h"

namespace tmm {
namespace {

constexpr int64_t kChunk = 1 << 17;  // bytes a thread claims: enough to be worth a thread's wake-up

uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

}  // namespace

void digest_rows(Runs runs, uint64_t* digest, int threads) {
  const RowKernels& kernels = *row_kernels(current_isa()->lanes);
  if (runs.stride == runs.bytes) runs = {runs.data, 1, runs.rows * runs.bytes, 0};
  const int64_t pieces = std::max<int64_t>(1, (runs.bytes + kChunk - 1) / kChunk), stripes = (runs.bytes + 63) / 64;
  std::atomic<uint64_t> total[8] = {};
  for_chunks(runs.rows * pieces, std::max<int64_t>(1, kChunk / std::max<int64_t>(1, runs.bytes)), threads,
             [&](int64_t first, int64_t last) {
               uint64_t sums[8] = {};
               for (int64_t piece = first; piece < last; ++piece) {
                 const int64_t row = piece / pieces, offset = piece % pieces * kChunk;
                 kernels.digest(runs.data + row * runs.stride + offset, std::min(kChunk, runs.bytes - offset),
                                static_cast<uint64_t>(row * stripes + offset / 64), sums);
               }
               for (int word = 0; word < 8; ++word) total[word].fetch_add(sums[word], std::memory_order_relaxed);
             });
  digest[0] = digest[1] = 0;
  for (const auto& word : total) {
    digest[0] = mix(digest[0] ^ word.load());
    digest[1] = mix(digest[1] + word.load() * 0x9fb21c651e98df25);
  }
}

}  // namespace tmm
