// Loops over rows as they lie in memory, unpacked, once per instruction set.
#pragma once

#include <cstdint>

namespace tmm {

constexpr int kRowLanes = 16;  // the most lanes of any instruction set

struct RowKernels {
  // Adds `bytes` of memory, as 64-byte stripes number `stripe` and following, to the eight sums of a digest.
  void (*digest)(const char* data, int64_t bytes, uint64_t stripe, uint64_t* sums);
  // Positions of the rows of codes whose squared float32 distance from z is not above `limit`; returns how many, and adds the
  // distances up in *total, which is finite unless a distance is not. Each is within (d + 3) roundings of 2^-24, relative, of
  // the true one. out: room for n rounded up to kRowLanes.
  int64_t (*near)(const float* z, const float* codes, int64_t n, int64_t d, float limit, int32_t* out, float* total);
};

// Those for registers of this many 32-bit lanes.
const RowKernels* row_kernels(int lanes);

const RowKernels* row_kernels_16();  // null where the compiler does not know the instruction set
const RowKernels* row_kernels_8();
const RowKernels* row_kernels_4();

}  // namespace tmm
