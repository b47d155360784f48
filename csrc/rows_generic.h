// The table of rows.h in the vector types of gcc and clang. Included by one file per instruction set, which sets TMM_LANES and
// TMM_MULTIPLY_ADD and defines the functions declared below.
#include "rows.h"

namespace tmm {
namespace {

constexpr int kLanes = TMM_LANES, kWords = TMM_LANES / 2;

typedef float Floats __attribute__((vector_size(4 * TMM_LANES)));
typedef uint64_t Words __attribute__((vector_size(4 * TMM_LANES)));

template <class V>
inline __attribute__((always_inline)) V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline Words multiply_halves(Words v);              // low 32 bits times high 32 bits of every word
inline Floats reduce(const Floats* sums);           // lane i: the sum of the lanes of sums[i], for kLanes vectors
inline uint32_t not_above(Floats v, float limit);   // bit i: lane i is not above the limit (NaN is not)
inline Floats load_first(const float* p, int64_t count);  // the first `count` < kLanes lanes, and zeros

// Sum over stripes s and words w of x + low(x + key) * high(x + key) with a key for every (s, w), in the manner of NH and XXH3:
// the key makes the place count, the product makes changes in several words not cancel, and x itself keeps the sum from losing
// a word whose other half is zero.
constexpr uint64_t kKeys[8] = {0xbe4ba423396cfeb8, 0x1cad21f72c81017c, 0xdb979083e96dd4de, 0x1f67b3b7a4a44072,
                               0x78e5c0cc4ee679cb, 0x2172ffcc7dd05a82, 0x8e2443f7744608b8, 0x4c263a81e69035e0};
constexpr uint64_t kKeyStep = 0x9e3779b97f4a7c15;

void digest(const char* data, int64_t bytes, uint64_t stripe, uint64_t* sums) {
  constexpr int kParts = 8 / kWords;
  Words sum[kParts], key[kParts];
  for (int p = 0; p < kParts; ++p) {
    sum[p] = load<Words>(sums + p * kWords);
    key[p] = load<Words>(kKeys + p * kWords) + stripe * kKeyStep;
  }
  const auto add = [&](const char* at) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      const Words x = load<Words>(at + p * sizeof(Words));
      sum[p] += x + multiply_halves(x + key[p]);
      key[p] += kKeyStep;
    }
  };
  for (; bytes >= 64; bytes -= 64, data += 64) {
    __builtin_prefetch(data + 2048);
    add(data);
  }
  if (bytes > 0) {
    char tail[64] = {};
    __builtin_memcpy(tail, data, static_cast<uint64_t>(bytes));
    add(tail);
  }
  for (int p = 0; p < kParts; ++p) __builtin_memcpy(sums + p * kWords, &sum[p], sizeof(Words));
}

// Distances to kLanes codes, each `stride` values after the one before (0: the same one again).
inline __attribute__((always_inline)) Floats gaps(const float* z, const float* codes, int64_t stride, int64_t d) {
  const int64_t whole = d / kLanes * kLanes, rest = d - whole;
  Floats sums[kLanes];
#pragma GCC unroll 4
  for (int c = 0; c < kLanes; c += 4) {  // four at a time, whose additions overlap
    const float* code = codes + c * stride;
    Floats sum[4] = {};
    for (int64_t i = 0; i < whole; i += kLanes) {
      const Floats x = load<Floats>(z + i);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Floats gap = load<Floats>(code + j * stride + i) - x;
        sum[j] = TMM_MULTIPLY_ADD(gap, gap, sum[j]);
      }
    }
    if (rest) {
      const Floats x = load_first(z + whole, rest);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Floats gap = load_first(code + j * stride + whole, rest) - x;
        sum[j] = TMM_MULTIPLY_ADD(gap, gap, sum[j]);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[c + j] = sum[j];
  }
  return reduce(sums);
}

int64_t near(const float* z, const float* codes, int64_t n, int64_t d, float limit, int32_t* out, float* total) {
  Floats all = {};
  int64_t count = 0, first = 0;
  const auto list = [&](Floats found, uint32_t lanes) __attribute__((always_inline)) {
    all += found;
    for (uint32_t mask = not_above(found, limit) & lanes; mask; mask &= mask - 1)
      out[count++] = static_cast<int32_t>(first) + __builtin_ctz(mask);
  };
  for (; first + kLanes <= n; first += kLanes) list(gaps(z, codes + first * d, d, d), ~0u);
  for (; first < n; ++first) list(gaps(z, codes + first * d, 0, d), 1);
  for (int lane = 0; lane < kLanes; ++lane) *total += all[lane];
  return count;
}

#include "ssim_generic.h"

constexpr RowKernels kKernels = {digest, near, ssim};

}  // namespace
}  // namespace tmm
