// Loops over rows on any CPU, in 128-bit vectors.
#define TMM_LANES 4
#define TMM_MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#include "rows_generic.h"

namespace tmm {
namespace {

Words multiply_halves(Words v) { return (v & 0xffffffff) * (v >> 32); }

Floats reduce(const Floats* sums) {
  Floats out;
  for (int c = 0; c < kLanes; ++c) out[c] = (sums[c][0] + sums[c][2]) + (sums[c][1] + sums[c][3]);
  return out;
}

uint32_t not_above(Floats v, float limit) {
  uint32_t mask = 0;
  for (int lane = 0; lane < kLanes; ++lane) mask |= static_cast<uint32_t>(!(v[lane] > limit)) << lane;
  return mask;
}

Floats load_first(const float* p, int64_t count) {
  Floats v = {};
  for (int lane = 0; lane < count; ++lane) v[lane] = p[lane];
  return v;
}

}  // namespace

const RowKernels* row_kernels_4() { return &kKernels; }

const RowKernels* row_kernels(int lanes) {
  const RowKernels* wide = lanes == 16 ? row_kernels_16() : lanes == 8 ? row_kernels_8() : nullptr;
  return wide ? wide : row_kernels_4();
}

}  // namespace tmm
