// Loops over rows as they lie in memory, of codes or of images, once per instruction set.
#pragma once

#include <cstdint>

namespace tmm {

constexpr int kRowLanes = 16;  // the most lanes of any instruction set

constexpr int kSsimColumns = 64, kSsimTaps = 64;  // windows along a row of a strip, and the most weights of a line

// A strip of windows of a pair of planes: the first pixels of its first row, pixels from a row to the next, windows down and
// across, the weights of a window along one axis, the constants of SSIM, and what is added to all pixels. memory: room for
// 4 * (kSsimColumns + kSsimTaps) + 4 * k * kSsimColumns values that are finite. wide: planes of doubles, else of floats.
// equal: all weights are 1 / k.
struct SsimStrip {
  const void *x, *y;
  bool wide;
  int64_t stride, rows, columns;
  const double* line;
  int64_t k;
  bool equal;
  double c1, c2, offset;
  double* memory;
};

struct RowKernels {
  // Adds `bytes` of memory, as 64-byte stripes number `stripe` and following, to the eight sums of a digest.
  void (*digest)(const char* data, int64_t bytes, uint64_t stripe, uint64_t* sums);
  // Positions of the rows of codes whose squared float32 distance from z is not above `limit`; returns how many, and adds the
  // distances up in *total, which is finite unless a distance is not. Each is within (d + 3) roundings of 2^-24, relative, of
  // the true one. out: room for n rounded up to kRowLanes.
  int64_t (*near)(const float* z, const float* codes, int64_t n, int64_t d, float limit, int32_t* out, float* total);
  // Sums over the windows of a strip of 1 - SSIM, to lost[0], and of 1 - its contrast-structure factor, to lost[1].
  void (*ssim)(const SsimStrip& strip, double* lost);
};

// Those for registers of this many 32-bit lanes.
const RowKernels* row_kernels(int lanes);

const RowKernels* row_kernels_16();  // null where the compiler does not know the instruction set
const RowKernels* row_kernels_8();
const RowKernels* row_kernels_4();

}  // namespace tmm
