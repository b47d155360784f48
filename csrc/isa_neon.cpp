// ARM64 without products of bytes. The int16 rung is there for its bound, not its speed: smlal adds 4 products, as fmla does.
#include "isa.h"

#if defined(__aarch64__)

#include "isa_neon.h"

namespace tmm {
namespace {

int32_t largest(const int32_t* values, int64_t n, bool two) {  // n is a multiple of 4, as everywhere here
  int32x4_t a = vld1q_s32(values), b = a;
  int64_t i = 4;
  for (; i + 8 <= n; i += 8) {
    a = vmaxq_s32(a, vld1q_s32(values + i));
    b = vmaxq_s32(b, vld1q_s32(values + i + 4));
  }
  if (i < n) a = vmaxq_s32(a, vld1q_s32(values + i));
  const int32x4_t top = vmaxq_s32(a, b);
  const int32_t first = vmaxvq_s32(top);
  if (!two) return first;
  const uint32x4_t hit = vceqq_s32(top, vdupq_n_s32(first));
  return vaddvq_u32(vshrq_n_u32(hit, 31)) > 1 ? first : vmaxvq_s32(vbslq_s32(hit, vdupq_n_s32(INT32_MIN), top));
}

int64_t collect(const int32_t* values, int64_t n, int32_t threshold, int32_t* out, int64_t capacity) {
  int64_t count = 0, i = 0;
  const auto emit = [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at) {
      if (values[at] < threshold) continue;
      if (count < capacity) out[count] = static_cast<int32_t>(at);
      ++count;
    }
  };
  for (; i + 16 <= n; i += 16) {
    const int32x4_t a = vmaxq_s32(vld1q_s32(values + i), vld1q_s32(values + i + 4));
    const int32x4_t b = vmaxq_s32(vld1q_s32(values + i + 8), vld1q_s32(values + i + 12));
    if (vmaxvq_s32(vmaxq_s32(a, b)) >= threshold) emit(i, i + 16);
  }
  emit(i, n);
  return count;
}

}  // namespace

// The cycles of every NEON table are not measured: they are what llvm-mca says of the inner loops on Neoverse N1, and a tenth more
// for the ends of a panel. Other cores differ by a factor that is much the same for all rungs.
const Isa* neon_isa() {
  static const Isa isa = [] {
    Isa table = *portable_isa();  // its loops over rows are in 128-bit vectors too
    table.name = "neon";
    table.vectors = table.tile = kVectors;
    table.has[kInt16] = true;
    table.scan[kInt16] = scan<Words>;
    table.scan[kFloat32] = scan<Products>;
    table.scan[kDifference] = scan<Differences>;
    table.code_levels = 127.0f;
    table.largest = largest;
    table.collect = collect;
    table.tree = &kTreeNeon;
    table.choice = {{0, 0.28f, 0.14f, 0.31f}, {12, 512, 640}};
    return table;
  }();
  return &isa;
}

}  // namespace tmm

#else

namespace tmm {
const Isa* neon_isa() { return nullptr; }
}  // namespace tmm

#endif
